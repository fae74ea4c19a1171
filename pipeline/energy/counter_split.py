"""Divide one counter's growth among the workers that shared the device, exactly, as columns of numbers.

The reads of all workers, in order, cut time into intervals. The counter's growth in an interval is divided equally among
the workers in it (which is their Shapley value); the first of them have 1 mJ more where it does not come out even.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from millijoule.pipeline.energy.intervals import merged
from millijoule.workers.meters.counter_book import MAX_DOMAIN_WATTS, POWER_SLACK_S

#: An unclaimed stretch longer than this is not a pause of the job but the time between two runs of it. A worker that
#: dies takes the record of at most one shard with it, which is minutes.
MAX_GAP_NS = 30 * 60 * 1_000_000_000

#: Stands for a share that cannot be known; no share is negative.
MISSING = -1

#: Pairs of an interval and a worker in it that are looked at together: some tens of megabytes.
PAIRS = 1 << 19

_NS_MW_PER_MJ = 1_000_000 // MAX_DOMAIN_WATTS
assert _NS_MW_PER_MJ * MAX_DOMAIN_WATTS == 1_000_000


def sum_or_none(parts: Iterable[int | None]) -> int | None:
    """The sum, or None where a part is missing or there are none: a part of the energy is not the energy."""
    known = list(parts)
    return None if not known or None in known else sum(p for p in known if p is not None)


class Reading(NamedTuple):
    """A counter's value `energy_mj` at `t_ns`."""

    t_ns: int
    energy_mj: int


@dataclass(frozen=True)
class Run:
    """A stretch in which one counter's readings follow each other plausibly: its growth is what is divided."""

    first: Reading
    last: Reading

    @property
    def energy_mj(self) -> int:
        return self.last.energy_mj - self.first.energy_mj


@dataclass(frozen=True)
class Unclaimed:
    """Counted energy that no segment can have. `segment_class` is "gap", or "off" between two runs of a job."""

    t_open_ns: int
    t_close_ns: int
    segment_class: str
    energy_mj: int


@dataclass(frozen=True)
class Claims:
    """Workers were busy on one counter from `t_open_ns` to `t_close_ns`, each column `[n]`.

    `worker` is any number that tells workers apart. `open_mj` is the counter at `t_open_ns`, `close_mj` at `t_close_ns`;
    they count where `opened` and `closed`: elsewhere the worker could not read.
    """

    worker: np.ndarray
    t_open_ns: np.ndarray
    t_close_ns: np.ndarray
    open_mj: np.ndarray
    close_mj: np.ndarray
    opened: np.ndarray
    closed: np.ndarray

    def __len__(self) -> int:
        return len(self.worker)


@dataclass(frozen=True)
class Split:
    """`shares[i]` belongs to claim i, `MISSING` where it cannot be known: int64 `[n]`.

    The known shares and `unclaimed` add up to the growth over `runs`, exactly.
    """

    shares: np.ndarray
    unclaimed: list[Unclaimed]
    runs: list[Run]

    def covers(self, t_open_ns: np.ndarray, t_close_ns: np.ndarray) -> np.ndarray:
        """Whether all energy used in each stretch is somewhere in `shares` and `unclaimed`: bool, as the stretches."""
        if not self.runs:
            return np.zeros(len(t_open_ns), bool)
        first = np.array([run.first.t_ns for run in self.runs], np.int64)
        last = np.array([run.last.t_ns for run in self.runs], np.int64)
        run = np.searchsorted(first, t_open_ns, "right") - 1
        return (run >= 0) & (last[run] >= t_close_ns)


@dataclass(frozen=True)
class _Readings:
    """The distinct readings of a counter in order: times and values `[m]`, and what happened between two: `[m - 1]`."""

    t_ns: np.ndarray
    mj: np.ndarray
    growth_mj: np.ndarray
    is_break: np.ndarray  # reset or misread in between; the growth is 0
    breaks_before: np.ndarray  # of each reading


def split_counter(claims: Claims) -> Split:
    """Divide one counter's growth among the claims on it.

    A claim that lacks a reading, or that spans a reset or a misread, gets `MISSING`: its worker's equal part of the
    intervals around it is booked as "gap".
    """
    readings, opened_at, closed_at = _in_order(claims)
    intervals = len(readings.growth_mj)
    known = claims.opened & claims.closed
    before = readings.breaks_before
    begun, ended = opened_at[known], closed_at[known]
    known[known] = (begun <= ended) & (before[begun] == before[ended])
    # where a worker could not read, the intervals around the times it states
    blind = ~known
    first, end = opened_at, closed_at
    first[blind] = np.searchsorted(readings.t_ns, claims.t_open_ns[blind], "right") - 1
    end[blind] = np.searchsorted(readings.t_ns, claims.t_close_ns[blind], "left")
    np.maximum(first, 0, out=first)
    np.minimum(end, intervals, out=end)

    shares = np.where(known, 0, MISSING).astype(np.int64)
    at_work = np.flatnonzero(known & (first < end))
    first_w, end_w = first[at_work], end[at_work]
    active = _covering(first_w, end_w, intervals)
    n_blind = _blind_workers(claims.worker, first, end, np.flatnonzero(blind & (first < end)), intervals)
    base, rest = np.divmod(readings.growth_mj, np.maximum(active + n_blind, 1))
    up_to = np.concatenate([[0], np.cumsum(base)])
    mine = up_to[end_w] - up_to[first_w]
    for lo, hi in _chunks(active, rest):
        mine += _remainders(first_w, end_w, rest, lo, hi)
    shares[at_work] = mine

    nobodys = np.where(
        active + n_blind == 0,
        readings.growth_mj,
        readings.growth_mj - base * active - np.minimum(rest, active),
    )
    idle = (active == 0) & (n_blind == 0)
    return Split(shares, list(_unclaimed(readings.t_ns, nobodys, idle)), _runs(readings))


