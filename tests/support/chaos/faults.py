"""The kinds of faults, and what one integer makes of them: a job's shape and what goes wrong in it, and when.

An even seed has faults of one kind only, so that what a fault costs can be told; an odd one has several kinds together.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from support.fault_plans import Plan

#: Signals to processes, and what happens to nodes and boards: done from outside, at a moment.
OUTSIDE = (
    *("worker killed", "worker stopped for a while", "worker terminated", "worker taken for memory"),
    *("reader killed", "driver stopped for a while", "second driver"),
    *("node lost", "node preempted", "node drained", "counter reset"),
    *("counter book lost", "counter book damaged", "signs of life lost", "scratch lost"),
)
#: They end a driver; another one goes on.
DRIVER_ENDS = ("driver killed", "driver terminated", "driver interrupted")
#: What is done to sealed parts of shards that are not committed yet; only a job of `IN_PARTS` has some for certain.
PARTS = ("part damaged", "part cut short", "part lost")
#: Between two drivers.
BETWEEN = (
    *("host started anew", "collected commits lost", "collected commits damaged", "commit damaged"),
    *("object corrupted early", "object missing early", "half-written files left", *PARTS),
)
#: Done by the process that meets them (`support.chaos.inside`): the device, the disk, the counter, the clock.
DEVICE = (
    *("device fails once", "device fails always", "device draws too few images", "device draws no numbers"),
    *("device draws other shapes", "device hangs", "out of memory once", "out of memory always"),
)
DISK = (
    *("disk full", "disk read-only", "disk quota used up", "disk error", "disk slow", "store busy"),
    *("acknowledgement lost", "driver's disk full", "driver's store busy"),
)
COUNTER = ("counter absent", "counter frozen", "worker dies as its counter freezes")
CLOCK = ("clock jumps",)
INSIDE = (*DEVICE, *DISK, *COUNTER, *CLOCK)
#: Images of the right shape, finite, and not those of their prompts: nothing in the product can see that, and no storm has it
#: (`support.chaos.wrong_pixels`).
WRONG_PIXELS = "device draws other pixels"
#: When the job is done: its own check must say so.
AFTER = ("object corrupted", "object missing")

TIMED = (*OUTSIDE, *INSIDE)
KINDS = (*OUTSIDE, *DRIVER_ENDS, *BETWEEN, *INSIDE, *AFTER)

#: After these a total may be missing, but never false; after others it must be certified.
MAY_HIDE_ENERGY = {
    *("node lost", "node preempted", "node drained", "counter reset", "counter absent", "counter frozen"),
    *("counter book lost", "counter book damaged", "signs of life lost"),
    "worker dies as its counter freezes",
    "reader killed",  # a third one is not sent for
    *("host started anew", "second driver", *DRIVER_ENDS),
}


@dataclass(frozen=True)
class Fault:
    """`at_s` seconds after its driver's start; `seconds` is how long it lasts, where it lasts."""

    kind: str
    at_s: float
    seconds: float = 0.5


@dataclass(frozen=True)
class Round:
    """One driver: what is done before it starts, while it runs, and how it ends, if it does not by itself."""

    before: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
    end: tuple[str, int] | None = None  # a kind of DRIVER_ENDS, and the number of commits at which it comes


@dataclass(frozen=True)
class Storm:
    """A whole run: `after` are kinds of AFTER."""

    seed: int
    shape: int
    plan: Plan
    rounds: tuple[Round, ...]
    after: tuple[str, ...] = ()


#: Hosts and their boards, shards, rows of a shard, batch size, seconds of work of a part.
SHAPES = (
    ((2,), 10, 2, 1, 0.0),
    ((1, 1), 9, 3, 2, 0.0),
    ((2, 1), 8, 4, 4, 0.0),
    ((1, 1, 1), 9, 3, 1, 0.06),
    ((1, 1), 3, 12, 1, 0.06),
)
#: The shape whose shards take several parts.
IN_PARTS = 4


def job_of(shape: int, seed: int = 0) -> Plan:
    """The job of a shape. No prompt in it is at fault for anything."""
    hosts, shards, shard_size, batch_size, part_s = SHAPES[shape]
    rng = random.Random(1000 + shape)
    prompts = tuple(
        f"image {i} mj={rng.choice((50, 1_000, 20_000))} ms={rng.choice((5, 20, 60))}"
        for i in range(shards * shard_size)
    )
    return Plan(
        *(seed, hosts, prompts, shard_size, batch_size),
        lease_s=1.5,
        spacing_ms=(20, 200)[shape % 2],
        slow_s=0.0,
        part_s=part_s,
    )


def calm(shape: int) -> Storm:
    """The shape's job, undisturbed."""
    return Storm(-1 - shape, shape, job_of(shape), (Round(),))


def storm(seed: int) -> Storm:
    """What `seed` stands for."""
    rng = random.Random(seed)
    shape = rng.randrange(len(SHAPES))
    if seed % 2 == 0:
        kinds: tuple[str, ...] = (KINDS[seed // 2 % len(KINDS)],)
        times = rng.randint(1, 3)
    else:
        kinds = tuple(rng.sample(KINDS, rng.randint(3, 7)))
        times = 1
    if set(kinds) & set(PARTS):
        shape = IN_PARTS
    ends = [k for k in kinds if k in DRIVER_ENDS]
    before = tuple(k for k in kinds if k in BETWEEN)
    if before and not ends:
        ends = ["driver killed"]
    rounds = [
        Round(faults=_faults(rng, kinds, times), end=(end, min(rng.randint(1, 4), SHAPES[shape][1] - 2) + i))
        for i, end in enumerate(ends)
    ]
    rounds.append(Round(before, () if rounds and rng.random() < 0.5 else _faults(rng, kinds, times)))
    return Storm(seed, shape, job_of(shape, seed), tuple(rounds), tuple(k for k in kinds if k in AFTER))


def _faults(rng: random.Random, kinds: tuple[str, ...], times: int) -> tuple[Fault, ...]:
    if "reader killed" in kinds:  # readers come after workers that die
        kinds = (*kinds, "worker killed")
    timed = [k for k in kinds if k in TIMED for _ in range(1 if k == "second driver" else times)]
    # most are there at once and wait for whoever meets them first
    return tuple(Fault(k, rng.uniform(0.0, 1.0), rng.choice((0.2, 0.8, 2.5))) for k in timed)
