"""Many records in little memory: columns that grow, and records that are made anew whenever they are looked at."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar, overload

import numpy as np
import pyarrow as pa

T = TypeVar("T")

#: Stands for None in a column whose values are never negative.
NONE = -1


class Packed(Sequence[T]):
    """Records held as columns; a subclass says how many there are and makes one from its number."""

    def make(self, number: int) -> T:
        """Record `number`, which is in range."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packed) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        wanted = range(len(self))[number]
        return self.make(wanted) if isinstance(wanted, int) else [self.make(n) for n in wanted]


class Names:
    """Texts that repeat, as numbers: `texts[i]` has number i."""

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


class Texts:
    """A column of texts that hardly repeat, some of them None."""

    def __init__(self) -> None:
        self._ends, self._bytes, self._is_text = array("q", [0]), bytearray(), bytearray()

    def append(self, text: str | None) -> None:
        self._is_text.append(text is not None)
        self._bytes += (text or "").encode()
        self._ends.append(len(self._bytes))

    def __getitem__(self, number: int) -> str | None:
        text = self._bytes[self._ends[number] : self._ends[number + 1]].decode()
        return text if self._is_text[number] else None

    def column(self) -> pa.Array:
        """The texts as Arrow strings; while it is in use, nothing can be added."""
        if not self._is_text:
            return pa.array([], pa.string())
        validity = pa.array(np.frombuffer(self._is_text, bool)).buffers()[1]
        offsets = pa.py_buffer(np.asarray(self._ends, np.int32))
        return pa.StringArray.from_buffers(len(self._is_text), offsets, pa.py_buffer(self._bytes), validity)


def padded(lists: Sequence[Sequence[int]]) -> np.ndarray:
    """Lists of different lengths as rows, filled up with -1: int32."""
    table = np.full((len(lists), max(map(len, lists), default=0)), -1, np.int32)
    for row, values in zip(table, lists, strict=True):
        row[: len(values)] = values
    return table


def column(numbers: array[int]) -> np.ndarray:
    """`numbers`, int32 or int64 `[n]`, not copied: while it is in use, nothing can be added to them."""
    kind = np.int32 if numbers.typecode == "i" else np.int64
    return np.frombuffer(numbers, kind) if len(numbers) else np.zeros(0, kind)
