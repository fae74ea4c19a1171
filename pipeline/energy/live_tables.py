"""Energy tables of a job that is still running: what its commits and drivers reported, flush by flush.

The driver writes the rows of five tables under `energy/_live/` at every flush of its other records. Commits stay the truth,
and the finished tables replace these. Workers that share a counter cannot be told apart before all of them have reported:
a live segment has its worker's own difference (`quality` "undivided"), and `read_live_segments` gives the segments back for
the ledger to divide.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.growing_files import GrowingFiles
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.rows import EnergyRows, RowTables, committed_attempt, power_rows, read_rows
from millijoule.pipeline.energy.schemas import run_id_of, table_of
from millijoule.pipeline.energy.tables import LIVE_PREFIX
from millijoule.pipeline.energy.uncommitted import Uncommitted, held_devices, read_workers
from millijoule.pipeline.output.job import JobSpec
from millijoule.workers.meters.segment_timeline import segment_estimate_mj
from millijoule.workers.schemas import (
    BOOK_EPOCHS,
    IMAGE_ROW_SCHEMA,
    Commit,
    CounterRead,
    PowerTrace,
    Segment,
    wraps,
)
from millijoule.workers.storage.protocol import Store

#: A file is written anew at each flush until it has been written this often, or a table has so many rows. Until then
#: the rows stay in memory, some hundred bytes each.
LIVE_PART_FLUSHES = 60
LIVE_PART_ROWS = 4_096

#: Tables whose files begin and end together: power has a row per device and second, and would cut the others short.
_TABLE_GROUPS = (("counter", "segment", "attempt", "node_reading"), ("power",))

_LIVE_PART = re.compile(rf"{LIVE_PREFIX}(?P<table>\w+)/run_id=(?P<run>[^/]+)/\d+-\d+\.parquet")


class LiveTables:
    """What one driver writes while it runs. Rows wait in memory until `flush`, which may be repeated when it fails.

    Args:
        epoch: of the driver; two drivers never write the same file.
    """

    def __init__(self, store: Store, fingerprint: str, epoch: int) -> None:
        self.epoch = epoch
        run_id = run_id_of(fingerprint)

        def key(table: str, part: int) -> str:
            return f"{LIVE_PREFIX}{table}/run_id={run_id}/{epoch:06d}-{part:06d}.parquet"

        limits = (LIVE_PART_FLUSHES, LIVE_PART_ROWS)
        self._files = [GrowingFiles(store, group, key, *limits) for group in _TABLE_GROUPS]
        self._of_table = {table: files for files in self._files for table in files.rows}
        self._last_read: dict[str, tuple[str, int]] = {}
        self._places: dict[str, tuple[str, str]] = {}  # node and host of each worker that committed
        self._segments = 0

    def add_commit(self, commit: Commit) -> None:
        """A commit that now stands, with the segments and power samples it carries."""
        self._add("attempt", [committed_attempt(commit, commit.energy_mj)])
        self._places[commit.worker_id] = commit.node_id, commit.host
        # those of its parts are its own
        self.add_segments(
            replace(s, attempt_id=commit.attempt_id) if s.attempt_id in commit.parts else s
            for s in commit.segments
        )
        self.add_power(commit.worker_id, commit.power)

    def add_segments(self, segments: Iterable[Segment]) -> None:
        """Segments as their worker reported them, oldest first."""
        for s in segments:
            for read in (s.open, s.close):
                at = (read.boot_id, read.t_mono_ns)
                if self._last_read.get(s.worker_id) != at:
                    self._last_read[s.worker_id] = at
                    self._add("counter", read_rows(s.worker_id, read))
            segment_id = self.epoch << 32 | self._segments
            self._segments += 1
            self._add("segment", _segment_rows(segment_id, s))

    def add_power(self, worker_id: str, traces: Iterable[PowerTrace]) -> None:
        """Samples that worker `worker_id` took; node and host are null where it has not committed anything yet."""
        for trace in traces:
            self._add("power", power_rows(trace, *self._places.get(worker_id, (None, None))))

    def add_node_readings(self, rows: Iterable[tuple]) -> None:
        """Rows of the `node_reading` table."""
        self._add("node_reading", rows)

    def _add(self, table: str, rows: Iterable[tuple]) -> None:
        self._of_table[table].add(table, rows)

    def flush(self) -> None:
        """As `GrowingFiles.flush`."""
        for files in self._files:
            if files.flush() and "counter" in files.rows:
                self._last_read.clear()  # a file holds both reads of each of its segments


def _segment_rows(segment_id: int, s: Segment) -> Iterator[tuple]:
    who = (segment_id, s.worker_id, s.segment_class, s.shard_id, s.attempt_id)
    when = (s.open.t_mono_ns, s.close.t_mono_ns, s.open.t_wall_ns)
    estimate_mj = segment_estimate_mj(s)
    for domain in sorted(s.open.energy_mj.keys() | s.close.energy_mj.keys()) or (None,):
        before, after = s.open.energy_mj.get(domain or ""), s.close.energy_mj.get(domain or "")
        scale = (s.open.boot_id, s.open.epoch_of(domain) if domain else s.open.epoch)
        same_scale = domain and scale == (s.close.boot_id, s.close.epoch_of(domain))
        known = same_scale and before is not None and after is not None and after >= before
        energy_mj = after - before if known else None  # type: ignore[operator]
        yield (*who, *scale, *when, domain, energy_mj, "undivided" if known else "missing", estimate_mj)
        estimate_mj = None


def live_parts(store: Store) -> dict[str, list[str]]:
    """Keys of the live files by table, in order; empty where no job is running or crashed."""
    parts: dict[str, list[str]] = defaultdict(list)
    for item in store.list(LIVE_PREFIX):
        if match := _LIVE_PART.fullmatch(item.key):
            parts[match["table"]].append(item.key)
    return {table: sorted(keys) for table, keys in parts.items()}


def read_live_table(store: Store, name: str) -> pa.Table:
    """All rows of a live table."""
    tables = [table_of(name, [])]
    for key in live_parts(store).get(name, ()):
        with store.open_input(key) as source:
            tables.append(pq.ParquetFile(source).read())
    # parts of a driver of an earlier version may lack columns
    return pa.concat_tables(tables, promote_options="default")


def read_live_segments(store: Store) -> list[Segment]:
    """The segments that live rows describe, for `build_ledger`. Estimates keep their differences, not their zero."""
    reads: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)  # rows of each
    for row in read_live_table(store, "counter").to_pylist():
        reads[row["worker_id"], row["boot_id"], row["t_mono_ns"]].append(row)
    parts: dict[int, list[dict[str, Any]]] = defaultdict(list)  # of each segment, one row per domain
    for row in read_live_table(store, "segment").to_pylist():
        parts[row["segment_id"]].append(row)
    segments = []
    for rows in parts.values():
        first = rows[0]
        ends = []
        for end, estimate in (("t_open_mono_ns", 0), ("t_close_mono_ns", first["energy_estimate_mj"])):
            t_ns = first[end]
            read = reads.get((first["worker_id"], first["boot_id"], t_ns), [])
            t_wall_ns = first["t_open_wall_ns"] + t_ns - first["t_open_mono_ns"]
            energy_mj = {row["domain"]: row["energy_mj"] for row in read}
            epochs = _epochs(read or rows)
            ends.append(CounterRead(first["boot_id"], t_ns, t_wall_ns, 0, energy_mj, estimate, *epochs))
        who = (first["worker_id"], first["segment_class"])
        segments.append(Segment(*who, ends[0], ends[1], first["shard_id"], first["attempt_id"]))
    return segments


def _epochs(rows: Sequence[dict[str, Any]]) -> tuple[int, int | None]:
    """`epoch` and `wrap_epoch` of a read, from rows of its domains."""
    wrapping = [row["epoch"] for row in rows if row["domain"] and wraps(row["domain"])]
    others = [row["epoch"] for row in rows if not row["domain"] or not wraps(row["domain"])]
    wrap_epoch = wrapping[0] if wrapping else None
    return (others[0] if others else wrapping[0] % BOOK_EPOCHS), wrap_epoch


def read_live_tables(store: Store, job: JobSpec) -> dict[str, pa.Table]:
    """What can be said of a job before it ends: its tables as of the last flush, counters divided among workers.

    The `image` and `closure` tables are empty: images get their share when all is known.
    """
    commits = [_as_commit(row, job) for row in read_live_table(store, "attempt").to_pylist()]
    uncommitted = Uncommitted(workers=read_workers(store), nodes=read_live_table(store, "node_reading"))
    winners = {c.shard_id: c.attempt_id for c in commits}
    devices = held_devices(uncommitted.workers, commits)
    ledger = build_ledger(read_live_segments(store), winners, devices)
    no_images = RowTables(lambda commit: IMAGE_ROW_SCHEMA.empty_table())
    rows = EnergyRows(job, ledger, CommitTable.of(commits), no_images, uncommitted)
    tables = {
        name: pa.concat_tables([table_of(name, []), *(block for _, block in blocks)])
        for name, blocks in rows.tables()
    }
    return {**tables, "power": read_live_table(store, "power"), "closure": table_of("closure", [])}


def _as_commit(row: dict[str, Any], job: JobSpec) -> Commit:
    """What an attempt row says of its commit."""
    known = {f.name: row[f.name] for f in fields(Commit) if f.name in row}
    known["energy_domains"] = tuple(d for d in row["energy_domains"].split(",") if d)
    known["images_filtered"] = row["images_filtered"] or 0
    known |= {"plan_fingerprint": job.fingerprint, "model_sha256": job.model_sha256}
    return Commit(**known, files=(), rows_path="", errors={}, segments=())
