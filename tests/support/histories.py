"""Random histories of a job, for properties: workers that share counters, crash, lose races and repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from hypothesis import strategies as st
from support.ledgers import SECOND, commit

from millijoule.workers.schemas import Commit, CounterRead, Segment


@dataclass(frozen=True)
class History:
    """What a finished job left behind: its commits, and every segment anybody reported, in any order."""

    commits: tuple[Commit, ...]
    segments: tuple[Segment, ...]

    @property
    def winners(self) -> dict[int, str]:
        return {c.shard_id: c.attempt_id for c in self.commits}


@dataclass
class _Clock:
    """One host: the counters' values at each second, and the epoch its meters state."""

    boot: str
    values: list[dict[str, int]]
    epochs: list[int]


@st.composite
def _hosts(draw, boot: str) -> _Clock:
    domains = draw(st.sampled_from([["gpu:A"], ["cpu:0"], ["cpu:0", "gpu:A"], ["gpu:A", "gpu:B"]]))
    steps = draw(st.lists(st.tuples(*[st.integers(0, 3000)] * len(domains)), min_size=3, max_size=14))
    reset_at = draw(st.none() | st.integers(1, len(steps) - 1))
    noticed = draw(st.booleans())  # whether the meters saw the reset
    now, values, epochs = dict.fromkeys(domains, 10_000), [], []
    for i, step in enumerate(steps):
        now = {d: (0 if i == reset_at else v) + s for (d, v), s in zip(now.items(), step, strict=True)}
        values.append(now)
        epochs.append(int(noticed and reset_at is not None and i >= reset_at))
    return _Clock(boot, values, epochs)


@st.composite
def _chains(draw, host: _Clock, worker: str, shards: int) -> list[Segment]:
    """What one worker did between its first and its last read, in which domains may be missing."""
    at = sorted(draw(st.sets(st.integers(0, len(host.values) - 1), min_size=2)))
    reads, fallible = [], draw(st.booleans())
    for i in at:
        seen = {d: v for d, v in host.values[i].items() if not fallible or draw(st.integers(0, 5)) < 5}
        reads.append(CounterRead(host.boot, i * SECOND, (100 + i) * SECOND, 0, seen, 3 * i, host.epochs[i]))
    chain = []
    for n, (before, after) in enumerate(pairwise(reads)):
        kind = draw(st.sampled_from(["load", "warmup", "idle", "shard", "shard", "shard", "loser", "retry"]))
        shard_id = draw(st.integers(0, shards - 1)) if kind in ("shard", "loser", "retry") else None
        attempt = None if shard_id is None else f"{worker}-{n}"
        chain.append(Segment(worker, kind, before, after, shard_id, attempt))
    return chain


@st.composite
def histories(draw) -> History:
    """A job of up to five shards on up to two hosts with up to three workers each.

    Of the attempts at a shard one is committed; the others' workers may or may not know that they lost. A commit
    carries what its worker did since its last one. What came after a worker's last commit is reported when it is
    stopped in order, and lost when it crashes or its node does. Some things are reported twice.
    """
    shards = draw(st.integers(1, 5))
    chains: list[list[Segment]] = []
    for boot in ["b1", "b2"][: draw(st.integers(1, 2))]:
        host = draw(_hosts(boot))
        chains += [draw(_chains(host, f"{boot}-{w}", shards)) for w in range(draw(st.integers(1, 3)))]
    attempts: dict[int, list[Segment]] = {}
    for chain in chains:
        for s in chain:
            if s.segment_class == "shard":
                attempts.setdefault(s.shard_id, []).append(s)
    won = {shard: draw(st.sampled_from(tried)).attempt_id for shard, tried in sorted(attempts.items())}

    commits: list[Commit] = []
    reported: list[Segment] = []
    for chain in chains:
        carried: list[Segment] = []
        for s in chain:
            if s.segment_class == "shard" and won[s.shard_id] != s.attempt_id and draw(st.booleans()):
                s = replace(s, segment_class="loser")
            carried.append(s)
            if s.segment_class == "shard" and won[s.shard_id] == s.attempt_id:
                commits.append(_commit(s, carried, draw(outcomes())))
                reported += carried
                carried = []
        if draw(st.booleans()):
            reported += carried
    if reported:
        again = draw(st.lists(st.sampled_from(reported), max_size=4))
        reported += [_as_waste(s) if draw(st.booleans()) else s for s in again]
    return History(tuple(commits), tuple(draw(st.permutations(reported))))


@st.composite
def outcomes(draw) -> dict[str, int | None]:
    """How the images of a shard ended: fields of its commit; one from before there were filtered images, too."""
    ok, quarantined = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    if draw(st.booleans()):
        return {"images_ok": ok, "images_quarantined": quarantined}
    filtered = draw(st.integers(0, 2))
    return {
        "images_ok": ok,
        "images_filtered": filtered,
        "images_quarantined": quarantined,
        "images_drawn": ok + filtered + draw(st.integers(0, quarantined)),
    }


def _commit(shard: Segment, carried: Sequence[Segment], images: dict[str, int | None]) -> Commit:
    assert shard.shard_id is not None
    assert shard.attempt_id is not None
    return commit(
        shard.shard_id,
        shard.attempt_id,
        images.pop("images_ok"),
        carried,
        **images,
        worker=shard.worker_id,
        host=shard.open.boot_id,
        t_start_wall_ns=shard.open.t_wall_ns,
        t_end_wall_ns=shard.close.t_wall_ns,
    )


def _as_waste(s: Segment) -> Segment:
    """As a worker reports a shard again that could not know that its commit had succeeded."""
    return replace(s, segment_class="loser") if s.segment_class == "shard" else s
