"""The nine energy tables: their columns, units and how files of them are encoded.

Each table lies in `energy/<name>/run_id=<job>/date=<UTC day>/part-*.parquet`; the two partition columns are in the
path only. Columns carry their unit in the name and in the field's metadata (mJ, mW, ns, 1), integers are
delta-packed, repeated strings are dictionaries, all of it zstd.
"""

from __future__ import annotations

from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.schemas import SEGMENT_CLASSES

ENERGY_SCHEMA_VERSION = 3

#: Rows per row group: DuckDB's own default, its unit of parallel work.
ROW_GROUP_ROWS = 122_880

#: Hexadecimal digits of the job's fingerprint that name it in paths.
RUN_ID_DIGITS = 12

_UNITS = {"mj": "mJ", "mw": "mW", "ns": "ns", "share": "1"}


def _field(name: str, kind: pa.DataType, text: str = "", *, nullable: bool = True) -> pa.Field:
    metadata = {"unit": _UNITS.get(name.rpartition("_")[2], ""), "description": text}
    if name == "energy_mj":
        metadata["otel"] = "hw.energy"
    elif metadata["unit"] == "mW":
        metadata["otel"] = "hw.power"
    return pa.field(name, kind, nullable, {k: v for k, v in metadata.items() if v})


def _schema(table: str, *fields: pa.Field) -> pa.Schema:
    version_text = str(ENERGY_SCHEMA_VERSION)
    return pa.schema(fields, metadata={"millijoule.table": table, "millijoule.schema_version": version_text})


_MONO = "CLOCK_MONOTONIC of the host's boot"

