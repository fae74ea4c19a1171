"""Stretches of time as pairs (begin, end), the one before the other."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import TypeVar

Time = TypeVar("Time", int, float)

#: Nanoseconds.
Interval = tuple[int, int]


def merged(intervals: Iterable[tuple[Time, Time]]) -> list[tuple[Time, Time]]:
    """`intervals` as stretches apart from each other, in order."""
    found: list[tuple[Time, Time]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def common(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """All stretches inside one interval of each; both in order of time and disjoint (touching ones stay apart)."""
    found = []
    ends = [end for _, end in b]
    for begin, end in a:
        i = bisect_left(ends, begin)
        while i < len(b) and b[i][0] < end:
            low, high = max(begin, b[i][0]), min(end, b[i][1])
            if low < high:
                found.append((low, high))
            i += 1
    return found


def without(interval: Interval, holes: Iterable[Interval]) -> list[Interval]:
    """What `holes` leave of `interval`."""
    left = [interval]
    for low, high in holes:
        pieces = [piece for begin, end in left for piece in ((begin, min(end, low)), (max(begin, high), end))]
        left = [(begin, end) for begin, end in pieces if begin < end]
    return left
