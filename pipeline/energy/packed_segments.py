"""Many segments in little memory: columns of numbers instead of objects.

A job of 100,000 shards has some 200,000 segments with two reads of several counters each; as objects they take 250 MB of
the driver, here a sixth of that. `PackedSegments` takes segments in any order and makes them anew, equal, whenever they
are looked at; a read that closes one segment of a worker and opens the next is kept once. Nothing is rounded: what does
not fit a column is refused.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from sys import intern
from typing import Any, overload

import numpy as np
import pyarrow as pa

from millijoule.workers.schemas import CounterRead, Segment, wraps

#: Stands for None in a column whose values are never negative.
NONE = -1
_NONE = NONE

#: What the JSON of a segment and of a read must have, and may have.
_SEGMENT_KEYS = {"worker_id", "segment_class", "open", "close"}, {"shard_id", "attempt_id"}
_READ_KEYS = (
    {"boot_id", "t_mono_ns", "t_wall_ns", "latency_ns"},
    {"energy_mj", "estimate_mj", "epoch", "wrap_epoch"},
)


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


@dataclass(frozen=True)
class SegmentColumns:
    """The numbers of `PackedSegments`: of its reads `[m]` and of its segments `[n]`.

    `boot`, `worker` and `segment_class` are places in `names`, `domain_set` one in `domain_sets`; the counters of read i are
    `energy_mj[first[i] :]`, as many as its set has domains. `open` and `close` are numbers of reads. `NONE` stands for None
    in `wrap_epoch`, `estimate_mj` and `shard`; `attempt` is an Arrow array of strings with nulls.
    """

    names: Sequence[str]
    domain_sets: Sequence[tuple[str, ...]]
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
    attempt: pa.Array

    def epochs_of_wrapping(self) -> np.ndarray:
        """`CounterRead.epoch_of` of a counter that wraps: `[m]`; of any other it is `epoch`."""
        return np.where(self.wrap_epoch == NONE, self.epoch, self.wrap_epoch)


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
        self._boot, self._epoch, self._domains = array("i"), array("q"), array("i")
        self._t_mono, self._t_wall, self._latency = array("q"), array("q"), array("q")
        self._estimate, self._first = array("q"), array("q")
        self._wrap_epoch = array("i")
        self._energy = array("q")  # of all reads, each from its `_first` on
        # of each segment
        self._worker, self._class, self._shard = array("i"), array("i"), array("q")
        self._open, self._close = array("i"), array("i")
        self._attempt_at, self._attempt_bytes = array("q", [0]), bytearray()
        self._has_attempt = bytearray()
        self._last: dict[str, tuple[CounterRead | dict[str, Any], int]] = {}
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

    def extend_raw(self, raws: Iterable[dict[str, Any]]) -> None:
        """Add segments as `dataclasses.asdict` gives them, without making them first.

        Raises:
            OverflowError, TypeError, ValueError, KeyError: something is no segment; some may have been added.
        """
        for raw in raws:
            _require_keys(raw, *_SEGMENT_KEYS)
            worker_id, attempt, shard = intern(raw["worker_id"]), raw.get("attempt_id"), raw.get("shard_id")
            if not isinstance(attempt, str | None):
                raise TypeError(f"attempt_id is {attempt!r}")
            opened = self._last.get(worker_id)
            self._open.append(
                opened[1]
                if opened is not None and opened[0] == raw["open"]
                else self._add_raw_read(raw["open"])
            )
            self._close.append(self._add_raw_read(raw["close"]))
            self._last[worker_id] = raw["close"], self._close[-1]
            self._worker.append(self._names.number(worker_id))
            self._class.append(self._names.number(intern(raw["segment_class"])))
            self._shard.append(_NONE if shard is None else shard)
            self._has_attempt.append(attempt is not None)
            self._attempt_bytes += (attempt or "").encode()
            self._attempt_at.append(len(self._attempt_bytes))

    def _add_raw_read(self, raw: dict[str, Any]) -> int:
        _require_keys(raw, *_READ_KEYS)
        estimate, wrap_epoch = raw.get("estimate_mj"), raw.get("wrap_epoch")
        energy_mj = raw.get("energy_mj", {})
        if not isinstance(energy_mj, dict):
            raise TypeError(f"energy_mj is {energy_mj!r}")
        self._boot.append(self._names.number(intern(raw["boot_id"])))
        self._epoch.append(raw.get("epoch", 0))
        self._domains.append(self._set_number(tuple(energy_mj)))
        self._t_mono.append(raw["t_mono_ns"])
        self._t_wall.append(raw["t_wall_ns"])
        self._latency.append(raw["latency_ns"])
        self._estimate.append(_NONE if estimate is None else estimate)
        self._wrap_epoch.append(_NONE if wrap_epoch is None else wrap_epoch)
        self._first.append(len(self._energy))
        self._energy.extend(energy_mj.values())
        return len(self._boot) - 1

    def _set_number(self, names: tuple[str, ...]) -> int:
        number = self._domain_set_numbers.get(names)
        if number is None:
            number = self._domain_set_numbers[names] = len(self._domain_sets)
            self._domain_sets.append(names)
        return number

    def _add_read(self, read: CounterRead) -> int:
        self._boot.append(self._names.number(read.boot_id))
        self._epoch.append(read.epoch)
        self._domains.append(self._set_number(tuple(read.energy_mj)))
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

    def drop_wrapping_counters(self, reads: Iterable[int], wrap_epoch: int) -> None:
        """Make reads (by number) as of a worker that could not read the counters that wrap, and state `wrap_epoch`."""
        for n in reads:
            names, first = self._domain_sets[self._domains[n]], self._first[n]
            kept = [i for i, name in enumerate(names) if not wraps(name)]
            for place, i in enumerate(kept):
                self._energy[first + place] = self._energy[first + i]
            self._domains[n] = self._set_number(tuple(names[i] for i in kept))
            self._wrap_epoch[n] = wrap_epoch

    def read(self, number: int) -> CounterRead:
        """A read by its number in `columns`."""
        return self._read(number)

    def columns(self) -> SegmentColumns:
        """The numbers as they are now, not copied: nothing can be added any more."""
        attempt = pa.StringArray.from_buffers(
            len(self),
            pa.py_buffer(np.asarray(self._attempt_at, np.int32)),
            pa.py_buffer(self._attempt_bytes),
            pa.array(np.frombuffer(self._has_attempt, bool)).buffers()[1] if len(self) else None,
        )
        return SegmentColumns(
            names=self._names.texts,
            domain_sets=self._domain_sets,
            boot=_column(self._boot),
            epoch=_column(self._epoch),
            wrap_epoch=_column(self._wrap_epoch),
            domain_set=_column(self._domains),
            t_mono_ns=_column(self._t_mono),
            t_wall_ns=_column(self._t_wall),
            latency_ns=_column(self._latency),
            estimate_mj=_column(self._estimate),
            first=_column(self._first),
            energy_mj=_column(self._energy),
            worker=_column(self._worker),
            segment_class=_column(self._class),
            shard=_column(self._shard),
            open=_column(self._open),
            close=_column(self._close),
            attempt=attempt,
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
        ranks = self._names.ranks() if len(self) else np.zeros(0, np.int64)
        opened, closed = _column(self._open), _column(self._close)
        boot, t_mono = _column(self._boot), _column(self._t_mono)
        return t_mono[closed], ranks[_column(self._worker)], t_mono[opened], ranks[boot[opened]]


def _column(numbers: array[int]) -> np.ndarray:
    kind = np.int32 if numbers.typecode == "i" else np.int64
    return np.frombuffer(numbers, kind) if len(numbers) else np.zeros(0, kind)


def _require_keys(raw: dict[str, Any], needed: set[str], allowed: set[str]) -> None:
    if not isinstance(raw, dict):
        raise TypeError(f"{raw!r} for a segment or a read")
    keys = raw.keys()
    if not needed <= keys or keys - needed - allowed:
        raise ValueError(f"has {', '.join(sorted(map(str, keys)))} for a segment or a read")
