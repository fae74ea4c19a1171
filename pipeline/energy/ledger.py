"""The energy ledger: from the segments that workers recorded to who used what, to the millijoule.

In go the segments of all commits and drivers, in any order, possibly twice, and what is known of when each worker's
account of its devices began and ended (`pipeline.energy.account_gaps`); out come one entry per segment and per stretch of an account
that nobody recorded, the energy nobody can be charged with ("gap", and "off" between two runs of a job), and totals.
For every counter (boot, epoch, domain) the entries and gaps add up to its last reading minus its first, exactly:

    C1   sum(segments) + sum(gaps) = sum over runs of (last reading - first reading)    per boot, epoch and domain
    C2   sum(image direct) + overhead = sum(segments) + sum(gaps)

A missing measurement stays None, and so does every sum it would belong to; a worker's own device whose counter nobody
could read is such a one, whatever else its worker read. Estimates have columns of their own.
Nothing here reads a counter or a clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.account_gaps import Chain, Unclosed, account_gaps
from millijoule.pipeline.energy.apportionment import Run, sum_or_none
from millijoule.pipeline.energy.counter_split import MISSING, Claims, split_counter
from millijoule.pipeline.energy.packed_segments import NONE, PackedSegments
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.schemas import (
    BOOK_EPOCHS,
    BOOK_NUMBERS,
    SEGMENT_CLASSES,
    Segment,
    WorkerClosing,
    WorkerEnvironment,
    wraps,
)


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

    entries: Entries
    gaps: tuple[LedgerGap, ...]
    runs: tuple[LedgerRun, ...]
    unread: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unclosed: tuple[Unclosed, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether something was measured and nothing is missing: only then does a total mean what it says."""
        return bool(self.entries) and not self.unclosed and not self.entries.lost.any()

    def read_domains(self, worker_id: str) -> tuple[str, ...]:
        """Every domain that a worker ever read."""
        unread = self.unread.get(worker_id, ())
        return tuple(d for d in self.entries.domains_of[worker_id] if d not in unread)

    def shard_energy_mj(self, shard_id: int, attempt_id: str) -> int | None:
        """Direct energy of one attempt's shard, all domains; None where it was not measured in full."""
        found = self.entries.shard_energies(np.array([shard_id], np.int64), pa.array([attempt_id]))
        return None if found[0] == MISSING else int(found[0])

    def summary(self) -> dict[str, Any]:
        """Totals in millijoules, for `stats.json`.

        `total_mj` is everything the job's devices used from its first to its last segment, without the time between
        two runs ("off"); None unless `complete`. `shard_mj` is None unless every shard was measured.
        `measured_mj` has what was measured per class, complete or not; with "off" it adds up to the counters' growth.
        """
        entries, estimate_mj = self.entries, self.entries.estimates()
        measured: Counter[str] = Counter()
        estimates: dict[str, int | None] = {}
        for code in np.unique(entries.segment_class).tolist():
            mine, name = entries.segment_class == code, entries.class_names[code]
            measured[name] = int(entries.known_mj[mine].sum())
            estimates[name] = _sum_or_none(estimate_mj[mine])
        for gap in self.gaps:
            measured[gap.segment_class] += gap.energy_mj
        shard_mj = _sum_or_none(entries.total_mj[entries.segment_class == entries.class_names.index("shard")])
        total_mj = measured.total() - measured["off"] if self.complete else None
        return {
            "complete": self.complete,
            "unclosed": [u.as_record() for u in self.unclosed],
            "domains": sorted({r.domain for r in self.runs}),
            "total_mj": total_mj,
            "shard_mj": shard_mj,
            "overhead_mj": None if total_mj is None or shard_mj is None else total_mj - shard_mj,
            "measured_mj": {c: measured[c] for c in (*SEGMENT_CLASSES, "off") if self.runs and c in measured},
            "segments": len(entries),
            "segments_not_measured": int((entries.total_mj == MISSING).sum()),
            "counter_resets": len(self.runs)
            - len({(r.boot_id, r.domain, r.epoch // BOOK_EPOCHS) for r in self.runs}),
            "estimate_total_mj": sum_or_none(estimates.values()),
            "estimate_mj": {c: estimates[c] for c in SEGMENT_CLASSES if c in estimates},
        }


def _sum_or_none(mj: np.ndarray) -> int | None:
    """The sum, or None where a part is missing or there are none."""
    return int(mj.sum()) if len(mj) and (mj != MISSING).all() else None


def build_ledger(
    segments: Iterable[Segment],
    winners: Mapping[int, str] | Winners | None = None,
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
    account, unclosed = account_gaps(_chains(packed, recorded), environments or {}, closings or {})
    packed.extend(gap.segment for gap in account)
    order = packed.in_order(np.concatenate([recorded, np.arange(len(packed) - len(account), len(packed))]))
    domains = _domains(packed, order, devices or {})
    _drop_refused_books(packed, order)
    place = np.empty(len(packed), np.int64)
    place[order] = np.arange(len(order))
    unknown: dict[str, list[int]] = defaultdict(list)  # by domain: entries of which it cannot be known
    for number, gap in enumerate(account, len(packed) - len(account)):
        for domain in gap.unknown:
            unknown[domain].append(int(place[number]))

    entries = Entries(packed, order, domains, winners)
    gaps: list[LedgerGap] = []
    runs: list[LedgerRun] = []
    for scale, domain, at in entries.counters():
        claims = entries.claims(at, scale, domain)
        claims.closed[np.isin(at, unknown.get(domain, ()))] = False
        split = split_counter(claims)
        gaps.extend(
            LedgerGap(*scale, domain, u.t_open_ns, u.t_close_ns, u.segment_class, u.energy_mj)
            for u in split.unclaimed
        )
        runs.extend(LedgerRun(*scale, domain, run) for run in split.runs)
        entries.set_shares(at, domain, split.shares)
        covered = split.covers(claims.t_open_ns, claims.t_close_ns) & entries.on_one_scale(at, domain)
        entries.lost[at[(split.shares == MISSING) & ~covered]] = True
    for places in unknown.values():
        entries.lost[places] = True
    entries.close_shares()
    unread = {w: names for w, names in entries.unread.items() if names}
    return Ledger(entries, tuple(gaps), tuple(runs), unread, unclosed)


class Entries(Sequence[LedgerEntry]):
    """The entries of a ledger as columns; `LedgerEntry` objects are made when they are looked at.

    Of n entries: `number` is the segment's in `segments`; `worker`, `segment_class` are places in `names` and
    `class_names`; `open` and `close` are numbers of reads in `columns`; the domains of entry i have their shares in
    `shares[first[i] : first[i + 1]]`, `MISSING` where they cannot be known. `total_mj` is `MISSING` unless all are known.

    Args:
        segments: those of the ledger, and maybe others.
        number: which, in order of time.
        domains: per worker what it ever read, and what of its own devices it never did.
        winners: as in `build_ledger`.
    """

    def __init__(
        self,
        segments: PackedSegments,
        number: np.ndarray,
        domains: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]],
        winners: Mapping[int, str] | Winners | None,
    ) -> None:
        self.segments, self.number = segments, number
        self.columns = columns = segments.columns()
        self.names = columns.names
        self.worker, self.shard = columns.worker[number], columns.shard[number]
        self.open, self.close = columns.open[number], columns.close[number]
        self.class_names, self.segment_class = self._classes(winners)
        self.unread = {worker: unread for worker, (_, unread) in domains.items()}
        self.domains_of = {
            worker: tuple(sorted({*read, *unread})) for worker, (read, unread) in domains.items()
        }
        self.domain_names = sorted({d for names in self.domains_of.values() for d in names})
        self._epochs = {True: columns.epochs_of_wrapping(), False: columns.epoch}
        self._domain_table = self._domains_by_worker()
        widths = (self._domain_table >= 0).sum(axis=1)[self.worker] if len(number) else np.zeros(0, np.int64)
        self.first = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        self.shares = np.full(self.first[-1], MISSING, np.int64)
        self.lost = widths == 0
        self.total_mj = self.known_mj = self._by_shard = np.zeros(0, np.int64)

    def _classes(self, winners: Mapping[int, str] | Winners | None) -> tuple[list[str], np.ndarray]:
        recorded = self.columns.segment_class[self.number]
        names = [*SEGMENT_CLASSES]
        codes = np.zeros(len(self.names), np.int8)
        for code in np.unique(recorded).tolist():
            if self.names[code] not in names:
                names.append(self.names[code])
            codes[code] = names.index(self.names[code])
        classes = codes[recorded] if len(recorded) else np.zeros(0, np.int8)
        if winners is not None:
            shards = np.flatnonzero(classes == names.index("shard"))
            won = Winners.of(winners).are(self.shard[shards], self.attempts(shards))
            classes[shards[~won]] = names.index("loser")
        return names, classes

    def _domains_by_worker(self) -> np.ndarray:
        """Places in `domain_names` of each worker's domains, by its place in `names`; filled up with -1."""
        most = max(map(len, self.domains_of.values()), default=0)
        table = np.full((len(self.names), most), -1, np.int32)
        places = {domain: place for place, domain in enumerate(self.domain_names)}
        numbers = {name: number for number, name in enumerate(self.names)}
        for worker, names in self.domains_of.items():
            table[numbers[worker], : len(names)] = [places[d] for d in names]
        return table

    # -- one counter at a time ---------------------------------------------------------------------------------------

    def counters(self) -> Iterator[tuple[tuple[str, int], str, np.ndarray]]:
        """Each scale (boot, epoch) and domain, in order, with the entries that begin or end there."""
        scales: list[tuple[str, int, bool, np.ndarray]] = []
        for wrapping, epoch in self._epochs.items():
            epochs, epoch_code = np.unique(epoch, return_inverse=True)
            code = self.columns.boot.astype(np.int64) * max(len(epochs), 1) + epoch_code
            opened, closed = code[self.open], code[self.close]
            moved = np.flatnonzero(opened != closed)
            codes = np.concatenate([opened, closed[moved]])
            places = np.concatenate([np.arange(len(opened)), moved])
            order = np.lexsort((places, codes))
            codes, places = codes[order], places[order]
            begins = np.flatnonzero(np.diff(codes, prepend=-1))
            for c, at in zip(codes[begins].tolist(), np.split(places, begins[1:]), strict=False):
                boot, epoch_number = divmod(c, len(epochs))
                scales.append((self.names[boot], int(epochs[epoch_number]), not wrapping, at))
        for boot_id, epoch_value, plain, at in sorted(scales, key=lambda scale: scale[:3]):
            places = np.unique(self._domain_table[np.unique(self.worker[at])])
            for place in places[places >= 0].tolist():
                domain = self.domain_names[place]
                if wraps(domain) != plain:
                    yield (boot_id, epoch_value), domain, at[self._position(at, domain) >= 0]

    def _position(self, at: np.ndarray, domain: str) -> np.ndarray:
        """Where `domain` stands among the domains of each entry's worker; -1: it is none of them."""
        place = bisect_left(self.domain_names, domain)
        matches = self._domain_table == place
        position = np.where(matches.any(axis=1), matches.argmax(axis=1), -1)
        return position[self.worker[at]]

    def claims(self, at: np.ndarray, scale: tuple[str, int], domain: str) -> Claims:
        """What the entries `at` claim of a counter on a scale they begin or end on; blind on either side of a reset."""
        columns, opened, closed = self.columns, self.open[at], self.close[at]
        boot, t_ns, epoch = columns.boot, columns.t_mono_ns, self._epochs[wraps(domain)]
        same = self.on_one_scale(at, domain)
        is_boot = np.array([name == scale[0] for name in self.names], bool)
        opens = is_boot[boot[opened]] & (epoch[opened] == scale[1])
        elsewhere = boot[opened] != boot[closed]
        t_open, t_close = t_ns[opened], t_ns[closed]
        open_mj, opened_at_all = self._readings(opened, domain)
        close_mj, closed_at_all = self._readings(closed, domain)
        return Claims(
            self.worker[at],
            np.where(elsewhere & ~opens, t_close, t_open),
            np.where(elsewhere & opens, t_open, t_close),
            open_mj,
            close_mj,
            opened_at_all & opens,
            closed_at_all & (same | ~opens),
        )

    def on_one_scale(self, at: np.ndarray, domain: str) -> np.ndarray:
        """Whether the reads of the entries `at` may be subtracted: bool, as `at`."""
        boot, epoch = self.columns.boot, self._epochs[wraps(domain)]
        opened, closed = self.open[at], self.close[at]
        return (boot[opened] == boot[closed]) & (epoch[opened] == epoch[closed])

    def _readings(self, reads: np.ndarray, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """The counter of `domain` at `reads`, and where it was read at all."""
        columns = self.columns
        places = [names.index(domain) if domain in names else -1 for names in columns.domain_sets]
        place = np.array(places, np.int64)[columns.domain_set[reads]]
        was_read = place >= 0
        mj = np.zeros(len(reads), np.int64)
        mj[was_read] = columns.energy_mj[columns.first[reads[was_read]] + place[was_read]]
        return mj, was_read

    def set_shares(self, at: np.ndarray, domain: str, shares: np.ndarray) -> None:
        """What the entries `at` used of `domain`."""
        self.shares[self.first[at] + self._position(at, domain)] = shares

    def close_shares(self) -> None:
        """All shares are set: add them up."""
        known = self.shares != MISSING
        up_to = np.concatenate([[0], np.cumsum(np.where(known, self.shares, 0))])
        unknown = np.concatenate([[0], np.cumsum(~known)])
        self.known_mj = up_to[self.first[1:]] - up_to[self.first[:-1]]
        whole = (unknown[self.first[1:]] == unknown[self.first[:-1]]) & (self.first[1:] > self.first[:-1])
        self.total_mj = np.where(whole, self.known_mj, MISSING)
        shards = self.of_class("shard")
        shards = shards[self.shard[shards] != NONE]
        self._by_shard = shards[np.argsort(self.shard[shards], kind="stable")]

    def readings(self, scale: tuple[str, int], domain: str) -> list[tuple[int, int]]:
        """The (time ns, counter mJ) readings of a counter on a scale (boot, epoch), in order, each once."""
        reads = np.unique(np.concatenate([self.open, self.close]))
        boot, epoch = self.columns.boot[reads], self._epochs[wraps(domain)][reads]
        is_boot = np.array([name == scale[0] for name in self.names], bool)
        reads = reads[is_boot[boot] & (epoch == scale[1])]
        mj, was_read = self._readings(reads, domain)
        t_ns = self.columns.t_mono_ns[reads[was_read]]
        return sorted(set(zip(t_ns.tolist(), mj[was_read].tolist(), strict=True)))

    # -- what readers of a whole ledger need -------------------------------------------------------------------------

    def attempts(self, at: np.ndarray) -> pa.Array:
        """The attempt ids of the entries `at`."""
        return self.columns.attempt.take(pa.array(self.number[at]))

    def shard_energies(self, shard_ids: np.ndarray, attempt_ids: pa.Array) -> np.ndarray:
        """Direct energy of each attempt's shard; `MISSING` where it was not measured in full."""
        shards = self.shard[self._by_shard]
        begin, end = (np.searchsorted(shards, shard_ids, side) for side in ("left", "right"))
        found = np.full(len(shard_ids), MISSING, np.int64)
        one = np.flatnonzero(end - begin == 1)
        entry = self._by_shard[begin[one]]
        same = pc.equal(self.attempts(entry), attempt_ids.take(pa.array(one))).fill_null(False)
        found[one] = np.where(same.to_numpy(zero_copy_only=False), self.total_mj[entry], MISSING)
        for i in np.flatnonzero(end - begin > 1).tolist():
            entries = self._by_shard[begin[i] : end[i]]
            mine = self.total_mj[
                entries[[a == attempt_ids[i].as_py() for a in self.attempts(entries).to_pylist()]]
            ]
            found[i] = mine.sum() if len(mine) and (mine != MISSING).all() else MISSING
        return found

    def of_class(self, name: str) -> np.ndarray:
        """Numbers of the entries of a class."""
        return np.flatnonzero(self.segment_class == self.class_names.index(name))

    def domain_codes(self, begin: int, end: int) -> np.ndarray:
        """Places in `domain_names` of the domains of the entries from `begin` to `end`, one after the other."""
        codes = self._domain_table[self.worker[begin:end]].ravel()
        return codes[codes >= 0]

    def epoch_of(self, reads: np.ndarray, domain_codes: np.ndarray) -> np.ndarray:
        """`CounterRead.epoch_of` of each read and domain."""
        wrapping = np.array([wraps(d) for d in self.domain_names] or [False], bool)
        return np.where(wrapping[domain_codes], self._epochs[True][reads], self._epochs[False][reads])

    def estimates(self) -> np.ndarray:
        """`segment_estimate_mj` of each entry; `NONE` where there is none."""
        columns = self.columns
        before, after = columns.estimate_mj[self.open], columns.estimate_mj[self.close]
        known = (before != NONE) & (after >= before) & (columns.boot[self.open] == columns.boot[self.close])
        return np.where(known, after - before, NONE)

    # -- one entry at a time -----------------------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, number: int) -> LedgerEntry: ...
    @overload
    def __getitem__(self, number: slice) -> list[LedgerEntry]: ...
    def __getitem__(self, number: int | slice) -> LedgerEntry | list[LedgerEntry]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        shares = self.shares[self.first[number] : self.first[number + 1]].tolist()
        domains = self.domains_of[self.names[self.worker[number]]]
        return LedgerEntry(
            self.segments[int(self.number[number])],
            self.class_names[self.segment_class[number]],
            {d: None if mj == MISSING else mj for d, mj in zip(domains, shares, strict=True)},
            bool(self.lost[number]),
        )


@dataclass(frozen=True)
class Winners:
    """The committed attempt of each shard: `shard_ids` in order, `attempt_ids` beside them."""

    shard_ids: np.ndarray
    attempt_ids: pa.Array

    @staticmethod
    def of(winners: Mapping[int, str] | Winners) -> Winners:
        if isinstance(winners, Winners):
            return winners
        ids = sorted(winners)
        return Winners(np.array(ids, np.int64), pa.array([winners[i] for i in ids], pa.string()))

    def are(self, shard_ids: np.ndarray, attempt_ids: pa.Array) -> np.ndarray:
        """Whether each is the committed attempt of its shard: bool, as `shard_ids`."""
        if not len(self.shard_ids):
            return np.zeros(len(shard_ids), bool)
        at = np.minimum(np.searchsorted(self.shard_ids, shard_ids), len(self.shard_ids) - 1)
        same = pc.equal(attempt_ids, self.attempt_ids.take(pa.array(at))).fill_null(False)
        return (self.shard_ids[at] == shard_ids) & same.to_numpy(zero_copy_only=False)


def _deduplicate(packed: PackedSegments) -> np.ndarray:
    """Numbers of one segment per worker and stretch of time, in order of time.

    A stretch that was first part of a shard and then reported again as waste stays with the shard: it is reported
    again only by a worker that could not know that its commit had succeeded.
    """
    preference = {c: i for i, c in enumerate(("shard", *SEGMENT_CLASSES))}

    def rank(number: int) -> tuple[int, int, str]:
        s = packed[number]
        return preference[s.segment_class], -1 if s.shard_id is None else s.shard_id, s.attempt_id or ""

    order, begins = packed.stretches()
    chosen = order[begins]
    lengths = np.diff(begins, append=len(order))
    for stretch in np.flatnonzero(lengths > 1).tolist():
        same = order[begins[stretch] : begins[stretch] + lengths[stretch]].tolist()
        chosen[stretch] = min(same, key=rank)
    return chosen


def _chains(packed: PackedSegments, numbers: np.ndarray) -> dict[str, Chain]:
    """What each worker recorded; `numbers` are of segments in order of time."""
    columns = packed.columns()
    worker, opened, closed = (c[numbers] for c in (columns.worker, columns.open, columns.close))
    by_worker = np.argsort(worker, kind="stable")
    chains: dict[str, Chain] = {}
    for mine in np.split(by_worker, np.flatnonzero(np.diff(worker[by_worker])) + 1) if len(numbers) else ():
        reads = np.concatenate([opened[mine], closed[mine]])
        begin_ns, end_ns = columns.t_mono_ns[opened[mine]], columns.t_mono_ns[closed[mine]]
        first = packed[int(numbers[mine[0]])]
        chain = chains[first.worker_id] = Chain(first.open, first.close)
        for domain_set in np.unique(columns.domain_set[reads]).tolist():
            chain.domains.update(columns.domain_sets[domain_set])
        if (
            len(np.unique(columns.boot[reads])) > 1
        ):  # nothing a worker can do; but whatever stands there is read
            for n in mine[1:].tolist():
                chain.add(packed[int(numbers[n])])
            continue
        reach = np.maximum.accumulate(end_ns)
        latest = np.maximum.accumulate(np.where(end_ns == reach, np.arange(len(mine)), 0))
        for n in (np.flatnonzero(begin_ns[1:] > reach[:-1]) + 1).tolist():
            before, after = closed[mine[latest[n - 1]]], opened[mine[n]]
            chain.holes.append((packed.read(int(before)), packed.read(int(after))))
        chain.last = packed.read(int(closed[mine[latest[-1]]]))
    return chains


@dataclass(frozen=True)
class _Span:
    """From when to when a book followed wrapping counters of a boot (CLOCK_MONOTONIC), and its first `wrap_epoch`."""

    boot_id: str
    first_ns: int
    last_ns: int
    wrap_epoch: int

    def overlaps(self, other: _Span) -> bool:
        return self.first_ns <= other.last_ns and other.first_ns <= self.last_ns


def _drop_refused_books(packed: PackedSegments, numbers: np.ndarray) -> None:
    """Take the wrapping counters out of reads of a book that a longer book of the same boot followed at the same time.

    Both together would count a package twice. It is then as if their workers could not read them.
    """
    columns = packed.columns()
    reads = np.unique(np.concatenate([columns.open[numbers], columns.close[numbers]]))
    wrapping = np.array([any(map(wraps, names)) for names in columns.domain_sets], bool)
    book = np.where(columns.wrap_epoch == NONE, NONE, columns.wrap_epoch // BOOK_EPOCHS)[reads]
    key = columns.boot[reads].astype(np.int64) * (BOOK_NUMBERS + 2) + book + 1
    spans: dict[int, _Span] = {}
    for k in np.unique(key[wrapping[columns.domain_set[reads]]]).tolist() if len(reads) else ():
        mine = reads[(key == k) & wrapping[columns.domain_set[reads]]]
        t_ns = columns.t_mono_ns[mine]
        first = columns.wrap_epoch[mine[np.argmin(t_ns)]]
        boot = columns.names[columns.boot[mine[0]]]
        spans[k] = _Span(boot, int(t_ns.min()), int(t_ns.max()), int(first))
    for k, wrap_epoch in _refused_books(spans).items():
        packed.drop_wrapping_counters(reads[key == k].tolist(), wrap_epoch)


def _refused_books(spans: Mapping[int, _Span]) -> dict[int, int]:
    """Books that a longer book of the same boot followed at the same time, with its `wrap_epoch`."""
    kept: dict[str, list[_Span]] = defaultdict(list)
    refused: dict[int, int] = {}
    for book, span in sorted(spans.items(), key=lambda s: (s[1].first_ns - s[1].last_ns, s[1].boot_id, s[0])):
        longer = next((other for other in kept[span.boot_id] if other.overlaps(span)), None)
        if longer is None:
            kept[span.boot_id].append(span)
        else:
            refused[book] = longer.wrap_epoch
    return refused


def _domains(
    packed: PackedSegments, numbers: np.ndarray, devices: Mapping[str, Sequence[str]]
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Per worker what it ever read, and what of its own devices it never read though it read others."""
    columns = packed.columns()
    found: dict[str, set[str]] = defaultdict(set)
    for reads in (columns.open, columns.close):
        key = (
            columns.worker[numbers].astype(np.int64) * len(columns.domain_sets)
            + columns.domain_set[reads[numbers]]
        )
        for worker, domain_set in (divmod(k, len(columns.domain_sets)) for k in np.unique(key).tolist()):
            found[columns.names[worker]].update(columns.domain_sets[domain_set])
    return {
        worker: (tuple(names), unread_domains(devices.get(worker, ()), names) if names else ())
        for worker, names in found.items()
    }
