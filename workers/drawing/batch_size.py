"""How many images go into one call of the model: a first guess, doubled while that fits, halved where it does not.

What is learnt counts for images of about one size (`size_class`), is kept by the process, and by the host for those that come
after it (`BatchNotes`): a worker that is started anew does not run out of memory once more to learn what the last one knew.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from millijoule.workers.generators.protocol import BatchLimits
from millijoule.workers.host_folder import HostFolder, read_entry, write_entry
from millijoule.workers.records import convert, encode

log = logging.getLogger(__name__)

#: Notes of a host hold so long: memory can have been short because of somebody else.
NOTES_HOLD_S = 86_400.0

Count = Annotated[int, Meta(ge=1)]


def size_class(width: int, height: int) -> int:
    """Pixels, rounded up to a power of the square root of two: what fits of one size fits of all sizes of its class."""
    return math.ceil(2 ** (math.ceil(2 * math.log2(width * height) - 1e-9) / 2))


@dataclass(frozen=True)
class BatchState:
    """What is known of batches of one size of image.

    Attributes:
        rows: of the next call.
        most: never tried to be exceeded.
        savers: how many of the generator's memory savers it takes.
    """

    rows: Count
    most: Count
    savers: Annotated[int, Meta(ge=0)] = 0

    def fitted(self, rows: int) -> BatchState:
        """After a call with `rows` rows that went well."""
        if rows < self.rows or self.rows >= self.most:
            return self
        return replace(self, rows=min(2 * self.rows, self.most))

    def ran_out(self, rows: int) -> BatchState:
        """After a call with `rows` rows for which memory did not suffice."""
        half = max(1, rows // 2)
        return replace(self, rows=min(self.rows, half), most=min(self.most, half))

    def relieved(self, limits: BatchLimits) -> BatchState:
        """After a memory saver was taken: batches may grow again."""
        return BatchState(1, limits.most, self.savers + 1)


@dataclass(frozen=True)
class _Kept(BatchState):
    """A state as a host keeps it."""

    key: str = ""
    written_unix: float = 0.0


class BatchNotes:
    """States that the processes of a host have found, by model, device and options.

    Args:
        about: what they hold for, in JSON values: the model's hash, the kind of device, options.
    """

    def __init__(
        self,
        about: object,
        path: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder = HostFolder("batches", path)
        self._about = about
        self._clock = clock

    def read(self, pixels: int) -> BatchState | None:
        """What was found for images of `pixels` pixels, None where nothing is known or it is too old."""
        key = self._key(pixels)
        entry = self._folder.entry(key)
        content = read_entry(entry) if entry else None
        if content is None:
            return None
        try:
            kept = convert(_Kept, msgspec.json.decode(content))
        except (ValueError, RecursionError):
            return None
        age = self._clock() - kept.written_unix
        if kept.key != key or not 0 <= age < NOTES_HOLD_S:
            return None
        return BatchState(kept.rows, max(kept.rows, kept.most), kept.savers)

    def write(self, pixels: int, state: BatchState) -> None:
        """Keep `state`."""
        key = self._key(pixels)
        if entry := self._folder.entry(key):
            write_entry(entry, encode(_Kept(**asdict(state), key=key, written_unix=self._clock())))

    def _key(self, pixels: int) -> str:
        return json.dumps([self._about, pixels], sort_keys=True, default=str)


class BatchSizer:
    """The worker's batch sizes.

    Args:
        limits: first guess and bound for images of (width, height) pixels.
        notes: of the host; None: the process learns for itself only.
    """

    def __init__(self, limits: Callable[[int, int], BatchLimits], notes: BatchNotes | None = None) -> None:
        self._limits = limits
        self._notes = notes
        self._states: dict[int, BatchState] = {}

    def rows(self, size: tuple[int, int]) -> int:
        """How many images of `size` (width, height) the next call gets."""
        return self._state(size).rows

    def most(self, size: tuple[int, int]) -> int:
        """How many images of `size` a call may get at most, as far as is known."""
        return self._state(size).most

    def savers(self, size: tuple[int, int]) -> int:
        """How many memory savers it takes to draw images of `size` at all."""
        return self._state(size).savers

    def fitted(self, size: tuple[int, int], rows: int) -> None:
        """A call with `rows` images of `size` went well."""
        self._learn(size, self._state(size).fitted(rows))

    def ran_out(self, size: tuple[int, int], rows: int) -> None:
        """Memory did not suffice for `rows` images of `size`."""
        self._learn(size, self._state(size).ran_out(rows))

    def relieved(self, size: tuple[int, int]) -> None:
        """A memory saver was taken because not even one image of `size` fitted."""
        self._learn(size, self._state(size).relieved(self._limits(*size)))

    def _state(self, size: tuple[int, int]) -> BatchState:
        pixels = size_class(*size)
        if pixels not in self._states:
            limits = self._limits(*size)
            state = BatchState(min(limits.first, limits.most), limits.most)
            noted = self._notes.read(pixels) if self._notes else None
            if noted is not None:
                most = min(limits.most, noted.most)
                state = BatchState(min(noted.rows, most), most, noted.savers)
            self._states[pixels] = state
        return self._states[pixels]

    def _learn(self, size: tuple[int, int], state: BatchState) -> None:
        pixels = size_class(*size)
        if state != self._states[pixels]:
            self._states[pixels] = state
            if self._notes:
                self._notes.write(pixels, state)
