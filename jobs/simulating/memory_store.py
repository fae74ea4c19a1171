"""A store in memory that counts requests, and writers that do their works at once: no thread, so that a run repeats itself.

A commit's body is not kept, only that it stands: the driver keeps all of them in its compacted ledger anyway.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from millijoule.workers.errors import AlreadyExistsError, NotFoundError
from millijoule.workers.layout import COMMITS_PREFIX, commit_key
from millijoule.workers.schemas import Segment
from millijoule.workers.storage.protocol import ObjectInfo, Store, TemporaryObject


@dataclass(frozen=True)
class SealedPart:
    """Images that an attempt drew and sealed before it gave its shard back."""

    part_id: str
    images: int
    segment: Segment


class MemoryStore(Store):
    """Objects by key, and sealed parts by shard. `requests` counts by kind, `written_bytes` all that was put."""

    url = "memory://simulated"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.committed: set[int] = set()
        self.parts: defaultdict[int, list[SealedPart]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.written_bytes = 0

    def put_exclusive(self, key: str, data: bytes) -> None:
        if key in self.objects:
            raise AlreadyExistsError(key)
        self.put(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.requests["put"] += 1
        self.written_bytes += len(data)
        self.objects[key] = data

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        self.put(key, path.read_bytes())

    def commit(self, shard_id: int) -> bool:
        """A worker's exclusive create of a shard's commit; False where one stands."""
        self.requests["commit"] += 1
        if shard_id in self.committed:
            return False
        self.committed.add(shard_id)
        return True

    def get(self, key: str) -> bytes:
        self.requests["get"] += 1
        try:
            return self.objects[key]
        except KeyError:
            raise NotFoundError(key) from None

    def size(self, key: str) -> int:
        self.requests["head"] += 1
        try:
            return len(self.objects[key])
        except KeyError:
            raise NotFoundError(key) from None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        keys = [key for key in self.objects if key.startswith(prefix)]
        if prefix == COMMITS_PREFIX:
            keys += [commit_key(shard_id) for shard_id in sorted(self.committed)]
        self.requests["list"] += 1 + len(keys) // 1000
        for key in keys:
            yield ObjectInfo(key, len(self.objects.get(key, b"")), 0)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.requests["delete"] += 1
            self.objects.pop(key, None)

    def list_temporary(self) -> Iterator[TemporaryObject]:
        yield from ()

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        pass

    def open_input(self, key: str) -> BytesIO:
        return BytesIO(self.get(key))


class PromptWriter:
    """Stands for `RecordWriter`: a work is done when it is submitted, and settled in the loop as there."""

    waits_for_storage = False
    has_room = True

    def __init__(self) -> None:
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()

    @property
    def idle(self) -> bool:
        return not self._results

    def submit(
        self, what: str, do: Callable[[], Any], then: Callable[[Any], None] = lambda result: None
    ) -> None:
        self._results.append((then, do()))

    def settle(self) -> None:
        while self._results:
            then, value = self._results.popleft()
            then(value)

    def close(self, timeout_s: float | None = None) -> None:
        self.settle()