#: The tables by name. `closure` is written last: where it is, all others are complete.
ENERGY_SCHEMAS = {
    "counter": _schema(
        "counter",
        _field("worker_id", pa.string(), nullable=False),
        _field("boot_id", pa.string(), "of the host that was read", nullable=False),
        _field(
            "epoch",
            pa.int32(),
            "another one when a counter of the host was reset; of processors it names the counter book, too",
            nullable=False,
        ),
        _field("domain", pa.string(), nullable=False),
        _field("t_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_wall_ns", pa.int64(), "since 1970, to the millisecond", nullable=False),
        _field("read_latency_ns", pa.int64(), "the value is at most this old, to 0.1 ms", nullable=False),
        _field("energy_mj", pa.int64(), "cumulative, unwrapped", nullable=False),
    ),
    "power": _schema(
        "power",
        _field("boot_id", pa.string(), "of the host that was read", nullable=False),
        _field("node_id", pa.string()),
        _field("host", pa.string()),
        _field("device", pa.string(), "UUID of the GPU", nullable=False),
        _field("t_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("power_average_mw", pa.int64(), "NVML field 185, averaged over a second; null: not readable"),
        _field("power_instant_mw", pa.int64(), "NVML field 186; null: not readable"),
        _field("source", pa.string(), nullable=False),
    ),
    "segment": _schema(
        "segment",
        _field("segment_id", pa.int64(), "several rows, one per domain; null: a gap between segments"),
        _field("worker_id", pa.string(), "null: a gap"),
        _field("segment_class", pa.string(), ", ".join((*SEGMENT_CLASSES, "off")), nullable=False),
        _field("shard_id", pa.int64()),
        _field("attempt_id", pa.string()),
        _field("boot_id", pa.string(), nullable=False),
        _field("epoch", pa.int32(), "of the domain at the open read", nullable=False),
        _field("t_open_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_close_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_open_wall_ns", pa.int64(), "since 1970; of a gap, from the host's reads", nullable=False),
        _field("domain", pa.string(), "null: the worker measured nothing"),
        _field("energy_mj", pa.int64(), "this worker's share; null: missing"),
        _field(
            "quality",
            pa.string(),
            "measured, short (near the counter's resolution), missing; undivided: while the job runs, the worker's "
            "own difference, other workers' shares included",
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
        _field("t_start_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("t_end_wall_ns", pa.int64(), "since 1970", nullable=False),
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
        _field("attempt_id", pa.string(), "the winning one", nullable=False),
        _field("sha256", pa.string(), "of the encoded image"),
        _field("energy_direct_mj", pa.int64(), "equal share of the shard; null: missing"),
        _field(
            "energy_full_mj",
            pa.int64(),
            "direct and an equal share of all overhead; null: something is missing",
        ),
        _field("energy_estimate_mj", pa.int64(), "modelled, direct"),
    ),
    "env": _schema(
        "env",
        _field("worker_id", pa.string(), nullable=False),
        _field("boot_id", pa.string(), "of its host"),
        _field("node_id", pa.string(), "Ray's; null: the worker was lost before it said"),
        _field("host", pa.string()),
        _field("device", pa.string(), "UUID of the (first) GPU, or cpu"),
        _field("gpus", pa.string(), "all GPUs it held, comma-separated; empty: none; null: not known"),
        _field("device_name", pa.string(), "product name of GPU or CPU; null: not known"),
        _field("driver_epoch", pa.int64(), "run of the job that started the worker"),
        _field("t_first_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("energy_method", pa.string()),
        _field("energy_domains", pa.string(), "every domain it ever read, comma-separated"),
        _field("model_name", pa.string()),
        _field("model_sha256", pa.string()),
        _field("plan_fingerprint", pa.string()),
        _field("millijoule_version", pa.string(), "that planned the job"),
        _field("python_version", pa.string(), "null: not known"),
        _field("torch_version", pa.string(), "null: not known, or the model does without"),
        _field("driver_version", pa.string(), "of the GPU; null: not known, or no GPU"),
    ),
    "node_reading": _schema(
        "node_reading",
        _field("host", pa.string(), nullable=False),
        _field("node_id", pa.string(), "Ray's; null: imported"),
        _field("boot_id", pa.string(), "of the node; null: imported"),
        _field(
            "meter", pa.string(), "a node's meters are alternatives, each measures all of it", nullable=False
        ),
        _field("feed", pa.string(), "of the meter; the feeds of one meter add up", nullable=False),
        _field("source", pa.string(), "what was read; null: the meter could not be read, see note"),
        _field("t_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("t_error_ns", pa.int64(), "how far t_wall_ns may be off the node's clock"),
        _field("energy_mj", pa.int64(), "cumulative; null: the meter says power"),
        _field("power_mw", pa.int64(), "null: the meter says energy"),
        _field("quantum_mj", pa.int64(), "value of the last digit of energy_mj"),
        _field("quantum_mw", pa.int64(), "value of the last digit of power_mw"),
        _field("max_gap_ns", pa.int64(), "power is not integrated across more than this", nullable=False),
        _field("accuracy_share", pa.float64(), "of the instrument, as stated; null: not stated"),
        _field("rest_mw", pa.int64(), "declared: what no counter sees; null: not declared"),
        _field("rest_tolerance_mw", pa.int64(), "declared with it"),
        _field("domains", pa.string(), "counters the node should have, comma-separated; null: not known"),
        _field("note", pa.string(), "why the meter could not be read; null: it could"),
    ),
    "node_energy": _schema(
        "node_energy",
        _field("host", pa.string(), nullable=False),
        _field("boot_id", pa.string(), nullable=False),
        _field("meter", pa.string(), nullable=False),
        _field("t_open_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_close_mono_ns", pa.int64(), _MONO, nullable=False),
        _field("t_open_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("t_close_wall_ns", pa.int64(), "since 1970", nullable=False),
        _field("part", pa.string(), "node (its meter), device or rest (declared)", nullable=False),
        _field("name", pa.string(), "of the part: feed, domain, or declared", nullable=False),
        _field("source", pa.string(), "of a node's part: the readings used", nullable=False),
        _field("energy_mj", pa.int64(), nullable=False),
        _field("tolerance_mj", pa.int64(), "bound of its error", nullable=False),
    ),
    "closure": _schema(
        "closure",
        _field("check", pa.string(), "C1 to C6, see docs/energy-tables.md", nullable=False),
        _field(
            "scope", pa.string(), "what was checked: a counter, a device, a host or the job", nullable=False
        ),
        _field("expected_mj", pa.int64()),
        _field("found_mj", pa.int64()),
        _field("residual_mj", pa.int64(), "found - expected"),
        _field("residual_share", pa.float64(), "residual / expected"),
        _field("tolerance_share", pa.float64(), "0: must be exact"),
        _field("tolerance_mj", pa.int64(), "C3: the sum of all error bounds"),
        _field("residual_ns", pa.int64(), "C6: how far the host's two clocks moved apart"),
        _field("tolerance_ns", pa.int64()),
        _field("passed", pa.bool_(), "null: not applicable"),
        _field("note", pa.string(), nullable=False),
    ),
}

_PLAIN_STRINGS = frozenset({"prompt_id", "sha256"})  # all different: a dictionary would be a copy


def run_id_of(fingerprint: str) -> str:
    """How paths and the `run_id` column name the job with this plan fingerprint."""
    return fingerprint[:RUN_ID_DIGITS]


def table_of(name: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    """`rows`, whose values are in the order of the columns, as a table of `ENERGY_SCHEMAS[name]`."""
    schema = ENERGY_SCHEMAS[name]
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def repeated_strings(name: str) -> list[pa.Field]:
    """The string columns of a table whose values stand in many rows, and so are stored as dictionaries."""
    return [f for f in ENERGY_SCHEMAS[name] if pa.types.is_string(f.type) and f.name not in _PLAIN_STRINGS]


def open_parquet_writer(path: Path | BytesIO, name: str) -> pq.ParquetWriter:
    """A writer for one file of table `name`; its metadata say which version of this program wrote it."""
    schema = ENERGY_SCHEMAS[name]
    numbers = {f.name: "DELTA_BINARY_PACKED" for f in schema if pa.types.is_integer(f.type)}
    writer = pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=[f.name for f in repeated_strings(name)],
        column_encoding=numbers,
        write_page_index=True,
    )
    writer.add_key_value_metadata({"millijoule.version": version("millijoule")})
    return writer
