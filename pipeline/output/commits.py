"""Reading what is committed. Storage is the truth; the compacted ledger only saves requests.

A shard is done when `_job/commits/NN/SHARD.json` exists. Listing tells which; the bodies are needed at the end, and
come from compacted Parquet parts (`_job/ledger/`, written by the driver while it runs, safe to lose) or one by one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import DamagedError, StoreError
from millijoule.workers.layout import COMMITS_PREFIX, COMPACTED_PREFIX, commit_key, shard_of_commit_key
from millijoule.workers.schemas import Commit
from millijoule.workers.storage.protocol import Store

#: Commits per compacted part: about a minute of a thousand GPUs, or 10 MB.
COMPACT_EVERY = 4096

#: Parts that are held at the same time: retried shards and several drivers leave a shard's neighbours in several.
MAX_PARTS = 8

#: Concurrent requests when commits are read one by one.
READ_THREADS = 16

_COMPACTED_SCHEMA = pa.schema(
    [pa.field("shard_id", pa.int64(), nullable=False), pa.field("commit", pa.binary(), nullable=False)]
)


def list_committed(store: Store, n_shards: int) -> np.ndarray:
    """Which shards have a commit: bool `[n_shards]`. One listing, no bodies.

    Raises:
        StoreError: a commit names a shard the plan does not have.
    """
    done = np.zeros(n_shards, dtype=bool)
    for item in store.list(COMMITS_PREFIX):
        shard_id = shard_of_commit_key(item.key)
        if shard_id is None:
            continue
        if shard_id >= n_shards:
            raise StoreError(f"{store.url}/{item.key}: the plan has only {n_shards} shards")
        done[shard_id] = True
    return done


def not_a_commit(store: Store, shard_id: int, error: Exception) -> DamagedError:
    """The error of a commit object that is none."""
    return DamagedError(f"{store.url}/{commit_key(shard_id)}: not a commit: {error}")


def parse_commit(store: Store, shard_id: int, body: bytes) -> Commit:
    """Parse a commit's body; raises DamagedError naming the object where it is not one."""
    try:
        return Commit.from_json(body)
    except (ValueError, TypeError, KeyError) as error:
        raise not_a_commit(store, shard_id, error) from error


def read_commits(store: Store, n_shards: int, *, use_compacted: bool = True) -> Iterator[Commit]:
    """Every commit, in shard order, without holding them all; see `read_bodies`."""
    for shard_id, body in read_bodies(store, n_shards, use_compacted=use_compacted):
        yield parse_commit(store, shard_id, body)


def read_bodies(store: Store, n_shards: int, *, use_compacted: bool = True) -> Iterator[tuple[int, bytes]]:
    """Every commit's shard and JSON, in shard order, without holding them all.

    With `use_compacted` False each body is read from the commit object itself (what an auditor wants).
    """
    done = list_committed(store, n_shards)
    compacted = _Compacted(store, n_shards) if use_compacted else None
    wanted = np.flatnonzero(done)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        for start in range(0, len(wanted), 1024):
            block = wanted[start : start + 1024].tolist()
            missing = [s for s in block if compacted is None or s not in compacted]
            fetched = dict(
                zip(missing, threads.map(lambda s: store.get(commit_key(s)), missing), strict=True)
            )
            for shard_id in block:
                body = fetched.get(shard_id)
                if body is None:
                    assert compacted is not None
                    body = compacted.pop(shard_id)
                yield shard_id, body


class CommitCompactor:
    """Collects commit bodies as they arrive and writes them out in parts."""

    def __init__(self, store: Store, epoch: int) -> None:
        self.store = store
        self.epoch = epoch
        self._bodies: dict[int, bytes] = {}
        self._parts = 0

    def add(self, shard_id: int, body: bytes) -> None:
        self._bodies[shard_id] = body
        if len(self._bodies) >= COMPACT_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected since the last part, if anything."""
        if not self._bodies:
            return
        table = pa.table(
            {"shard_id": list(self._bodies), "commit": list(self._bodies.values())}, schema=_COMPACTED_SCHEMA
        )
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd")
        self.store.put(f"{COMPACTED_PREFIX}{self.epoch:06d}-{self._parts:06d}.parquet", sink.getvalue())
        self._parts += 1
        self._bodies.clear()


class CommitBodies:
    """The JSON of single commits, asked for in about the order of shards: from compacted parts, else from the objects."""

    def __init__(self, store: Store, n_shards: int) -> None:
        self.store = store
        self._compacted = _Compacted(store, n_shards)
        self._lock = Lock()

    def get(self, shard_id: int) -> bytes:
        """The body of a shard's commit; raises NotFoundError where it has none. From any thread."""
        if shard_id in self._compacted:
            with self._lock:
                return self._compacted.get(shard_id)
        return self.store.get(commit_key(shard_id))


class _Compacted:
    """Bodies from compacted parts; asked about in order of shards, each once, it holds few parts at a time."""

    def __init__(self, store: Store, n_shards: int) -> None:
        self.store = store
        self._keys = sorted(i.key for i in store.list(COMPACTED_PREFIX) if i.key.endswith(".parquet"))
        self._part = np.full(n_shards, -1, np.int32)  # of each shard; -1: in none
        self._row = np.zeros(n_shards, np.int32)
        for number, key in enumerate(self._keys):
            with store.open_input(key) as source:
                shard_ids = pq.ParquetFile(source).read(columns=["shard_id"])["shard_id"].to_numpy()
            rows = np.flatnonzero((shard_ids >= 0) & (shard_ids < n_shards))
            self._part[shard_ids[rows]] = number
            self._row[shard_ids[rows]] = rows
        self._left = np.bincount(self._part[self._part >= 0], minlength=len(self._keys))
        self._bodies: dict[int, pa.ChunkedArray] = {}

    def __contains__(self, shard_id: int) -> bool:
        return bool(self._part[shard_id] >= 0)

    def get(self, shard_id: int) -> bytes:
        """The body of a shard that is in a part; raises StoreError. The last `MAX_PARTS` parts are held."""
        number = int(self._part[shard_id])
        if number not in self._bodies:
            with self.store.open_input(self._keys[number]) as source:
                commits = pq.ParquetFile(source).read(columns=["commit"])["commit"].combine_chunks()
            self._bodies[number] = commits
            if len(self._bodies) > MAX_PARTS:
                del self._bodies[next(iter(self._bodies))]
        body: bytes = self._bodies[number][int(self._row[shard_id])].as_py()
        return body

    def pop(self, shard_id: int) -> bytes:
        """The body of a shard that is in a part and is not asked for again; raises StoreError."""
        body = self.get(shard_id)
        number = int(self._part[shard_id])
        self._left[number] -= 1
        if not self._left[number]:
            self._bodies.pop(number, None)
        return body
