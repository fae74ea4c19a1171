"""The `energy/` tables: counters, segments, attempts and images as Parquet, for SQL and for auditors.

A ledger and the commits go in, files go to the store. Columns carry their unit in the name and in the field's
metadata; integers are delta-packed, repeated strings dictionaries, all of it zstd. At most one row group per table
and a description of each commit are held.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.apportionment import image_energy, sum_or_none
from millijoule.workers.schemas import SEGMENT_CLASSES, Commit
from millijoule.workers.storage import Store
from millijoule.workers.timeline import segment_estimate_mj

if TYPE_CHECKING:
    from millijoule.pipeline.ledger import Ledger, LedgerEntry

ENERGY_SCHEMA_VERSION = 1

#: Rows per row group: DuckDB's own default, its unit of parallel work.
ROW_GROUP_ROWS = 122_880
#: Row groups per `part-*.parquet`.
PART_ROW_GROUPS = 16
_READ_THREADS = 16

#: Measured stretches shorter than this are labelled "short": 100 times the counter's own update period (NVML moves
#: about every 100 ms, RAPL every 1 ms), which keeps the error of one stretch near half a percent.
SHORT_GPU_NS = 10_000_000_000
SHORT_CPU_NS = 100_000_000


def _field(name: str, kind: pa.DataType, text: str = "", *, nullable: bool = True) -> pa.Field:
    unit = next((u for u in ("mj", "ns") if name.endswith(f"_{u}")), "")
    metadata = {"unit": {"mj": "mJ", "ns": "ns"}.get(unit, ""), "description": text}
    if name == "energy_mj":
        metadata["otel"] = "hw.energy"
    return pa.field(name, kind, nullable, {k: v for k, v in metadata.items() if v})


def _schema(table: str, *fields: pa.Field) -> pa.Schema:
    version = str(ENERGY_SCHEMA_VERSION)
    return pa.schema(fields, metadata={"millijoule.table": table, "millijoule.schema_version": version})


_MONO = "CLOCK_MONOTONIC of the host's boot"

#: The tables under `energy/`, each in `energy/<name>/part-*.parquet`.
ENERGY_SCHEMAS = {
    "counter": _schema(
        "counter",
        _field("worker_id", pa.string(), nullable=False),
        _field("boot_id", pa.string(), nullable=False),
        _field("epoch", pa.int32(), "grows when a counter of the host was reset", nullable=False),
        _field("domain", pa.string(), nullable=False),
        _field("t_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("read_latency_ns", pa.int64(), "the value is at most this old", nullable=False),
        _field("energy_mj", pa.int64(), "cumulative, unwrapped", nullable=False),
    ),
    "segment": _schema(
        "segment",
        _field("segment_id", pa.int64(), "several rows, one per domain; null: a gap between segments"),
        _field("worker_id", pa.string(), "null: a gap"),
        _field("segment_class", pa.string(), ", ".join((*SEGMENT_CLASSES, "off")), nullable=False),
        _field("shard_id", pa.int64()),
        _field("attempt_id", pa.string()),
        _field("boot_id", pa.string(), nullable=False),
        _field("epoch", pa.int32(), "at the open read", nullable=False),
        _field("t_open_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_close_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_open_wall_ns", pa.int64(), "since 1970"),
        _field("domain", pa.string(), "null: the worker measured nothing"),
        _field("energy_mj", pa.int64(), "this worker's share; null: missing"),
        _field(
            "quality",
            pa.string(),
            "measured, short (near the counter's resolution) or missing",
            nullable=False,
        ),
        _field("energy_estimate_mj", pa.int64(), "modelled; on the segment's first row only"),
    ),
    "attempt": _schema(
        "attempt",
        _field("shard_id", pa.int64(), nullable=False),
        _field("attempt_id", pa.string(), nullable=False),
        _field("outcome", pa.string(), "committed, loser or retry", nullable=False),
        _field("worker_id", pa.string(), nullable=False),
        _field("node_id", pa.string()),
        _field("host", pa.string()),
        _field("device", pa.string()),
        _field("driver_epoch", pa.int64()),
        _field("t_start_wall_ns", pa.int64(), "since 1970"),
        _field("t_end_wall_ns", pa.int64(), "since 1970"),
        _field("images_ok", pa.int64()),
        _field("images_quarantined", pa.int64()),
        _field("energy_mj", pa.int64(), "the attempt's share of all its domains; null: missing"),
        _field("energy_estimate_mj", pa.int64(), "modelled"),
        _field("energy_method", pa.string()),
        _field("energy_domains", pa.string(), "comma-separated"),
    ),
    "image": _schema(
        "image",
        _field("prompt_id", pa.string(), nullable=False),
        _field("image_index", pa.int32(), nullable=False),
        _field("shard_id", pa.int64(), nullable=False),
        _field("attempt_id", pa.string(), nullable=False),
        _field("sha256", pa.string(), "of the encoded image"),
        _field("energy_direct_mj", pa.int64(), "equal share of the shard; null: missing"),
        _field(
            "energy_full_mj",
            pa.int64(),
            "direct and an equal share of all overhead; null: something is missing",
        ),
        _field("energy_estimate_mj", pa.int64(), "modelled, direct"),
    ),
}

_PLAIN_STRINGS = frozenset({"prompt_id", "sha256"})  # all different: a dictionary would be a copy


def write_energy_tables(
    store: Store,
    ledger: Ledger,
    commits: Iterable[Commit],
    read_rows: Callable[[Commit], pa.Table] | None = None,
) -> None:
    """Write `energy/<table>/part-*.parquet` for the tables of `ENERGY_SCHEMAS`.

    Args:
        store: the job's output.
        ledger: over the segments of all commits and drivers.
        commits: each committed shard once; read once, without holding the bodies.
        read_rows: gives the `IMAGE_ROW_SCHEMA` rows of a commit; default: its `rows_path` in `store`. Called from
            several threads.

    Raises:
        StoreError: storage failed. Writing again replaces the same parts.
    """
    shards: list[Commit] = []
    _write_parts(store, "counter", _counter_tables(ledger))
    _write_parts(store, "segment", _segment_tables(ledger))
    _write_parts(store, "attempt", _attempt_tables(ledger, commits, shards))
    _write_parts(store, "image", _image_tables(ledger, shards, read_rows or _RowReader(store)))


@dataclass(frozen=True)
class _RowReader:
    store: Store

    def __call__(self, commit: Commit) -> pa.Table:
        with self.store.open_input(commit.rows_path) as source:
            return pq.ParquetFile(source).read(columns=["prompt_id", "image_index", "status", "sha256"])


def _counter_tables(ledger: Ledger) -> Iterator[pa.Table]:
    def rows() -> Iterator[tuple]:
        latest: dict[
            str, tuple[str, int]
        ] = {}  # entries are in order of time: a repeated read follows at once
        for entry in ledger.entries:
            for read in (entry.segment.open, entry.segment.close):
                at = (read.boot_id, read.t_mono_ns)
                if latest.get(entry.segment.worker_id) == at:
                    continue
                latest[entry.segment.worker_id] = at
                for domain, energy_mj in sorted(read.energy_mj.items()):
                    yield (
                        entry.segment.worker_id,
                        read.boot_id,
                        read.epoch,
                        domain,
                        read.t_mono_ns,
                        read.t_wall_ns,
                        read.latency_ns,
                        energy_mj,
                    )

    return _tables("counter", rows())


def _segment_tables(ledger: Ledger) -> Iterator[pa.Table]:
    def rows() -> Iterator[tuple]:
        for segment_id, entry in enumerate(ledger.entries):
            s = entry.segment
            who = (segment_id, s.worker_id, entry.segment_class, s.shard_id, s.attempt_id)
            when = (s.open.boot_id, s.open.epoch, s.open.t_mono_ns, s.close.t_mono_ns, s.open.t_wall_ns)
            duration_ns = s.close.t_mono_ns - s.open.t_mono_ns
            estimate_mj = segment_estimate_mj(s)
            for domain, energy_mj in entry.energy_mj.items() or ((None, None),):
                quality = _quality(domain, energy_mj, duration_ns)
                yield (*who, *when, domain, energy_mj, quality, estimate_mj)
                estimate_mj = None
        for gap in ledger.gaps:
            quality = _quality(gap.domain, gap.energy_mj, gap.t_close_ns - gap.t_open_ns)
            where = (gap.boot_id, gap.epoch, gap.t_open_ns, gap.t_close_ns, None)
            yield (
                None,
                None,
                gap.segment_class,
                None,
                None,
                *where,
                gap.domain,
                gap.energy_mj,
                quality,
                None,
            )

    return _tables("segment", rows())


def _quality(domain: str | None, energy_mj: int | None, duration_ns: int) -> str:
    if domain is None or energy_mj is None:
        return "missing"
    return (
        "short" if duration_ns < (SHORT_GPU_NS if domain.startswith("gpu:") else SHORT_CPU_NS) else "measured"
    )


def _attempt_tables(ledger: Ledger, commits: Iterable[Commit], shards: list[Commit]) -> Iterator[pa.Table]:
    """The attempt table; fills `shards` on the way, because commits are read once."""

    def rows() -> Iterator[tuple]:
        committed: set[tuple[int, str]] = set()
        for c in commits:
            shards.append(replace(c, segments=(), files=(), errors={}))  # the rest is small
            committed.add((c.shard_id, c.attempt_id))
            energy_mj = ledger.shard_energy_mj(c.shard_id, c.attempt_id)
            yield (
                *(
                    c.shard_id,
                    c.attempt_id,
                    "committed",
                    c.worker_id,
                    c.node_id,
                    c.host,
                    c.device,
                    c.driver_epoch,
                ),
                *(c.t_start_wall_ns, c.t_end_wall_ns, c.images_ok, c.images_quarantined, energy_mj),
                *(c.energy_estimate_mj, c.energy_method, ",".join(c.energy_domains)),
            )
        others: dict[tuple[int, str], list[LedgerEntry]] = defaultdict(list)
        for entry in ledger.entries:
            s = entry.segment
            if s.shard_id is None or s.attempt_id is None or (s.shard_id, s.attempt_id) in committed:
                continue
            others[s.shard_id, s.attempt_id].append(entry)
        for (shard_id, attempt_id), entries in sorted(others.items()):
            first, last = entries[0].segment, entries[-1].segment
            yield (
                *(
                    shard_id,
                    attempt_id,
                    "retry" if last.segment_class == "retry" else "loser",
                    first.worker_id,
                ),
                *(None, None, None, None, first.open.t_wall_ns, last.close.t_wall_ns, None, None),
                sum_or_none(e.total_mj for e in entries),
                sum_or_none(segment_estimate_mj(e.segment) for e in entries),
                *(None, ",".join(sorted({d for e in entries for d in e.energy_mj}))),
            )

    return _tables("attempt", rows())


def _image_tables(
    ledger: Ledger, shards: list[Commit], read_rows: Callable[[Commit], pa.Table]
) -> Iterator[pa.Table]:
    schema = ENERGY_SCHEMAS["image"]
    n_images = sum(s.images_ok for s in shards)
    overhead = _overhead_shares(ledger, shards, n_images)
    begin = 0

    def load(shard: Commit) -> tuple[Commit, pa.Table]:
        return shard, read_rows(shard)

    with ThreadPoolExecutor(_READ_THREADS) as threads:
        for start in range(0, len(shards), 4 * _READ_THREADS):
            for commit, rows in threads.map(load, shards[start : start + 4 * _READ_THREADS]):
                rows = rows.filter(pc.equal(rows["status"], "ok"))
                n = rows.num_rows
                direct = image_energy(ledger.shard_energy_mj(commit.shard_id, commit.attempt_id), n)
                full = [
                    None if mj is None or overhead is None else mj + overhead[0] + (begin + i < overhead[1])
                    for i, mj in enumerate(direct)
                ]
                begin += n
                yield pa.table(
                    [
                        rows["prompt_id"],
                        rows["image_index"],
                        pa.array([commit.shard_id] * n, pa.int64()),
                        pa.array([commit.attempt_id] * n, pa.string()),
                        rows["sha256"],
                        pa.array(direct, pa.int64()),
                        pa.array(full, pa.int64()),
                        pa.array(image_energy(commit.energy_estimate_mj, n), pa.int64()),
                    ],
                    schema=schema,
                )


def _overhead_shares(ledger: Ledger, shards: list[Commit], n_images: int) -> tuple[int, int] | None:
    """Each image's share of all that no image used directly, and how many of the first get 1 mJ more."""
    total_mj = ledger.summary()["total_mj"]
    direct = [ledger.shard_energy_mj(s.shard_id, s.attempt_id) for s in shards if s.images_ok]
    direct_mj = sum_or_none(direct)
    if total_mj is None or direct_mj is None or not n_images:
        return None
    return divmod(total_mj - direct_mj, n_images)


