"""The division of a counter in plain Python, object by object: what `pipeline.energy.counter_split` is compared with."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from millijoule.pipeline.energy.counter_split import MAX_GAP_NS, Reading, Run, Unclaimed
from millijoule.workers.meters.counter_book import is_plausible


def apportion(total_mj: int, weights: Sequence[int]) -> list[int]:
    """Divide `total_mj` in proportion to `weights`: integers that add up to it exactly.

    Largest remainder (Hamilton); equal remainders go to the earlier one.

    Raises:
        ValueError: a number is negative, or there is nobody to take a total that is not 0.
    """
    whole = sum(weights)
    if total_mj < 0 or any(w < 0 for w in weights) or (total_mj and not whole):
        raise ValueError(f"cannot apportion {total_mj} mJ by weights that add up to {whole}")
    if not whole:
        return [0] * len(weights)
    shares = [total_mj * w // whole for w in weights]
    rest = total_mj - sum(shares)
    if rest:
        order = sorted(range(len(weights)), key=lambda i: (-(total_mj * weights[i] % whole), i))
        for i in order[:rest]:
            shares[i] += 1
    return shares


def image_energy(shard_energy_mj: int | None, n_images: int) -> list[int | None]:
    """Equal shares of a shard's energy for its images, which cost the same; None where it was not measured."""
    if shard_energy_mj is None:
        return [None] * n_images
    return list(apportion(shard_energy_mj, [1] * n_images)) if n_images else []


def shard_energy(
    shard_energy_mj: int | None, ok: int, filtered: int, drawn: int | None
) -> tuple[list[int | None], int | None, int | None]:
    """The share of each accepted image of a shard, and those of its filtered and its quarantined images together.

    `drawn` images share equally, accepted ones first, then filtered ones; None: the accepted ones alone do.
    """
    if shard_energy_mj is None:
        return [None] * ok, None, None
    if drawn is None:
        return image_energy(shard_energy_mj, ok), 0, 0
    if not drawn:
        return [], 0, shard_energy_mj
    shares = apportion(shard_energy_mj, [1] * drawn)
    return list(shares[:ok]), sum(shares[ok : ok + filtered]), sum(shares[ok + filtered :])


class Claim(NamedTuple):
    """A worker was busy from `t_open_ns` to `t_close_ns`; a reading is None where the worker could not read."""

    worker_id: str
    t_open_ns: int
    t_close_ns: int
    open: Reading | None
    close: Reading | None


@dataclass(frozen=True)
class Split:
    """`shares[i]` belongs to claim i, None where it cannot be known.

    The shares that are not None and `unclaimed` add up to the growth over `runs`, exactly.
    """

    shares: list[int | None]
    unclaimed: list[Unclaimed]
    runs: list[Run]

    def covers(self, t_open_ns: int, t_close_ns: int) -> bool:
        """Whether all energy used in this stretch is somewhere in `shares` and `unclaimed`."""
        return any(r.first.t_ns <= t_open_ns and t_close_ns <= r.last.t_ns for r in self.runs)


def split_counter(claims: Sequence[Claim]) -> Split:
    """Divide one counter's growth among the claims on it.

    Claims without both readings get None; what they used is in the intervals around them, whose share per such worker
    is booked as "gap". The same holds for a claim over a break, where the counter was reset or misread.
    """
    readings = sorted({r for c in claims for r in (c.open, c.close) if r is not None})
    position = {r: i for i, r in enumerate(readings)}
    times = [r.t_ns for r in readings]
    growth = [_growth(a, b) for a, b in pairwise(readings)]  # None: a break
    breaks = [i for i, mj in enumerate(growth) if mj is None]

    shares: list[int | None] = [None] * len(claims)
    starts: dict[int, list[int]] = {}  # interval -> claims that begin or end there
    ends: dict[int, list[int]] = {}
    for n, claim in enumerate(claims):
        if claim.open is not None and claim.close is not None:
            first, end = position[claim.open], position[claim.close]
            if first <= end and bisect_left(breaks, first) == bisect_left(breaks, end):
                shares[n] = 0
        if shares[n] is None:
            first, end = bisect_right(times, claim.t_open_ns) - 1, bisect_left(times, claim.t_close_ns)
        first, end = max(first, 0), min(end, len(growth))
        if first < end:
            starts.setdefault(first, []).append(n)
            ends.setdefault(end, []).append(n)

    unclaimed: list[Unclaimed] = []
    active: list[int] = []
    blind: dict[str, int] = {}  # workers at work whose own reads failed
    for i, mj in enumerate(growth):
        for n in ends.get(i, ()):
            if shares[n] is not None:
                active.remove(n)
            else:
                blind[claims[n].worker_id] -= 1
        for n in starts.get(i, ()):
            if shares[n] is not None:
                insort(active, n)
            else:
                blind[claims[n].worker_id] = blind.get(claims[n].worker_id, 0) + 1
        if mj is None:
            continue
        n_blind = sum(count > 0 for count in blind.values())
        parts = apportion(mj, [1] * max(len(active) + n_blind, 1))
        for n, part in zip(active, parts, strict=False):
            shares[n] = (shares[n] or 0) + part
        rest = sum(parts[len(active) :])
        if rest:
            idle = not active and not n_blind
            segment_class = "off" if idle and times[i + 1] - times[i] > MAX_GAP_NS else "gap"
            _book(unclaimed, Unclaimed(times[i], times[i + 1], segment_class, rest))
    return Split(shares, unclaimed, _runs(readings, breaks))


def _growth(before: Reading, after: Reading) -> int | None:
    increase_mj = after.energy_mj - before.energy_mj
    return increase_mj if is_plausible(increase_mj, after.t_ns - before.t_ns) else None


def _runs(readings: list[Reading], breaks: list[int]) -> list[Run]:
    if not readings:
        return []
    firsts = [0, *(b + 1 for b in breaks)]
    lasts = [*breaks, len(readings) - 1]
    return [Run(readings[a], readings[b]) for a, b in zip(firsts, lasts, strict=True)]


def _book(unclaimed: list[Unclaimed], item: Unclaimed) -> None:
    """Append `item`, or extend the last one where it goes on."""
    last = unclaimed[-1] if unclaimed else None
    if last and (last.t_close_ns, last.segment_class) == (item.t_open_ns, item.segment_class):
        unclaimed[-1] = Unclaimed(
            last.t_open_ns, item.t_close_ns, last.segment_class, last.energy_mj + item.energy_mj
        )
    else:
        unclaimed.append(item)
