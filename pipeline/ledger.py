"""The energy ledger: from the segments that workers recorded to who used what, to the millijoule.

In go the segments of all commits and drivers, in any order, possibly twice, and what is known of when each worker's
account of its devices began and ended (`pipeline.account_gaps`); out come one entry per segment and per stretch of an account
that nobody recorded, the energy nobody can be charged with ("gap", and "off" between two runs of a job), and totals.
For every counter (boot, epoch, domain) the entries and gaps add up to its last reading minus its first, exactly:

    C1   sum(segments) + sum(gaps) = sum over runs of (last reading - first reading)    per boot, epoch and domain
    C2   sum(image direct) + overhead = sum(segments) + sum(gaps)

A missing measurement stays None, and so does every sum it would belong to; a worker's own device whose counter nobody
could read is such a one, whatever else its worker read. Estimates have columns of their own.
Nothing here reads a counter or a clock.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, overload

from millijoule.pipeline.account_gaps import Unclosed, account_gaps
from millijoule.pipeline.apportionment import (
    Claim,
    Reading,
    Run,
    split_counter,
    sum_or_none,
)
from millijoule.pipeline.packed_segments import PackedSegments, SegmentSelection
from millijoule.workers.own_devices import unread_domains
from millijoule.workers.schemas import (
    BOOK_EPOCHS,
    SEGMENT_CLASSES,
    CounterRead,
    Segment,
    WorkerClosing,
    WorkerEnvironment,
    wraps,
)
from millijoule.workers.timeline import segment_estimate_mj

#: Stands for None where shares are kept as numbers; no share is negative.
_MISSING = -1


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What one segment used.

    `energy_mj` has every domain its worker ever measured, and those of its devices that it never could; None where this
    segment's part cannot be known. `lost` says that some of its energy is nowhere in the ledger, not even in a gap.
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
    """All entries in order of time, and what is left over. Built by `build_ledger`.

    `unread` has, by worker, the domains of its own devices that it never read though it read others; `unclosed` the
    workers whose accounts have no end.
    """

    entries: Sequence[LedgerEntry]
    gaps: tuple[LedgerGap, ...]
    runs: tuple[LedgerRun, ...]
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unclosed: tuple[Unclosed, ...] = ()
    _shards: Mapping[tuple[int | None, str | None], int | None] = field(repr=False, default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether something was measured and nothing is missing: only then does a total mean what it says."""
        return bool(self.entries) and not self.unclosed and not any(e.lost for e in self.entries)

    def read_domains(self, entry: LedgerEntry) -> list[str]:
        """Every domain that the worker of `entry` ever read."""
        unread = self.unread.get(entry.segment.worker_id, ())
        return [d for d in entry.energy_mj if d not in unread]

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
            "unclosed": [u.as_record() for u in self.unclosed],
            "domains": sorted({r.domain for r in self.runs}),
            "total_mj": total_mj,
            "shard_mj": shard_mj,
            "overhead_mj": None if total_mj is None or shard_mj is None else total_mj - shard_mj,
            "measured_mj": {c: measured[c] for c in (*SEGMENT_CLASSES, "off") if self.runs and c in measured},
            "segments": len(self.entries),
            "segments_not_measured": sum(e.total_mj is None for e in self.entries),
            "counter_resets": len(self.runs)
            - len({(r.boot_id, r.domain, r.epoch // BOOK_EPOCHS) for r in self.runs}),
            "estimate_total_mj": sum_or_none(estimates.values()),
            "estimate_mj": {c: estimates[c] for c in SEGMENT_CLASSES if c in estimates},
        }


def build_ledger(
    segments: Iterable[Segment],
    winners: Mapping[int, str] | None = None,
    devices: Mapping[str, Sequence[str]] | None = None,
    environments: Mapping[str, WorkerEnvironment] | None = None,
    closings: Mapping[str, WorkerClosing] | None = None,
) -> Ledger:
    """Account for `segments`, and for what lies between them.

    Workers that read the same counter at the same time share it equally; see `split_counter`. A segment that was
    reported twice counts once. A wrapping counter that was followed in two books at once (containers that do not share
    theirs) is believed to the one that followed it longest: the other's totals are on another scale, and both together
    would count the package twice. Its workers' shares of it are not known.

    Args:
        segments: in any order. `PackedSegments` are taken over: gaps are added to them.
        winners: attempt id of each committed shard; a "shard" segment of any other attempt is booked as "loser".
            Without it the recorded classes stand.
        devices: what each worker held, by worker id (UUIDs of GPUs, or "cpu"), as far as known: their counters
            belong to a complete measurement.
        environments: of the workers, by worker id: those that state an opening read owe an account.
        closings: how these accounts ended, by worker id.
    """
    packed = segments if isinstance(segments, PackedSegments) else PackedSegments(segments)
    recorded = _deduplicate(packed)
    account, unclosed = account_gaps(SegmentSelection(packed, recorded), environments or {}, closings or {})
    unknown = {len(packed) + i: gap.unknown for i, gap in enumerate(account) if gap.unknown}
    packed.extend(gap.segment for gap in account)
    numbers = packed.in_order([*recorded, *range(len(packed) - len(account), len(packed))])
    unique: Sequence[Segment] = SegmentSelection(packed, numbers)
    unknown = {place: unknown[n] for place, n in enumerate(numbers.tolist()) if n in unknown}
    found: dict[str, set[str]] = defaultdict(set)
    spans: dict[_Book, _Span] = {}
    for s in unique:
        found[s.worker_id].update(s.open.energy_mj, s.close.energy_mj)
        for read in (s.open, s.close):
            _extend_span(spans, read)
    unread = {
        worker_id: missing
        for worker_id, names in found.items()
        if names and (missing := unread_domains((devices or {}).get(worker_id, ()), names))
    }
    domains = {
        worker_id: tuple(sorted({*names, *unread.get(worker_id, ())})) for worker_id, names in found.items()
    }

    if refused := _refused_books(spans):
        unique = _WithoutBooks(unique, refused)

    entries = _Entries(unique, domains, winners)
    gaps: list[LedgerGap] = []
    runs: list[LedgerRun] = []
    for scale, wrapping, at in _by_scale(unique):
        for domain in sorted({d for n in at for d in entries.domains_of[n] if wraps(d) == wrapping}):
            claims = [
                (n, _claim(unique[n], scale, domain, domain in unknown.get(n, ())))
                for n in at
                if domain in entries.domains_of[n]
            ]
            split = split_counter([claim for _, claim in claims])
            gaps.extend(
                LedgerGap(*scale, domain, u.t_open_ns, u.t_close_ns, u.segment_class, u.energy_mj)
                for u in split.unclaimed
            )
            runs.extend(LedgerRun(*scale, domain, run) for run in split.runs)
            for (n, claim), share in zip(claims, split.shares, strict=True):
                entries.set_share(n, domain, share)
                known = split.covers(claim.t_open_ns, claim.t_close_ns) and _on_one_scale(unique[n], domain)
                if domain in unknown.get(n, ()) or (share is None and not known):
                    entries.lost[n] = True

    parts: dict[tuple[int | None, str | None], int | None] = {}
    for entry in entries:
        if entry.segment.segment_class == "shard":
            key = entry.segment.shard_id, entry.segment.attempt_id
            parts[key] = sum_or_none((parts[key], entry.total_mj)) if key in parts else entry.total_mj
    return Ledger(entries, tuple(gaps), tuple(runs), unread, unclosed, parts)


class _Entries(Sequence[LedgerEntry]):
    """Entries made when they are looked at: of 100,000 shards their dictionaries would be a hundred megabytes.

    Args:
        segments: in order of time.
        domains: that each worker ever measured, in order.
        winners: as in `build_ledger`.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        domains: Mapping[str, tuple[str, ...]],
        winners: Mapping[int, str] | None,
    ) -> None:
        self.segments = segments
        self.winners = winners
        self.domains_of = [domains[s.worker_id] for s in segments]
        self.lost = bytearray(not names for names in self.domains_of)
        # place of each segment's first domain in `_shares`
        self._first = array("q", accumulate(map(len, self.domains_of), initial=0))
        self._shares = array("q", [_MISSING]) * self._first[-1]

    def set_share(self, number: int, domain: str, energy_mj: int | None) -> None:
        """What segment `number` used of `domain`."""
        place = self._first[number] + self.domains_of[number].index(domain)
        self._shares[place] = _MISSING if energy_mj is None else energy_mj

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Entries) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.segments)

    @overload
    def __getitem__(self, number: int) -> LedgerEntry: ...
    @overload
    def __getitem__(self, number: slice) -> list[LedgerEntry]: ...
    def __getitem__(self, number: int | slice) -> LedgerEntry | list[LedgerEntry]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        segment = self.segments[number]
        shares = self._shares[self._first[number] : self._first[number + 1]]
        energy_mj = {
            domain: None if mj == _MISSING else mj
            for domain, mj in zip(self.domains_of[number], shares, strict=True)
        }
        return LedgerEntry(segment, _class_of(segment, self.winners), energy_mj, bool(self.lost[number]))


def _deduplicate(packed: PackedSegments) -> list[int]:
    """Numbers of one segment per worker and stretch of time, in order of time.

    A stretch that was first part of a shard and then reported again as waste stays with the shard: it is reported
    again only by a worker that could not know that its commit had succeeded.
    """
    preference = {c: i for i, c in enumerate(("shard", *SEGMENT_CLASSES))}

    def rank(number: int) -> tuple[int, int, str]:
        s = packed[number]
        return preference[s.segment_class], -1 if s.shard_id is None else s.shard_id, s.attempt_id or ""

    return [same[0] if len(same) == 1 else min(same, key=rank) for same in packed.stretches()]


@dataclass
class _Span:
    """From when to when a book followed wrapping counters of a boot (CLOCK_MONOTONIC), and its first `wrap_epoch`."""

    first_ns: int
    last_ns: int
    wrap_epoch: int | None

    def overlaps(self, other: _Span) -> bool:
        return self.first_ns <= other.last_ns and other.first_ns <= self.last_ns


#: A book: its boot and number, None where reads do not state it.
_Book = tuple[str, int | None]


def _book_of(read: CounterRead) -> _Book:
    return read.boot_id, None if read.wrap_epoch is None else read.wrap_epoch // BOOK_EPOCHS


def _extend_span(spans: dict[_Book, _Span], read: CounterRead) -> None:
    if any(map(wraps, read.energy_mj)):
        span = spans.setdefault(_book_of(read), _Span(read.t_mono_ns, read.t_mono_ns, read.wrap_epoch))
        span.first_ns, span.last_ns = min(span.first_ns, read.t_mono_ns), max(span.last_ns, read.t_mono_ns)


def _refused_books(spans: Mapping[_Book, _Span]) -> dict[_Book, int | None]:
    """Books whose wrapping counters a longer book of the same boot followed at the same time, with its `wrap_epoch`."""
    kept: dict[str, list[_Span]] = defaultdict(list)
    refused: dict[_Book, int | None] = {}
    for book in sorted(spans, key=lambda b: (spans[b].first_ns - spans[b].last_ns, b[0], b[1] or 0)):
        longer = next((span for span in kept[book[0]] if span.overlaps(spans[book])), None)
        if longer is None:
            kept[book[0]].append(spans[book])
        else:
            refused[book] = longer.wrap_epoch
    return refused


class _WithoutBooks(Sequence[Segment]):
    """Segments whose reads lack the wrapping counters of some books: as of workers that could not read them."""

    def __init__(self, segments: Sequence[Segment], refused: Mapping[_Book, int | None]) -> None:
        self._segments = segments
        self._refused = refused

    def __len__(self) -> int:
        return len(self._segments)

    @overload
    def __getitem__(self, number: int) -> Segment: ...
    @overload
    def __getitem__(self, number: slice) -> list[Segment]: ...
    def __getitem__(self, number: int | slice) -> Segment | list[Segment]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        segment = self._segments[number]
        return replace(segment, open=self._stripped(segment.open), close=self._stripped(segment.close))

    def _stripped(self, read: CounterRead) -> CounterRead:
        book = _book_of(read)
        if book not in self._refused:
            return read
        energy_mj = {domain: mj for domain, mj in read.energy_mj.items() if not wraps(domain)}
        return replace(read, energy_mj=energy_mj, wrap_epoch=self._refused[book])


def _by_scale(segments: Sequence[Segment]) -> Iterator[tuple[tuple[str, int], bool, array[int]]]:
    """The numbers of the segments that begin or end on each scale, of wrapping counters or of others, scales in order."""
    numbers: dict[tuple[str, int, bool], array[int]] = defaultdict(lambda: array("q"))
    for n, s in enumerate(segments):
        for boot_id, epoch, plain in {key for read in (s.open, s.close) for key in _scale_keys(read)}:
            numbers[boot_id, epoch, plain].append(n)
    for boot_id, epoch, plain in sorted(numbers):
        yield (boot_id, epoch), not plain, numbers[boot_id, epoch, plain]


def _scale_keys(read: CounterRead) -> tuple[tuple[str, int, bool], tuple[str, int, bool]]:
    """Scales of a read, of wrapping counters and of those that do not."""
    wrap_epoch = read.epoch if read.wrap_epoch is None else read.wrap_epoch
    return (read.boot_id, wrap_epoch, False), (read.boot_id, read.epoch, True)


def _class_of(segment: Segment, winners: Mapping[int, str] | None) -> str:
    if segment.segment_class == "shard" and winners is not None:
        won = segment.shard_id is not None and winners.get(segment.shard_id) == segment.attempt_id
        return "shard" if won else "loser"
    return segment.segment_class


def _counter_scale(read: CounterRead, domain: str) -> tuple[str, int]:
    """Readings of a counter may be subtracted within one boot and epoch only."""
    return read.boot_id, read.epoch_of(domain)


def _on_one_scale(segment: Segment, domain: str) -> bool:
    return _counter_scale(segment.open, domain) == _counter_scale(segment.close, domain)


def _claim(segment: Segment, scale: tuple[str, int], domain: str, is_unknown: bool) -> Claim:
    """The segment's claim on `domain` on a scale it begins or ends on; blind on either side of a reset.

    `is_unknown`: its end says nothing of the domain.
    """
    before, after = segment.open, segment.close
    if _on_one_scale(segment, domain):
        readings = (_reading(before, domain), None if is_unknown else _reading(after, domain))
        return Claim(segment.worker_id, before.t_mono_ns, after.t_mono_ns, *readings)
    opens = _counter_scale(before, domain) == scale
    read = before if opens else after
    reading = _reading(read, domain)
    same_clock = before.boot_id == after.boot_id
    span = (before.t_mono_ns, after.t_mono_ns) if same_clock else (read.t_mono_ns, read.t_mono_ns)
    return Claim(segment.worker_id, *span, *((reading, None) if opens else (None, reading)))


def _reading(read: CounterRead, domain: str) -> Reading | None:
    energy_mj = read.energy_mj.get(domain)
    return None if energy_mj is None else Reading(read.t_mono_ns, energy_mj)