def _tables(name: str, rows: Iterator[tuple]) -> Iterator[pa.Table]:
    """`rows` as tables of at most a row group."""
    schema = ENERGY_SCHEMAS[name]
    block: list[tuple] = []
    for row in rows:
        block.append(row)
        if len(block) == ROW_GROUP_ROWS:
            yield _table(schema, block)
            block = []
    yield _table(schema, block)


def _table(schema: pa.Schema, rows: list[tuple]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _write_parts(store: Store, name: str, tables: Iterator[pa.Table]) -> None:
    """Stream `tables` into parts of `PART_ROW_GROUPS` row groups; always at least one part."""
    schema = ENERGY_SCHEMAS[name]
    part = 0
    groups = _regrouped(schema, tables)
    group = next(groups)
    while group is not None:
        with tempfile.TemporaryDirectory(prefix="millijoule-") as scratch:
            path = Path(scratch, "part.parquet")
            with _parquet_writer(path, schema) as writer:
                for _ in range(PART_ROW_GROUPS):
                    writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
                    group = next(groups, None)
                    if group is None:
                        break
            store.put_file(f"energy/{name}/part-{part:05d}.parquet", path)
        part += 1


def _regrouped(schema: pa.Schema, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Small tables put together until they fill a row group; one empty table where there are no rows."""
    held: list[pa.Table] = [schema.empty_table()]
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        if count >= ROW_GROUP_ROWS:
            yield pa.concat_tables(held)
            held, count = [schema.empty_table()], 0
    yield pa.concat_tables(held)


def _parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    strings = [f.name for f in schema if pa.types.is_string(f.type) and f.name not in _PLAIN_STRINGS]
    numbers = {f.name: "DELTA_BINARY_PACKED" for f in schema if pa.types.is_integer(f.type)}
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=strings,
        column_encoding=numbers,
        write_page_index=True,
    )
