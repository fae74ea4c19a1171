"""What happens to a job and to whom: plans of random runs, each made from one integer, and of known cases by name.

Times are seconds after the start of the driver. What the operating system makes of a plan differs from run to run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

#: Where a worker may die, and how often a plan may say so: a reader that dies twice leaves nobody to read.
WORKER_POINTS = (
    *("before-account", "account", "loading", "warm-up", "in-batch", "in-batch", "before-commit"),
    *("after-commit", "after-commit", "stopping", "stopped"),
)
READER_POINTS = ("reading", "reader-opened", "read")
DRIVER_POINTS = ("driver-closing", "driver-segments", "driver-closed")


@dataclass(frozen=True)
class DriverPlan:
    """One run of the driver.

    Attributes:
        end: how it is ended ("kill", "term", "int", "int-int"), and when; None: it is not.
        end_at_commits: when there are so many commits, instead.
        kills: of any worker.
        losses: of nodes: when, whether preempted, how long their processes live on.
        joins: of nodes.
        resets: of a board's counter.
        reboot: hosts that are started anew before the run.
        away: hosts that are not there in this run.
        max_workers: None: one per board, or share of a board.
        twin_after_s: a second driver is started so much later, and works beside it.
    """

    end: tuple[str, float] | None = None
    end_at_commits: int | None = None
    kills: tuple[float, ...] = ()
    losses: tuple[tuple[float, bool, float], ...] = ()
    joins: tuple[float, ...] = ()
    resets: tuple[float, ...] = ()
    reboot: tuple[int, ...] = ()
    away: tuple[int, ...] = ()
    max_workers: int | None = None
    twin_after_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """A job, its cluster, and every fault.

    Attributes:
        hosts: how many boards each has.
        exclusive: workers commit for themselves.
        slow_s: how long a "slow" image takes the first time (`support.spending_model`).
        spacing_ms: between two readings of a board.
        kill_most_s: a request to kill takes so long at most.
        owner_most_s: workers live on for so long at most when their driver is gone.
        points: names of points, and at which passing of it a process kills itself there.
        part_s: seconds of work after which workers seal what they have of a shard; 0: never.
        again: the same command is given once more at the end.
    """

    seed: int
    hosts: tuple[int, ...]
    prompts: tuple[str, ...]
    shard_size: int = 2
    batch_size: int = 1
    gpus_per_worker: float = 1.0
    lease_s: float = 30.0
    exclusive: bool = True
    speculate: bool = True
    slow_s: float = 2.0
    spacing_ms: int = 200
    kill_most_s: float = 0.1
    owner_most_s: float = 0.5
    points: tuple[tuple[str, int], ...] = ()
    drivers: tuple[DriverPlan, ...] = (DriverPlan(),)
    part_s: float = 0.0
    again: bool = False

    @property
    def benign(self) -> bool:
        """Somebody is always there to read what dead workers left: this job's energy has no excuse for being missing."""
        return all(d == DriverPlan(kills=d.kills) for d in self.drivers) and not any(
            point.startswith("driver") for point, _ in self.points
        )


