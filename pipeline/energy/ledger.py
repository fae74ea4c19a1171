"""The energy ledger: from the segments that workers recorded to who used what, to the millijoule.

`build_ledger` takes the segments of all commits and drivers, in any order, possibly twice, and what is known of when each
worker's account of its devices began and ended (`account_gaps`). It makes one entry per segment and per stretch of an
account that nobody recorded, gaps for the energy nobody can be charged with, and totals. For every counter (boot, epoch,
domain) entries and gaps add up to its last reading minus its first, exactly:

    C1   sum(segments) + sum(gaps) = sum over runs of (last reading - first reading)    per boot, epoch and domain
    C2   sum(direct of accepted images) + overhead = sum(segments) + sum(gaps)

A missing measurement is None, and so is every sum it belongs to; a worker's own device whose counter nobody could read
is missing, whatever else the worker read. Estimates have columns of their own. Nothing here does I/O.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa

from millijoule.pipeline.energy.account_gaps import Chain, Unclosed, account_gaps
from millijoule.pipeline.energy.commit_table import AttemptIndex
from millijoule.pipeline.energy.counter_split import (
    MISSING,
    Claims,
    Run,
    Unclaimed,
    split_counter,
    sum_or_none,
)
from millijoule.pipeline.energy.packed import NONE, Packed, padded
from millijoule.pipeline.energy.packed_segments import PackedSegments
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
    """What one segment used, in millijoules by domain; None where it cannot be known.

    `energy_mj` has every domain the worker ever read, and those of its own devices that it never read. `lost`: some of the
    segment's energy is nowhere in the ledger, not even in a gap.
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


@dataclass(frozen=True)
class LedgerGap(Unclaimed):
    """Counted energy outside every usable segment; times are CLOCK_MONOTONIC of `boot_id`."""

    boot_id: str
    epoch: int
    domain: str


@dataclass(frozen=True)
class LedgerRun(Run):
    """A stretch of one counter without a reset; what the ledger divides is its growth."""

    boot_id: str
    epoch: int
    domain: str


