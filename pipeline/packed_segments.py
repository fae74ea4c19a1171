"""Many segments in little memory: columns of numbers instead of objects.

A job of 100,000 shards has some 200,000 segments with two reads of several counters each; as objects they take 250 MB of
the driver, here a sixth of that. `PackedSegments` takes segments in any order and makes them anew, equal, whenever they
are looked at; a read that closes one segment of a worker and opens the next is kept once. Nothing is rounded: what does
not fit a column is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np

from millijoule.workers.schemas import CounterRead, Segment

#: Stands for None in a column whose values are never negative.
_NONE = -1


class _Names:
    """Texts that repeat, as numbers."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]

    def ranks(self) -> np.ndarray:
        """The place of each text, by number, among all in order."""
        ranks = np.empty(len(self.texts), np.int64)
        ranks[sorted(range(len(self.texts)), key=self.texts.__getitem__)] = np.arange(len(self.texts))
        return ranks


class PackedSegments(Sequence[Segment]):
    """Segments in the order in which they were added; equal to what was added.

    Raises:
        OverflowError, TypeError: a number is none, or beyond 64 bits.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._names = _Names()
        self._domain_sets: list[tuple[str, ...]] = []
        self._domain_set_numbers: dict[tuple[str, ...], int] = {}
        # of each read
        self._boot, self._epoch, self._domains = array("q"), array("q"), array("q")
        self._t_mono, self._t_wall, self._latency = array("q"), array("q"), array("q")
        self._estimate, self._first = array("q"), array("q")
        self._wrap_epoch = array("i")
        self._energy = array("q")  # of all reads, each from its `_first` on
        # of each segment
        self._worker, self._class, self._shard = array("q"), array("q"), array("q")
        self._open, self._close = array("q"), array("q")
        self._attempt_at, self._attempt_bytes = array("q", [0]), bytearray()
        self._has_attempt = bytearray()
        self._last: dict[str, tuple[CounterRead, int]] = {}
        self.extend(segments)

    def extend(self, segments: Iterable[Segment]) -> None:
        """Add `segments`."""
        for s in segments:
            opened = self._last.get(s.worker_id)
            self._open.append(
                opened[1] if opened is not None and opened[0] == s.open else self._add_read(s.open)
            )
            self._close.append(self._add_read(s.close))
            self._last[s.worker_id] = s.close, self._close[-1]
            self._worker.append(self._names.number(s.worker_id))
            self._class.append(self._names.number(s.segment_class))
            self._shard.append(_NONE if s.shard_id is None else s.shard_id)
            self._has_attempt.append(s.attempt_id is not None)
            self._attempt_bytes += (s.attempt_id or "").encode()
            self._attempt_at.append(len(self._attempt_bytes))

    def _add_read(self, read: CounterRead) -> int:
        names = tuple(read.energy_mj)
        if names not in self._domain_set_numbers:
            self._domain_set_numbers[names] = len(self._domain_sets)
            self._domain_sets.append(names)
        self._boot.append(self._names.number(read.boot_id))
        self._epoch.append(read.epoch)
        self._domains.append(self._domain_set_numbers[names])
        self._t_mono.append(read.t_mono_ns)
        self._t_wall.append(read.t_wall_ns)
        self._latency.append(read.latency_ns)
        self._estimate.append(_NONE if read.estimate_mj is None else read.estimate_mj)
        self._wrap_epoch.append(_NONE if read.wrap_epoch is None else read.wrap_epoch)
        self._first.append(len(self._energy))
        self._energy.extend(read.energy_mj.values())
        return len(self._boot) - 1

    def _read(self, n: int) -> CounterRead:
        domains, first = self._domain_sets[self._domains[n]], self._first[n]
        return CounterRead(
            self._names.texts[self._boot[n]],
            self._t_mono[n],
            self._t_wall[n],
            self._latency[n],
            dict(zip(domains, self._energy[first : first + len(domains)], strict=True)),
            None if self._estimate[n] == _NONE else self._estimate[n],
            self._epoch[n],
            None if self._wrap_epoch[n] == _NONE else self._wrap_epoch[n],
        )

    def __len__(self) -> int:
        return len(self._worker)

    @overload
    def __getitem__(self, number: int) -> Segment: ...
    @overload
    def __getitem__(self, number: slice) -> list[Segment]: ...
    def __getitem__(self, number: int | slice) -> Segment | list[Segment]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        n, texts = range(len(self))[number], self._names.texts
        attempt = self._attempt_bytes[self._attempt_at[n] : self._attempt_at[n + 1]]
        return Segment(
            texts[self._worker[n]],
            texts[self._class[n]],
            self._read(self._open[n]),
            self._read(self._close[n]),
            None if self._shard[n] == _NONE else self._shard[n],
            attempt.decode() if self._has_attempt[n] else None,
        )

    def stretches(self) -> Iterator[list[int]]:
        """Numbers of the segments of each worker and stretch of time, in order of boot, begin, worker and end."""
        if not len(self):
            return
        keys = self._order_keys()
        order = np.lexsort(keys)  # stable; the last key counts most
        same = np.ones(len(order) - 1, bool)
        for key in keys:
            same &= key[order[1:]] == key[order[:-1]]
        begins = [0, *(np.flatnonzero(~same) + 1).tolist(), len(order)]
        for begin, end in pairwise(begins):
            yield order[begin:end].tolist()

    def in_order(self, numbers: Sequence[int]) -> np.ndarray:
        """`numbers` of segments in the order of `stretches`."""
        chosen = np.asarray(numbers, np.int64)
        if not len(chosen):
            return chosen
        return chosen[np.lexsort([key[chosen] for key in self._order_keys()])]

    def _order_keys(self) -> tuple[np.ndarray, ...]:
        """Of each segment, as `np.lexsort` takes them: end, worker, begin, boot."""
        ranks = self._names.ranks()
        opened, closed = _column(self._open), _column(self._close)
        boot, t_mono = _column(self._boot), _column(self._t_mono)
        return t_mono[closed], ranks[_column(self._worker)], t_mono[opened], ranks[boot[opened]]


class SegmentSelection(Sequence[Segment]):
    """Some of the packed segments, in an order of their own."""

    def __init__(self, packed: PackedSegments, numbers: Iterable[int]) -> None:
        self._packed = packed
        self._numbers = array("q", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Segment: ...
    @overload
    def __getitem__(self, number: slice) -> list[Segment]: ...
    def __getitem__(self, number: int | slice) -> Segment | list[Segment]:
        if isinstance(number, slice):
            return [self._packed[n] for n in self._numbers[number]]
        return self._packed[self._numbers[number]]


def _column(numbers: array[int]) -> np.ndarray:
    return np.frombuffer(numbers, np.int64)