def make_plan(seed: int) -> Plan:
    """The plan of `seed`: half of all seeds only kill workers and readers, the others everything."""
    rng = random.Random(seed)
    hosts = tuple(rng.choice((1, 1, 2, 2, 3)) for _ in range(rng.choice((1, 2, 2, 3))))
    shard_size = rng.choice((1, 2, 3, 4))
    prompts = []
    for i in range(shard_size * rng.randint(3, 9)):
        words = f"image {i} mj={rng.choice((1, 50, 1_000, 200_000))} ms={rng.choice((1, 5, 20, 60))}"
        if rng.random() < 0.02:
            words += " slow"
        if rng.random() < 0.01:
            words += " raise"
        prompts.append(words)
    if rng.random() < 0.25:  # a straggler at the end, whose race is lost
        prompts[-1] += " slow"
    points = [(rng.choice(WORKER_POINTS), rng.randint(1, 4)) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if rng.random() < 0.2:
        points.append((rng.choice(READER_POINTS), 1))
    drivers = [DriverPlan(kills=_moments(rng, rng.choice((0, 0, 1, 1, 2))))]
    if rng.random() < 0.5:
        drivers = [_driver_plan(rng, len(hosts)) for _ in range(rng.choice((1, 1, 2, 3)))]
        drivers[-1] = replace(drivers[-1], end=None)
        drivers[0] = replace(drivers[0], reboot=(), away=())
        if rng.random() < 0.3:
            points.append((rng.choice(DRIVER_POINTS), rng.randint(1, 3)))
        if rng.random() < 0.2:
            points.append((rng.choice(READER_POINTS), rng.randint(1, 3)))
    return Plan(
        seed=seed,
        hosts=hosts,
        gpus_per_worker=rng.choice((1.0, 1.0, 1.0, 0.5)),
        prompts=tuple(prompts),
        shard_size=shard_size,
        batch_size=rng.choice((1, 2, 4)),
        lease_s=rng.choice((0.8, 3.0, 30.0)),
        exclusive=rng.random() < 0.85,
        speculate=rng.random() < 0.85,
        slow_s=rng.choice((0.5, 1.5, 2.5)),
        spacing_ms=rng.choice((20, 200)),
        kill_most_s=rng.choice((0.02, 0.1, 0.5)),
        owner_most_s=rng.choice((0.1, 0.5, 2.0)),
        points=tuple(points),
        drivers=tuple(drivers),
        again=rng.random() < 0.2,
    )


def _moments(rng: random.Random, n: int) -> tuple[float, ...]:
    return tuple(sorted(rng.uniform(0.0, 1.6) for _ in range(n)))


def _driver_plan(rng: random.Random, hosts: int) -> DriverPlan:
    losses = [
        (rng.uniform(0, 1.5), rng.random() < 0.4, rng.choice((0.0, 0.0, 0.3, 1.0)))
        for _ in range(rng.choice((0, 0, 0, 1, 2)))
    ]
    return DriverPlan(
        end=(rng.choice(("kill", "kill", "term", "int", "int-int")), rng.uniform(0.1, 1.5)),
        kills=_moments(rng, rng.choice((0, 0, 1, 2))),
        losses=tuple(losses),
        joins=_moments(rng, len(losses)) if rng.random() < 0.7 else (),
        resets=_moments(rng, int(rng.random() < 0.12)),
        reboot=tuple(h for h in range(hosts) if rng.random() < 0.06),
        away=tuple(h for h in range(1, hosts) if rng.random() < 0.2),
        twin_after_s=rng.uniform(0.0, 1.0) if rng.random() < 0.12 else None,
    )


def _prompts(*words: str) -> tuple[str, ...]:
    return tuple(f"image {i} {word}" for i, word in enumerate(words))


_QUICK, _LONG = "mj=3000 ms=5", "mj=3000 ms=60"

#: Runs in which much was once certified that nobody had measured.
KNOWN = {
    # two workers; the race of the first is lost, and it sits in a long batch when all is committed
    "straggler at the end": Plan(1, (2,), _prompts(f"{_QUICK} slow", *[_QUICK] * 9), slow_s=3.0),
    # three workers; when one shard is left one of them is let go, and who works on the last shard dies
    "killed after the other was let go": Plan(
        2, (3,), _prompts(*[_QUICK] * 4, _QUICK, f"{_QUICK} slow die"), speculate=False, slow_s=1.5
    ),
    # two workers; one dies, and then the driver; the next run has one
    "resumed on fewer devices": Plan(
        3,
        (2,),
        _prompts(*[_LONG] * 20),
        points=(("before-commit", 3),),
        drivers=(DriverPlan(end=("kill", 0.0), end_at_commits=4), DriverPlan(max_workers=1)),
    ),
    # the same, but the other device's host is not there: missing, by name
    "resumed without a host": Plan(
        4,
        (1, 1),
        _prompts(*[_LONG] * 20),
        points=(("before-commit", 3),),
        drivers=(DriverPlan(end=("kill", 0.0), end_at_commits=4), DriverPlan(away=(1,))),
    ),
    # nobody hears of the last commit from the one who made it
    "dies after its last commit": Plan(5, (2,), _prompts(*[_QUICK] * 12), points=(("after-commit", 6),)),
    # another driver takes the job over while the first and its workers are well: it stands down
    "taken over": Plan(
        7, (2, 2), _prompts(*[_LONG] * 60), shard_size=3, part_s=0.1, drivers=(DriverPlan(twin_after_s=0.8),)
    ),
    # the driver dies; its workers go on for a while, and the next run is finished before they are
    "workers outlive their driver": Plan(
        6,
        (2, 1),
        _prompts(f"{_QUICK} slow", _QUICK),
        shard_size=1,
        slow_s=8.0,
        owner_most_s=2.5,
        drivers=(
            DriverPlan(end=("kill", 0.0), end_at_commits=1, max_workers=2),
            DriverPlan(max_workers=1),
        ),
    ),
}
