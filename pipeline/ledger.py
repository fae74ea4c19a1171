"""The energy ledger: from the segments that workers recorded to who used what, to the millijoule.

In go the segments of all commits and drivers, in any order, possibly twice; out come one entry per segment, the
energy nobody can be charged with ("gap", and "off" between two runs of a job), and totals.
For every counter (boot, epoch, domain) the entries and gaps add up to its last reading minus its first, exactly:

    C1   sum(segments) + sum(gaps) = sum over runs of (last reading - first reading)    per boot, epoch and domain
    C2   sum(image direct) + overhead = sum(segments) + sum(gaps)

A missing measurement stays None, and so does every sum it would belong to. Estimates have columns of their own.
Nothing here reads a counter or a clock.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from millijoule.pipeline.apportionment import (
    Claim,
    Reading,
    Run,
    split_counter,
    sum_or_none,
)
from millijoule.workers.schemas import SEGMENT_CLASSES, CounterRead, Segment
from millijoule.workers.timeline import segment_estimate_mj


@dataclass(frozen=True)
class LedgerEntry:
    """What one segment used.

    `energy_mj` has every domain its worker ever measured; None where this segment's part cannot be known. `lost`
    says that some of its energy is nowhere in the ledger, not even in a gap.
    """

    segment: Segment
    segment_class: str
    energy_mj: Mapping[str, int | None]
    lost: bool

    @property
    def total_mj(self) -> int | None:
        """All domains; None unless every one was measured."""
        parts = [mj for mj in self.energy_mj.values() if mj is not None]
        return sum(parts) if parts and len(parts) == len(self.energy_mj) else None

    @property
    def known_mj(self) -> int:
        """What was measured, complete or not: for closure, not for reports."""
        return sum(mj for mj in self.energy_mj.values() if mj is not None)


@dataclass(frozen=True)
class LedgerGap:
    """Counted energy outside every usable segment; times are CLOCK_MONOTONIC of `boot_id`."""

    boot_id: str
    epoch: int
    domain: str
    t_open_ns: int
    t_close_ns: int
    segment_class: str  # "gap", or "off": the job was not running
    energy_mj: int


@dataclass(frozen=True)
class LedgerRun:
    """A stretch of one counter without a reset; what the ledger divides is its growth."""

    boot_id: str
    epoch: int
    domain: str
    run: Run


@dataclass(frozen=True)
class Ledger:
    """All entries in order of time, and what is left over. Built by `build_ledger`."""

    entries: tuple[LedgerEntry, ...]
    gaps: tuple[LedgerGap, ...]
    runs: tuple[LedgerRun, ...]
    _shards: Mapping[tuple[int | None, str | None], int | None] = field(repr=False, default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether something was measured and nothing is missing: only then does a total mean what it says."""
        return bool(self.entries) and not any(e.lost for e in self.entries)

    def shard_energy_mj(self, shard_id: int, attempt_id: str) -> int | None:
        """Direct energy of one attempt's shard, all domains; None where it was not measured in full."""
        return self._shards.get((shard_id, attempt_id))

    def summary(self) -> dict[str, Any]:
        """Totals in millijoules, for `stats.json`.

        `total_mj` is everything the job's devices used from its first to its last segment, without the time between
        two runs ("off"); None unless `complete`. `shard_mj` is None unless every shard was measured.
        `measured_mj` has what was measured per class, complete or not; with "off" it adds up to the counters' growth.
        """
        measured: Counter[str] = Counter()
        estimates: dict[str, int | None] = {}
        for entry in self.entries:
            measured[entry.segment_class] += entry.known_mj
            estimate, so_far = segment_estimate_mj(entry.segment), estimates.get(entry.segment_class, 0)
            estimates[entry.segment_class] = None if None in (estimate, so_far) else so_far + estimate  # type: ignore[operator]
        for gap in self.gaps:
            measured[gap.segment_class] += gap.energy_mj
        shards = [e.total_mj for e in self.entries if e.segment_class == "shard"]
        shard_mj = sum_or_none(shards)
        total_mj = measured.total() - measured["off"] if self.complete else None
        return {
            "complete": self.complete,
            "domains": sorted({d for e in self.entries for d in e.energy_mj}),
            "total_mj": total_mj,
            "shard_mj": shard_mj,
            "overhead_mj": None if total_mj is None or shard_mj is None else total_mj - shard_mj,
            "measured_mj": {c: measured[c] for c in (*SEGMENT_CLASSES, "off") if self.runs and c in measured},
            "segments": len(self.entries),
            "segments_not_measured": sum(e.total_mj is None for e in self.entries),
            "counter_resets": len(self.runs) - len({(r.boot_id, r.domain) for r in self.runs}),
            "estimate_total_mj": sum_or_none(estimates.values()),
            "estimate_mj": {c: estimates[c] for c in SEGMENT_CLASSES if c in estimates},
        }