def _in_order(claims: Claims) -> tuple[_Readings, np.ndarray, np.ndarray]:
    """The readings, and where each claim's opening and closing one stand among them (any number where there is none)."""
    t_ns = np.concatenate([claims.t_open_ns[claims.opened], claims.t_close_ns[claims.closed]])
    mj = np.concatenate([claims.open_mj[claims.opened], claims.close_mj[claims.closed]])
    order = np.lexsort((mj, t_ns))
    t_ns, mj = t_ns[order], mj[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (t_ns[1:] != t_ns[:-1]) | (mj[1:] != mj[:-1])
    place = np.empty(len(order), np.int64)
    place[order] = np.cumsum(is_new) - 1
    n_opened = int(claims.opened.sum())
    opened_at, closed_at = np.zeros(len(claims), np.int64), np.zeros(len(claims), np.int64)
    opened_at[claims.opened], closed_at[claims.closed] = place[:n_opened], place[n_opened:]
    t_ns, mj = t_ns[is_new], mj[is_new]
    growth_mj, elapsed_ns = np.diff(mj), np.diff(t_ns)
    # as `is_plausible`, without numbers beyond 64 bits
    most_mj = (elapsed_ns + POWER_SLACK_S * 1_000_000_000) // _NS_MW_PER_MJ
    is_break = (growth_mj < 0) | (growth_mj > most_mj)
    growth_mj[is_break] = 0
    breaks_before = np.concatenate([[0], np.cumsum(is_break)])
    return _Readings(t_ns, mj, growth_mj, is_break, breaks_before), opened_at, closed_at


def _covering(first: np.ndarray, end: np.ndarray, intervals: int) -> np.ndarray:
    """How many of the ranges [first, end) cover each interval."""
    steps = np.bincount(first, minlength=intervals + 1) - np.bincount(end, minlength=intervals + 1)
    return np.cumsum(steps)[:intervals]


def _blind_workers(
    worker: np.ndarray, first: np.ndarray, end: np.ndarray, claims: np.ndarray, intervals: int
) -> np.ndarray:
    """How many workers that could not read were at work in each interval; a worker's claims may overlap."""
    ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for w, a, b in zip(*(column[claims].tolist() for column in (worker, first, end)), strict=True):
        ranges[w].append((a, b))
    apart = [(a, b) for of_worker in ranges.values() for a, b in merged(of_worker)]
    firsts, ends = np.array(apart, np.int64).reshape(-1, 2).T
    return _covering(firsts, ends, intervals)


def _chunks(active: np.ndarray, rest: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of intervals that have about `PAIRS` workers at work; none where every interval comes out even."""
    if not rest.any():
        return
    pairs = np.cumsum(active)
    lo = 0
    while lo < len(active):
        done = pairs[lo - 1] if lo else 0
        hi = max(lo + 1, int(np.searchsorted(pairs, done + PAIRS, "right")))
        yield lo, hi
        lo = hi


def _remainders(first: np.ndarray, end: np.ndarray, rest: np.ndarray, lo: int, hi: int) -> np.ndarray:
    """What each claim gets of the millijoules left over in the intervals [lo, hi): one of each whose turn it is."""
    there = np.flatnonzero((first < hi) & (end > lo))
    begins = np.maximum(first[there], lo)
    lengths = np.minimum(end[there], hi) - begins
    claim = np.repeat(there, lengths)
    within = np.arange(len(claim)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    interval = np.repeat(begins, lengths) + within
    order = np.argsort(interval, kind="stable")  # claims of an interval stay in order
    interval, claim = interval[order], claim[order]
    turn = np.arange(len(interval)) - np.searchsorted(interval, interval, "left")
    return np.bincount(claim[turn < rest[interval]], minlength=len(first))


def _unclaimed(t_ns: np.ndarray, energy_mj: np.ndarray, idle: np.ndarray) -> Iterator[Unclaimed]:
    """What nobody can have, neighbouring intervals of one kind as one."""
    at = np.flatnonzero(energy_mj > 0)
    off = idle[at] & (t_ns[at + 1] - t_ns[at] > MAX_GAP_NS)
    goes_on = np.zeros(len(at), bool)
    goes_on[1:] = (t_ns[at[:-1] + 1] == t_ns[at[1:]]) & (off[1:] == off[:-1])
    begins = np.flatnonzero(~goes_on)
    for a, b in zip(begins.tolist(), [*begins[1:].tolist(), len(at)], strict=len(begins) > 0):
        kind = "off" if off[a] else "gap"
        yield Unclaimed(int(t_ns[at[a]]), int(t_ns[at[b - 1] + 1]), kind, int(energy_mj[at[a:b]].sum()))


def _runs(readings: _Readings) -> list[Run]:
    if not len(readings.t_ns):
        return []
    breaks = np.flatnonzero(readings.is_break)
    firsts, lasts = [0, *(breaks + 1).tolist()], [*breaks.tolist(), len(readings.t_ns) - 1]

    def reading(i: int) -> Reading:
        return Reading(int(readings.t_ns[i]), int(readings.mj[i]))

    return [Run(reading(a), reading(b)) for a, b in zip(firsts, lasts, strict=True)]