@dataclass(frozen=True)
class Ledger:
    """All entries in order of time, and the energy that is in none of them.

    `unread` has, by worker, the domains of its own devices that it never read though it read others.
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

    def series(self, runs: Iterable[LedgerRun]) -> Iterator[tuple[LedgerRun, np.ndarray]]:
        """`runs`, in their order, with all readings of each: see `Entries.readings`."""
        for (boot_id, epoch, domain), of_counter in groupby(runs, lambda r: (r.boot_id, r.epoch, r.domain)):
            readings = self.entries.readings((boot_id, epoch), domain)
            t_ns, mj = readings[:, 0], readings[:, 1]
            for run in of_counter:
                first, last = run.first, run.last
                begun = (t_ns > first.t_ns) | ((t_ns == first.t_ns) & (mj >= first.energy_mj))
                ended = (t_ns > last.t_ns) | ((t_ns == last.t_ns) & (mj > last.energy_mj))
                yield run, readings[begun & ~ended]

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
            estimates[name] = sum_of_known(estimate_mj[mine])
        for gap in self.gaps:
            measured[gap.segment_class] += gap.energy_mj
        shard_mj = sum_of_known(entries.total_mj[entries.segment_class == entries.class_names.index("shard")])
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


def sum_of_known(mj: np.ndarray) -> int | None:
    """The sum, or None where a part is missing or there are none."""
    return int(mj.sum()) if len(mj) and (mj != MISSING).all() else None


def build_ledger(
    segments: Iterable[Segment],
    winners: Mapping[int, str] | AttemptIndex | None = None,
    devices: Mapping[str, Sequence[str]] | None = None,
    environments: Mapping[str, WorkerEnvironment] | None = None,
    closings: Mapping[str, WorkerClosing] | None = None,
) -> Ledger:
    """The ledger over `segments` and what lies between them.

    Workers that used a counter at the same time share its growth equally (`split_counter`). A segment that was reported
    twice counts once. Where two books followed a wrapping counter at the same time (containers that do not share theirs),
    the longer one counts, and the shares of the other one's workers are not known: both would count the package twice.

    Args:
        segments: in any order. `PackedSegments` are taken over: gaps are added to them.
        winners: attempt of each committed shard; a "shard" segment of another attempt is booked as "loser". None: all
            keep their class.
        devices: what each worker held, by worker id (UUIDs of GPUs, or "cpu"), as far as known.
        environments: of the workers, by worker id; one that states an opening read owes an account.
        closings: how these accounts ended, by worker id.
    """
    packed = segments if isinstance(segments, PackedSegments) else PackedSegments(segments)
    recorded = _deduplicate(packed)
    chains = _chains(packed, recorded)
    account, unclosed = account_gaps(chains, environments or {}, closings or {})
    packed.extend(gap.segment for gap in account)
    order = packed.in_order(np.concatenate([recorded, np.arange(len(packed) - len(account), len(packed))]))
    unread = {
        worker: unread_domains((devices or {}).get(worker, ()), chain.domains) if chain.domains else ()
        for worker, chain in chains.items()
    }
    _drop_refused_books(packed, order)
    place = np.empty(len(packed), np.int64)
    place[order] = np.arange(len(order))
    unknown: dict[str, list[int]] = defaultdict(list)  # by domain: entries of which it cannot be known
    for number, gap in enumerate(account, len(packed) - len(account)):
        for domain in gap.unknown:
            unknown[domain].append(int(place[number]))

    domains_of = {worker: tuple(sorted({*c.domains, *unread[worker]})) for worker, c in chains.items()}
    entries = Entries(packed, order, domains_of, winners)
    gaps: list[LedgerGap] = []
    runs: list[LedgerRun] = []
    for scale, domain, at in entries.counters():
        claims = entries.claims(at, scale, domain)
        claims.closed[np.isin(at, unknown.get(domain, ()))] = False
        split = split_counter(claims)
        gaps.extend(
            LedgerGap(u.t_open_ns, u.t_close_ns, u.segment_class, u.energy_mj, *scale, domain)
            for u in split.unclaimed
        )
        runs.extend(LedgerRun(run.first, run.last, *scale, domain) for run in split.runs)
        entries.set_shares(at, domain, split.shares)
        covered = split.covers(claims.t_open_ns, claims.t_close_ns) & entries.on_one_scale(at, domain)
        entries.lost[at[(split.shares == MISSING) & ~covered]] = True
    for places in unknown.values():
        entries.lost[places] = True
    entries.close_shares()
    unread = {worker: names for worker, names in unread.items() if names}
    return Ledger(entries, tuple(gaps), tuple(runs), unread, unclosed)


class Entries(Packed[LedgerEntry]):
    """The entries of a ledger as columns `[n]`.

    `number` is the segment's in `segments`; `worker` and `segment_class` are places in `names` and `class_names`; `open` and
    `close` are numbers of reads in `columns`. `shares[first[i] : first[i + 1]]` are the millijoules of entry i, one per
    domain in `domains_of` its worker; they and `total_mj` are `MISSING` where they cannot be known.
    """

    def __init__(
        self,
        segments: PackedSegments,
        number: np.ndarray,
        domains_of: Mapping[str, tuple[str, ...]],
        winners: Mapping[int, str] | AttemptIndex | None,
    ) -> None:
        self.segments, self.number = segments, number
        self.columns = columns = segments.columns()
        self.names = columns.names
        self.worker, self.shard = columns.worker[number], columns.shard[number]
        self.open, self.close = columns.open[number], columns.close[number]
        self.class_names, self.segment_class = self._classes(winners)
        self.domains_of = domains_of
        self.domain_names = sorted({d for names in self.domains_of.values() for d in names})
        self._epochs = {True: columns.epochs_of_wrapping(), False: columns.epoch}
        places = {domain: place for place, domain in enumerate(self.domain_names)}
        # [names, most domains]: places in `domain_names` of each worker's domains
        self._domain_table = padded([[places[d] for d in domains_of.get(name, ())] for name in self.names])
        widths = (self._domain_table >= 0).sum(axis=1)[self.worker] if len(number) else np.zeros(0, np.int64)
        self.first = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        self.shares = np.full(self.first[-1], MISSING, np.int64)
        self.lost = widths == 0
        self.total_mj = self.known_mj = np.zeros(0, np.int64)

    def _classes(self, winners: Mapping[int, str] | AttemptIndex | None) -> tuple[list[str], np.ndarray]:
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
            won = winners if isinstance(winners, AttemptIndex) else AttemptIndex.of(winners)
            lost = won.find(self.shard[shards], self.attempts(shards)) < 0
            classes[shards[lost]] = names.index("loser")
        return names, classes

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

    def readings(self, scale: tuple[str, int], domain: str) -> np.ndarray:
        """All readings of a counter on a scale (boot, epoch), in order: time ns, counter mJ, latency ns; int64 `[n, 3]`.

        What several workers read at one time stands there once, with the longest latency.
        """
        columns = self.columns
        reads = np.unique(np.concatenate([self.open, self.close]))
        is_boot = np.array([name == scale[0] for name in self.names], bool)
        reads = reads[is_boot[columns.boot[reads]] & (self._epochs[wraps(domain)][reads] == scale[1])]
        mj, was_read = self._readings(reads, domain)
        reads, mj = reads[was_read], mj[was_read]
        t_ns, latency_ns = columns.t_mono_ns[reads], columns.latency_ns[reads]
        found = np.stack([t_ns, mj, latency_ns], axis=1)[np.lexsort((latency_ns, mj, t_ns))]
        is_last = np.ones(len(found), bool)
        is_last[:-1] = (found[1:, :2] != found[:-1, :2]).any(axis=1)
        return found[is_last]

    # -- what readers of a whole ledger need -------------------------------------------------------------------------

    def attempts(self, at: np.ndarray) -> pa.Array:
        """The attempt ids of the entries `at`."""
        return self.columns.attempt.take(pa.array(self.number[at]))

    def shards_of(self, attempts: AttemptIndex) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the "shard" entries, and the place of each one's attempt, -1 where it is none of them."""
        shards = self.of_class("shard")
        return shards, attempts.find(self.shard[shards], self.attempts(shards))

    def shard_energies(self, attempts: AttemptIndex) -> np.ndarray:
        """Direct energy of each attempt's shard, int64 `[n]`; `MISSING` where it was not measured in full."""
        shards, place = self.shards_of(attempts)
        shards, place = shards[place >= 0], place[place >= 0]
        energy_mj = np.zeros(len(attempts), np.int64)
        np.add.at(energy_mj, place, self.total_mj[shards])
        is_known = np.bincount(place, minlength=len(attempts)) > 0
        is_known[place[self.total_mj[shards] == MISSING]] = False
        return np.where(is_known, energy_mj, MISSING)

    def clocks(self) -> dict[str, tuple[int, int, int]]:
        """Per boot, wall clock minus monotonic clock in ns: at the first read, the least, and the most."""
        reads = np.stack([self.open, self.close], axis=1).ravel()
        offset = (self.columns.t_wall_ns - self.columns.t_mono_ns)[reads]
        boots, first, place = np.unique(self.columns.boot[reads], return_index=True, return_inverse=True)
        least, most = offset[first], offset[first]
        np.minimum.at(least, place, offset)
        np.maximum.at(most, place, offset)
        values = np.stack([offset[first], least, most], axis=1).tolist()
        return {self.names[b]: (f, lo, hi) for b, (f, lo, hi) in zip(boots.tolist(), values, strict=True)}

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

    def __len__(self) -> int:
        return len(self.number)

    def make(self, number: int) -> LedgerEntry:
        """Entry `number`."""
        shares = self.shares[self.first[number] : self.first[number + 1]].tolist()
        domains = self.domains_of[self.names[self.worker[number]]]
        return LedgerEntry(
            self.segments[int(self.number[number])],
            self.class_names[self.segment_class[number]],
            {d: None if mj == MISSING else mj for d, mj in zip(domains, shares, strict=True)},
            bool(self.lost[number]),
        )


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
    """What each worker recorded; `numbers` are of segments in order of boot and time."""
    c = packed.columns()
    worker, opened, closed = (column[numbers] for column in (c.worker, c.open, c.close))
    boot = c.boot[opened]
    order = np.argsort(worker, kind="stable")
    ends = np.flatnonzero((np.diff(worker[order]) != 0) | (np.diff(boot[order]) != 0)) + 1
    chains: dict[str, Chain] = {}
    for mine in np.split(order, ends) if len(numbers) else ():
        opens, closes = opened[mine], closed[mine]
        first = packed.read(int(opens[0]))
        chain = chains.setdefault(c.names[worker[mine[0]]], Chain(first, first))
        for domain_set in np.unique(c.domain_set[np.concatenate([opens, closes])]).tolist():
            chain.domains.update(c.domain_sets[domain_set])
        end_ns = c.t_mono_ns[closes]
        reach = np.maximum.accumulate(end_ns)
        latest = closes[np.maximum.accumulate(np.where(end_ns == reach, np.arange(len(mine)), 0))]
        for n in (np.flatnonzero(c.t_mono_ns[opens][1:] > reach[:-1]) + 1).tolist():
            chain.holes.append((packed.read(int(latest[n - 1])), packed.read(int(opens[n]))))
        chain.last = packed.read(int(latest[-1]))
    return chains