def build_ledger(segments: Iterable[Segment], winners: Mapping[int, str] | None = None) -> Ledger:
    """Account for `segments`.

    Workers that read the same counter at the same time share it equally; see `split_counter`. A segment that was
    reported twice counts once.

    Args:
        segments: in any order.
        winners: attempt id of each committed shard; a "shard" segment of any other attempt is booked as "loser".
            Without it the recorded classes stand.
    """
    unique = _deduplicate(segments)
    domains: dict[str, set[str]] = defaultdict(set)
    for s in unique:
        domains[s.worker_id].update(s.open.energy_mj, s.close.energy_mj)

    claims: dict[tuple[str, int, str], list[tuple[int, Claim]]] = defaultdict(list)
    for n, segment in enumerate(unique):
        for domain in domains[segment.worker_id]:
            for key, claim in _claims(segment, domain):
                claims[key].append((n, claim))

    energy_mj: list[dict[str, int | None]] = [{} for _ in unique]
    lost = [not domains[s.worker_id] for s in unique]
    gaps: list[LedgerGap] = []
    runs: list[LedgerRun] = []
    for key in sorted(claims):
        split = split_counter([claim for _, claim in claims[key]])
        gaps.extend(
            LedgerGap(*key, u.t_open_ns, u.t_close_ns, u.segment_class, u.energy_mj) for u in split.unclaimed
        )
        runs.extend(LedgerRun(*key, run) for run in split.runs)
        for (n, claim), share in zip(claims[key], split.shares, strict=True):
            energy_mj[n][key[2]] = share
            if share is None and not (
                _counter_scale(unique[n].open) == _counter_scale(unique[n].close)
                and split.covers(claim.t_open_ns, claim.t_close_ns)
            ):
                lost[n] = True

    entries = tuple(
        LedgerEntry(s, _class_of(s, winners), dict(sorted(mj.items())), gone)
        for s, mj, gone in zip(unique, energy_mj, lost, strict=True)
    )
    parts: dict[tuple[int | None, str | None], list[int | None]] = defaultdict(list)
    for entry in entries:
        if entry.segment.segment_class == "shard":
            parts[entry.segment.shard_id, entry.segment.attempt_id].append(entry.total_mj)
    return Ledger(entries, tuple(gaps), tuple(runs), {k: sum_or_none(v) for k, v in parts.items()})


def _deduplicate(segments: Iterable[Segment]) -> list[Segment]:
    """One segment per worker and stretch of time, in order of time.

    A stretch that was first part of a shard and then reported again as waste stays with the shard: it is reported
    again only by a worker that could not know that its commit had succeeded.
    """
    preference = {c: i for i, c in enumerate(("shard", *SEGMENT_CLASSES))}
    best: dict[tuple[str, int, str, int], tuple[tuple[int, int, str], Segment]] = {}
    for s in segments:
        key = (s.open.boot_id, s.open.t_mono_ns, s.worker_id, s.close.t_mono_ns)
        rank = (preference[s.segment_class], -1 if s.shard_id is None else s.shard_id, s.attempt_id or "")
        if key not in best or rank < best[key][0]:
            best[key] = (rank, s)
    return [best[key][1] for key in sorted(best)]


def _class_of(segment: Segment, winners: Mapping[int, str] | None) -> str:
    if segment.segment_class == "shard" and winners is not None:
        won = segment.shard_id is not None and winners.get(segment.shard_id) == segment.attempt_id
        return "shard" if won else "loser"
    return segment.segment_class


def _counter_scale(read: CounterRead) -> tuple[str, int]:
    """Counters may be subtracted within one boot and epoch only."""
    return read.boot_id, read.epoch


def _claims(segment: Segment, domain: str) -> Iterator[tuple[tuple[str, int, str], Claim]]:
    """The segment's claim on `domain`: one, or a blind one on either side of a reset."""
    before, after = segment.open, segment.close
    if _counter_scale(before) == _counter_scale(after):
        readings = (_reading(before, domain), _reading(after, domain))
        claim = Claim(segment.worker_id, before.t_mono_ns, after.t_mono_ns, *readings)
        yield (*_counter_scale(before), domain), claim
        return
    for read, reading in (
        (before, (_reading(before, domain), None)),
        (after, (None, _reading(after, domain))),
    ):
        same_clock = before.boot_id == after.boot_id
        span = (before.t_mono_ns, after.t_mono_ns) if same_clock else (read.t_mono_ns, read.t_mono_ns)
        yield (*_counter_scale(read), domain), Claim(segment.worker_id, *span, *reading)


def _reading(read: CounterRead, domain: str) -> Reading | None:
    energy_mj = read.energy_mj.get(domain)
    return None if energy_mj is None else Reading(read.t_mono_ns, energy_mj)
