"""Finds prompt ids that occur more than once among any number of rows, at bounded memory.

In go ids with their ordinals, out come the ordinals of the later occurrences. Ids are kept as 128-bit digests in
temporary files split by the digest's first byte, and looked at one file at a time. Two different ids of one digest
would be taken for duplicates; the chance is below 1e-20 for a billion rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

#: 24 bytes per row, so a file of 1/256 of 100 million rows is 10 MB.
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("ordinal", "<i8")])
_PARTITIONS = 256

#: Records kept before they are sorted into the files.
PENDING_RECORDS = 65_536


@dataclass(frozen=True)
class Duplicates:
    """Every occurrence of an id after its first, by ordinal.

    `ordinal`, `first` (of the same id) are int64 `[n]`, `nth` (2 for the second) int64 `[n]`.
    """

    ordinal: np.ndarray
    first: np.ndarray
    nth: np.ndarray

    def __len__(self) -> int:
        return len(self.ordinal)


class DuplicateFinder:
    """Collects ids; `folder` must exist, be empty, and is the caller's to delete."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending = [np.empty(0, _RECORD)]

    def add(self, ids: pa.Array, ordinals: np.ndarray) -> None:
        """Take note of ids without nulls; ordinals ascend from call to call."""
        sha256 = hashlib.sha256
        digests = b"".join([sha256(value).digest() for value in pc.cast(ids, pa.binary()).to_pylist()])
        words = np.frombuffer(digests, "<u8").reshape(-1, 4)
        records = np.empty(len(ordinals), _RECORD)
        records["high"], records["low"], records["ordinal"] = words[:, 0], words[:, 1], ordinals
        self._pending.append(records)
        if sum(map(len, self._pending)) >= PENDING_RECORDS:
            self._spill()

    def duplicates(self) -> Duplicates:
        """All duplicates among what was added."""
        if any(self._folder.iterdir()):
            self._spill()
            found = [_duplicates(np.fromfile(path, _RECORD)) for path in self._folder.iterdir()]
        else:  # few enough to never have been spilled
            found = [_duplicates(np.concatenate(self._pending))]
        ordinal, first, nth = map(np.concatenate, zip(*found, strict=True))
        order = np.argsort(ordinal)
        return Duplicates(ordinal[order], first[order], nth[order])

    def _spill(self) -> None:
        records = np.concatenate(self._pending)
        partition = (records["high"] & (_PARTITIONS - 1)).astype(np.uint8)
        ends = np.cumsum(np.bincount(partition, minlength=_PARTITIONS))
        for p, part in enumerate(np.split(records[np.argsort(partition, kind="stable")], ends[:-1])):
            if len(part):
                with open(self._folder / f"ids-{p:03d}", "ab") as file:
                    part.tofile(file)
        self._pending = [np.empty(0, _RECORD)]


def _duplicates(records: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ordinal, first, nth) of the duplicates among records whose ordinals ascend."""
    high = np.sort(records["high"])
    if not (high[1:] == high[:-1]).any():
        records = records[:0]
    records = records[np.lexsort((records["low"], records["high"]))]  # which is stable
    is_first = np.ones(len(records), bool)  # of its id
    is_first[1:] = (np.diff(records["high"]) != 0) | (np.diff(records["low"]) != 0)
    first = np.flatnonzero(is_first)[np.cumsum(is_first) - 1]  # [n] index of the first record of the same id
    later = np.flatnonzero(~is_first)
    return records["ordinal"][later], records["ordinal"][first[later]], later - first[later] + 1