def _drop_refused_books(packed: PackedSegments, numbers: np.ndarray) -> None:
    """Take the wrapping counters out of reads of a book that a longer book of the same boot followed at the same time.

    Both together would count a package twice. It is then as if their workers could not read them.
    """
    c = packed.columns()
    reads = np.unique(np.concatenate([c.open[numbers], c.close[numbers]]))
    wrapping = np.array([any(map(wraps, names)) for names in c.domain_sets], bool)
    book = np.where(c.wrap_epoch == NONE, NONE, c.wrap_epoch // BOOK_EPOCHS)[reads]
    key = c.boot[reads].astype(np.int64) * (BOOK_NUMBERS + 2) + book + 1
    has_wrapping = wrapping[c.domain_set[reads]] if len(reads) else np.zeros(0, bool)
    spans = []  # from when to when each book was followed, and its first epoch
    for k in np.unique(key[has_wrapping]).tolist():
        mine = reads[(key == k) & has_wrapping]
        t_ns = c.t_mono_ns[mine]
        boot_id, epoch = c.names[c.boot[mine[0]]], c.wrap_epoch[mine[t_ns.argmin()]]
        spans.append((boot_id, k, int(t_ns.min()), int(t_ns.max()), int(epoch)))
    kept: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for boot_id, k, first_ns, last_ns, epoch in sorted(spans, key=lambda s: (s[2] - s[3], s[0], s[1])):
        longer = next((b for b in kept[boot_id] if b[0] <= last_ns and first_ns <= b[1]), None)
        if longer is None:
            kept[boot_id].append((first_ns, last_ns, epoch))
        else:
            packed.drop_wrapping_counters(reads[key == k].tolist(), longer[2])
