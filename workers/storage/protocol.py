"""What a `Store` is: bytes under relative keys, in a local folder or an S3 bucket.

`put_exclusive` is the one operation the commit protocol rests on. Nothing half-written ever stands under a final key.
Nothing here knows what the objects mean, and no failure is swallowed: whatever goes wrong arrives as a `StoreError` that
names the object and the next step.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import pyarrow as pa

from millijoule.workers.errors import AlreadyExistsError, NotFoundError

#: Local files being written carry this prefix until they get their final name; no key may contain it.
TEMPORARY_PREFIX = ".millijoule-tmp-"

#: S3 allows 1,024 bytes for prefix and key together; Linux 255 for one segment.
MAX_KEY_BYTES = 900
MAX_SEGMENT_BYTES = 255

_FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing; `mtime_ns` is the store's own clock, nanoseconds since the Unix epoch."""

    key: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TemporaryObject:
    """What an interrupted write left behind: a local file (`upload_id` None) or a pending multipart upload.

    `key` is the temporary file's own key, or the key the upload was meant for.
    """

    key: str
    mtime_ns: int
    upload_id: str | None = None


class Store(Protocol):
    """A flat set of immutable-by-convention objects under relative POSIX keys.

    Every method raises ValueError for an unusable key and StoreError for everything the storage does; throttling,
    lost connections and time-outs are first retried for some tens of seconds. Stores can be pickled and used from
    several threads and processes.
    """

    url: str  #: normalised, for messages

    def put_exclusive(self, key: str, data: bytes) -> None:
        """Create the object. On return it holds exactly `data`, also when an earlier try of ours had created it.

        Raises:
            AlreadyExistsError: it holds other bytes.
            StoreError: with `transient` True the outcome may be unknown; call again with the same bytes.
        """

    def put(self, key: str, data: bytes) -> None:
        """Write the whole object, replacing any other; readers see the old or the new bytes, never a mixture."""

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        """Store a finished local file under `key`, as atomically as `put`.

        The file may be deleted afterwards but not changed: on a local store the object can be a hard link to it.
        `on_part` is called, from any thread, whenever a part of it has arrived.
        """

    def get(self, key: str) -> bytes:
        """All bytes of the object; raises NotFoundError."""

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        """Size in bytes; raises NotFoundError."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with the string `prefix`, in no particular order, always asked afresh."""

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""

    def open_input(self, key: str) -> pa.NativeFile | BinaryIO:
        """A seekable binary file with ranged reads, as `pyarrow.parquet.ParquetFile` takes it.

        Raises:
            NotFoundError: no such object.
        """

    def probe_exclusive_create(self) -> bool:
        """Whether a second exclusive create is really refused here; some S3 servers silently overwrite."""
        key = f"exclusive-create-probe-{uuid.uuid4().hex}"
        first, second = b"first " + key.encode(), b"second " + key.encode()
        try:
            self.put_exclusive(key, first)
            try:
                self.put_exclusive(key, second)
            except AlreadyExistsError:
                return self.get(key) == first
            return False
        finally:
            self.delete([key])

    def list_temporary(self) -> Iterator[TemporaryObject]:
        """What interrupted or still running writes hold; `list` never shows it. Age is the caller's to judge."""

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        """Delete what `list_temporary` found. A write that is still running then fails, and leaves nothing."""


def check_key(key: str) -> str:
    """Return `key`, or raise ValueError where it is no relative POSIX path that every store can hold."""
    problem = None
    segments = key.split("/")
    if not key:
        problem = "it is empty"
    elif key.startswith("/"):
        problem = "it is absolute"
    elif "" in segments:
        problem = "it has an empty segment"
    elif "." in segments or ".." in segments:
        problem = "'.' and '..' are not allowed"
    elif _FORBIDDEN_CHARACTERS.search(key):
        problem = "it has a control character or one that cannot be encoded"
    elif "?versionId=" in key:
        problem = "'?versionId=' means something to S3 clients"
    elif TEMPORARY_PREFIX in key:
        problem = f"'{TEMPORARY_PREFIX}' marks temporary files"
    elif len(key.encode()) > MAX_KEY_BYTES or any(len(s.encode()) > MAX_SEGMENT_BYTES for s in segments):
        problem = f"it is longer than {MAX_KEY_BYTES} bytes, or a segment than {MAX_SEGMENT_BYTES}"
    if problem:
        raise ValueError(f"unusable storage key {key!r}: {problem}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise ValueError where no valid key can start with it; "" and "data/" are fine."""
    if prefix:
        check_key(prefix + "x")
    return prefix
