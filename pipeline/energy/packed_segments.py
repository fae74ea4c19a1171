"""Many segments in little memory: columns of numbers instead of objects.

A job of 100,000 shards has some 200,000 segments with two reads of several counters each; as objects they take 250 MB of
the driver, here a sixth of that. A read that closes one segment of a worker and opens the next is kept once. Nothing is
rounded: what does not fit a column is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from millijoule.pipeline.energy.packed import NONE, Names, Packed, Texts, column
from millijoule.workers.schemas import CounterRead, Segment, wraps


@dataclass(frozen=True)
class SegmentColumns:
    """The numbers of `PackedSegments`: of its reads `[m]` and of its segments `[n]`.

    `boot`, `worker` and `segment_class` are places in `names`, `domain_set` one in `domain_sets`; the counters of read i are
    `energy_mj[first[i] :]`, as many as its set has domains. `open` and `close` are numbers of reads. `NONE` stands for None
    in `wrap_epoch`, `estimate_mj` and `shard`; `attempt` is an Arrow array of strings with nulls.
    """

    names: Sequence[str]
    domain_sets: Sequence[tuple[str, ...]]
    attempt: pa.Array
    boot: np.ndarray
    epoch: np.ndarray
    wrap_epoch: np.ndarray
    domain_set: np.ndarray
    t_mono_ns: np.ndarray
    t_wall_ns: np.ndarray
    latency_ns: np.ndarray
    estimate_mj: np.ndarray
    first: np.ndarray
    energy_mj: np.ndarray
    worker: np.ndarray
    segment_class: np.ndarray
    shard: np.ndarray
    open: np.ndarray
    close: np.ndarray

    def epochs_of_wrapping(self) -> np.ndarray:
        """`CounterRead.epoch_of` of a counter that wraps: `[m]`; of any other it is `epoch`."""
        return np.where(self.wrap_epoch == NONE, self.epoch, self.wrap_epoch)


class PackedSegments(Packed[Segment]):
    """Segments in the order in which they were added; equal to what was added.

    Raises:
        OverflowError, TypeError: a number is none, or beyond 64 bits.
    """

    def __init__(self, segments: Iterable[Segment] = ()) -> None:
        self._names = Names()
        self._domain_sets: dict[tuple[str, ...], int] = {}
        # of each read
        self._boot, self._domain_set, self._wrap_epoch = array("i"), array("i"), array("i")
        self._t_mono, self._t_wall, self._latency = array("q"), array("q"), array("q")
        self._epoch, self._estimate, self._first = array("q"), array("q"), array("q")
        self._energy = array("q")  # of all reads, each from its `_first` on
        # of each segment
        self._worker, self._class, self._shard = array("i"), array("i"), array("q")
        self._open, self._close, self._attempt = array("i"), array("i"), Texts()
        self._last: dict[str, tuple[CounterRead, int]] = {}
        self.extend(segments)

    def extend(self, segments: Iterable[Segment]) -> None:
        """Add `segments`."""
        for s in segments:
            read, number = self._last.get(s.worker_id, (None, 0))
            self._open.append(number if read == s.open else self._add_read(s.open))
            self._close.append(self._add_read(s.close))
            self._last[s.worker_id] = s.close, self._close[-1]
            self._worker.append(self._names.number(s.worker_id))
            self._class.append(self._names.number(s.segment_class))
            self._shard.append(NONE if s.shard_id is None else s.shard_id)
            self._attempt.append(s.attempt_id)

    def _add_read(self, read: CounterRead) -> int:
        self._boot.append(self._names.number(read.boot_id))
        self._epoch.append(read.epoch)
        self._domain_set.append(self._set_number(tuple(read.energy_mj)))
        self._t_mono.append(read.t_mono_ns)
        self._t_wall.append(read.t_wall_ns)
        self._latency.append(read.latency_ns)
        self._estimate.append(NONE if read.estimate_mj is None else read.estimate_mj)
        self._wrap_epoch.append(NONE if read.wrap_epoch is None else read.wrap_epoch)
        self._first.append(len(self._energy))
        self._energy.extend(read.energy_mj.values())
        return len(self._boot) - 1

    def _set_number(self, names: tuple[str, ...]) -> int:
        return self._domain_sets.setdefault(names, len(self._domain_sets))

    def read(self, number: int) -> CounterRead:
        """A read by its number in `columns`."""
        domains, first = list(self._domain_sets)[self._domain_set[number]], self._first[number]
        estimate, wrap_epoch = self._estimate[number], self._wrap_epoch[number]
        return CounterRead(
            self._names.texts[self._boot[number]],
            self._t_mono[number],
            self._t_wall[number],
            self._latency[number],
            dict(zip(domains, self._energy[first : first + len(domains)], strict=True)),
            None if estimate == NONE else estimate,
            self._epoch[number],
            None if wrap_epoch == NONE else wrap_epoch,
        )

    def drop_wrapping_counters(self, reads: Iterable[int], wrap_epoch: int) -> None:
        """Make reads (by number) as of a worker that could not read the counters that wrap, and state `wrap_epoch`."""
        sets = list(self._domain_sets)
        for n in reads:
            names, first = sets[self._domain_set[n]], self._first[n]
            kept = [i for i, name in enumerate(names) if not wraps(name)]
            for place, i in enumerate(kept):
                self._energy[first + place] = self._energy[first + i]
            self._domain_set[n] = self._set_number(tuple(names[i] for i in kept))
            self._wrap_epoch[n] = wrap_epoch

    def columns(self) -> SegmentColumns:
        """The numbers as they are now, not copied: while they are in use, nothing can be added."""
        reads = (self._boot, self._epoch, self._wrap_epoch, self._domain_set, self._t_mono, self._t_wall)
        more = (self._latency, self._estimate, self._first, self._energy)
        segments = (self._worker, self._class, self._shard, self._open, self._close)
        columns = map(column, (*reads, *more, *segments))
        return SegmentColumns(self._names.texts, list(self._domain_sets), self._attempt.column(), *columns)

    def __len__(self) -> int:
        return len(self._worker)

    def make(self, number: int) -> Segment:
        """Segment `number` anew."""
        shard = self._shard[number]
        return Segment(
            self._names.texts[self._worker[number]],
            self._names.texts[self._class[number]],
            self.read(self._open[number]),
            self.read(self._close[number]),
            None if shard == NONE else shard,
            self._attempt[number],
        )

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of all segments in order of boot, begin, worker and end, and where each stretch of a worker begins.

        The segments of one stretch (the same boot, begin, worker and end) stand together, as they were added.
        """
        keys = self._order_keys()
        order = np.lexsort(keys)  # stable; the last key counts most
        same = np.zeros(len(order), bool)
        same[1:] = True
        for key in keys:
            same[1:] &= key[order[1:]] == key[order[:-1]]
        return order, np.flatnonzero(~same)

    def in_order(self, numbers: np.ndarray) -> np.ndarray:
        """`numbers` of segments in the order of `stretches`."""
        return numbers[np.lexsort([key[numbers] for key in self._order_keys()])]

    def _order_keys(self) -> tuple[np.ndarray, ...]:
        """Of each segment, as `np.lexsort` takes them: end, worker, begin, boot."""
        ranks, c = self._names.ranks(), self.columns()
        return c.t_mono_ns[c.close], ranks[c.worker], c.t_mono_ns[c.open], ranks[c.boot[c.open]]
