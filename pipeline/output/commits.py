"""Reading what is committed. Storage is the truth; the compacted ledger only saves requests.

A shard is done when `_job/commits/NN/SHARD.json` exists. Listing tells which; the bodies are needed at the end, and
come from compacted Parquet parts (`_job/ledger/`, written by the driver while it runs, safe to lose) or one by one.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.output.read_objects import in_threads
from millijoule.workers.errors import DamagedError, StoreError
from millijoule.workers.layout import COMMITS_PREFIX, COMPACTED_PREFIX, commit_key, shard_of_commit_key
from millijoule.workers.schemas import Commit
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: What reading a damaged part may raise: parts only save requests.
_UNREADABLE = (pa.ArrowException, OSError, KeyError, ValueError)

#: Commits per compacted part: about a minute of a thousand GPUs, or 10 MB.
COMPACT_EVERY = 4096

#: Parts that are held at the same time: late shards and several drivers leave a shard's neighbours in several.
MAX_PARTS = 8

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


@contextmanager
def parsing_commit(store: Store, shard_id: int) -> Iterator[None]:
    """Where a commit's body is parsed within it and is none, raises DamagedError naming the object."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DamagedError(f"{store.url}/{commit_key(shard_id)}: not a commit: {error}") from error


def parse_commit(store: Store, shard_id: int, body: bytes) -> Commit:
    """Parse a commit's body; raises DamagedError naming the object where it is not one."""
    with parsing_commit(store, shard_id):
        return Commit.from_json(body)


def read_commits(store: Store, n_shards: int, committed: np.ndarray | None = None) -> Iterator[Commit]:
    """Every commit, in shard order, without holding them all.

    Args:
        committed: the shards that have one, bool `[n_shards]`, where whoever asks has listed them (`list_committed`).
    """
    bodies = CommitBodies(store, n_shards)
    done = list_committed(store, n_shards) if committed is None else committed
    shard_ids = np.flatnonzero(done).tolist()
    for shard_id, body in in_threads(lambda shard_id: (shard_id, bodies.get(shard_id)), shard_ids):
        yield parse_commit(store, shard_id, body)


class CommitBodies:
    """The JSON of commits: from compacted parts, else from the objects.

    Asked for in about the order of shards, it holds few parts at a time.
    """

    def __init__(self, store: Store, n_shards: int) -> None:
        self.store = store
        self._keys = sorted(i.key for i in store.list(COMPACTED_PREFIX) if i.key.endswith(".parquet"))
        self._part = np.full(n_shards, -1, np.int32)  # of each shard; -1: in none
        self._row = np.zeros(n_shards, np.int32)
        for number, key in enumerate(self._keys):
            try:
                shard_ids = self._column(key, "shard_id").to_numpy()
            except _UNREADABLE as error:
                log.warning("%s/%s: passed over, commits are read one by one: %s", store.url, key, error)
                continue
            rows = np.flatnonzero((shard_ids >= 0) & (shard_ids < n_shards))
            self._part[shard_ids[rows]] = number
            self._row[shard_ids[rows]] = rows
        self._held: dict[int, pa.Array] = {}
        self._lock = Lock()

    def get(self, shard_id: int) -> bytes:
        """The body of a shard's commit; raises NotFoundError where it has none. From any thread."""
        with self._lock:
            number = int(self._part[shard_id])
            held = self._hold(number) if number >= 0 else None
            if held is not None:
                body: bytes = held[int(self._row[shard_id])].as_py()
                return body
        return self.store.get(commit_key(shard_id))

    def _hold(self, number: int) -> pa.Array | None:
        """The commits of a part; None, from then on for all its shards, where they cannot be read."""
        if number not in self._held:
            try:
                self._held[number] = self._column(self._keys[number], "commit").combine_chunks()
            except _UNREADABLE:
                self._part[self._part == number] = -1
                return None
            if len(self._held) > MAX_PARTS:
                del self._held[next(iter(self._held))]
        return self._held[number]

    def _column(self, key: str, name: str) -> pa.ChunkedArray:
        with self.store.open_input(key) as source:
            return pq.ParquetFile(source).read(columns=[name])[name]


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
