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

from millijoule.pipeline.output.image_rows import rows_as_table
from millijoule.workers.schemas import SEGMENT_CLASSES

ENERGY_SCHEMA_VERSION = 5

#: Columns that files of an earlier version lack; what they say is null of all that was committed then, or 0.
_ADDED_IN_5: dict[str, tuple[str, ...]] = {
    "env": ("engine", "rungs", "batch_size", "cpu_threads", "price_per_hour")
}
ADDED_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "3": {
        "attempt": ("images_filtered", "images_drawn", "energy_filtered_mj", "energy_quarantined_mj"),
        **_ADDED_IN_5,
    },
    "4": _ADDED_IN_5,
}

#: Rows per row group: DuckDB's own default, its unit of parallel work.
ROW_GROUP_ROWS = 122_880

#: Hexadecimal digits of the job's fingerprint that name it in paths.
RUN_ID_DIGITS = 12

_UNITS = {"mj": "mJ", "mw": "mW", "ns": "ns", "share": "1"}

TEXT, INT, INT32, FLOAT, BOOL = pa.string(), pa.int64(), pa.int32(), pa.float64(), pa.bool_()


def _field(name: str, kind: pa.DataType, text: str = "", *, nullable: bool = False) -> pa.Field:
    metadata = {"unit": _UNITS.get(name.rpartition("_")[2], ""), "description": text}
    if name == "energy_mj":
        metadata["otel"] = "hw.energy"
    elif metadata["unit"] == "mW":
        metadata["otel"] = "hw.power"
    return pa.field(name, kind, nullable, {k: v for k, v in metadata.items() if v})


def _maybe(name: str, kind: pa.DataType, text: str = "") -> pa.Field:
    """A column that may have nulls."""
    return _field(name, kind, text, nullable=True)


_MONO = "CLOCK_MONOTONIC of the host's boot"

_FIELDS = {
    "counter": (
        _field("worker_id", TEXT),
        _field("boot_id", TEXT, "of the host that was read"),
        _field(
            "epoch",
            INT32,
            "another one when a counter of the host was reset; of processors it names the counter book, too",
        ),
        _field("domain", TEXT),
        _field("t_mono_ns", INT, _MONO),
        _field("t_wall_ns", INT, "since 1970, to the millisecond"),
        _field("read_latency_ns", INT, "the value is at most this old, to 0.1 ms"),
        _field("energy_mj", INT, "cumulative, unwrapped"),
    ),
    "power": (
        _field("boot_id", TEXT, "of the host that was read"),
        _maybe("node_id", TEXT),
        _maybe("host", TEXT),
        _field("device", TEXT, "UUID of the GPU"),
        _field("t_mono_ns", INT, _MONO),
        _field("t_wall_ns", INT, "since 1970"),
        _maybe("power_average_mw", INT, "NVML field 185, averaged over a second; null: not readable"),
        _maybe("power_instant_mw", INT, "NVML field 186; null: not readable"),
        _field("source", TEXT),
    ),
    "segment": (
        _maybe("segment_id", INT, "several rows, one per domain; null: a gap between segments"),
        _maybe("worker_id", TEXT, "null: a gap"),
        _field("segment_class", TEXT, ", ".join((*SEGMENT_CLASSES, "off"))),
        _maybe("shard_id", INT),
        _maybe("attempt_id", TEXT),
        _field("boot_id", TEXT),
        _field("epoch", INT32, "of the domain at the open read"),
        _field("t_open_mono_ns", INT, _MONO),
        _field("t_close_mono_ns", INT, _MONO),
        _field("t_open_wall_ns", INT, "since 1970; of a gap, from the host's reads"),
        _maybe("domain", TEXT, "null: the worker measured nothing"),
        _maybe("energy_mj", INT, "this worker's share; null: missing"),
        _field(
            "quality",
            TEXT,
            "measured, short (near the counter's resolution), missing; undivided: while the job runs, "
            "the worker's own difference, other workers' shares included",
        ),
        _maybe("energy_estimate_mj", INT, "modelled; on the segment's first row only"),
    ),
    "attempt": (
        _field("shard_id", INT),
        _field("attempt_id", TEXT),
        _field("outcome", TEXT, "committed, loser or retry"),
        _field("worker_id", TEXT),
        _maybe("node_id", TEXT),
        _maybe("host", TEXT),
        _maybe("device", TEXT),
        _maybe("driver_epoch", INT),
        _field("t_start_wall_ns", INT, "since 1970"),
        _field("t_end_wall_ns", INT, "since 1970"),
        _maybe("images_ok", INT, "accepted; this and the next are null where nothing was committed"),
        _maybe("images_filtered", INT, "that the model's safety checker hid"),
        _maybe("images_quarantined", INT),
        _maybe(
            "images_drawn", INT, "to the end, whatever their status; null: not stated, only accepted ones"
        ),
        _maybe("energy_mj", INT, "the attempt's share of all its domains; null: missing"),
        _maybe("energy_filtered_mj", INT, "part of energy_mj: share of the filtered images"),
        _maybe(
            "energy_quarantined_mj", INT, "part of energy_mj: share of the quarantined images that were drawn"
        ),
        _maybe("energy_estimate_mj", INT, "modelled"),
        _maybe("energy_method", TEXT),
        _maybe("energy_domains", TEXT, "comma-separated"),
    ),
    "image": (
        _field("prompt_id", TEXT),
        _field("image_index", INT32),
        _field("shard_id", INT),
        _field("attempt_id", TEXT, "the winning one"),
        _maybe("sha256", TEXT, "of the encoded image"),
        _maybe(
            "energy_direct_mj", INT, "equal share of what the shard's accepted images used; null: missing"
        ),
        _maybe(
            "energy_full_mj", INT, "direct and an equal share of all overhead; null: something is missing"
        ),
        _maybe("energy_estimate_mj", INT, "modelled, direct"),
    ),
    "env": (
        _field("worker_id", TEXT),
        _maybe("boot_id", TEXT, "of its host"),
        _maybe("node_id", TEXT, "Ray's; null: the worker was lost before it said"),
        _maybe("host", TEXT),
        _maybe("device", TEXT, "UUID of the (first) GPU, or cpu"),
        _maybe("gpus", TEXT, "all GPUs it held, comma-separated; empty: none; null: not known"),
        _maybe("device_name", TEXT, "product name of GPU or CPU; null: not known"),
        _maybe("driver_epoch", INT, "run of the job that started the worker"),
        _field("t_first_wall_ns", INT, "since 1970"),
        _maybe("energy_method", TEXT),
        _maybe("energy_domains", TEXT, "every domain it ever read, comma-separated"),
        _maybe("model_name", TEXT),
        _maybe("model_sha256", TEXT),
        _maybe("plan_fingerprint", TEXT),
        _maybe("millijoule_version", TEXT, "that planned the job"),
        _maybe("python_version", TEXT, "null: not known"),
        _maybe("torch_version", TEXT, "null: not known, or the model does without"),
        _maybe("driver_version", TEXT, "of the GPU; null: not known, or no GPU"),
        _maybe("pool", TEXT, "of the worker, as --pool names it; null: the job has none, or not known"),
        _maybe("engine", TEXT, "that runs the model's networks; null: its own kernels do, or not known"),
        _maybe("rungs", TEXT, "what makes the model cheaper, as options; null: not known"),
        _maybe("batch_size", INT, "most images of the model's own size per call; null: not known"),
        _maybe("cpu_threads", INT, "of the worker on its host; null: not known"),
        _maybe("price_per_hour", FLOAT, "of its device, as its pool states it; null: not stated"),
    ),
    "node_reading": (
        _field("host", TEXT),
        _maybe("node_id", TEXT, "Ray's; null: imported"),
        _maybe("boot_id", TEXT, "of the node; null: imported"),
        _field("meter", TEXT, "a node's meters are alternatives, each measures all of it"),
        _field("feed", TEXT, "of the meter; the feeds of one meter add up"),
        _maybe("source", TEXT, "what was read; null: the meter could not be read, see note"),
        _field("t_wall_ns", INT, "since 1970"),
        _maybe("t_error_ns", INT, "how far t_wall_ns may be off the node's clock"),
        _maybe("energy_mj", INT, "cumulative; null: the meter says power"),
        _maybe("power_mw", INT, "null: the meter says energy"),
        _maybe("quantum_mj", INT, "value of the last digit of energy_mj"),
        _maybe("quantum_mw", INT, "value of the last digit of power_mw"),
        _field("max_gap_ns", INT, "power is not integrated across more than this"),
        _maybe("accuracy_share", FLOAT, "of the instrument, as stated; null: not stated"),
        _maybe("rest_mw", INT, "declared: what no counter sees; null: not declared"),
        _maybe("rest_tolerance_mw", INT, "declared with it"),
        _maybe("domains", TEXT, "counters the node should have, comma-separated; null: not known"),
        _maybe("note", TEXT, "why the meter could not be read; null: it could"),
    ),
    "node_energy": (
        _field("host", TEXT),
        _field("boot_id", TEXT),
        _field("meter", TEXT),
        _field("t_open_mono_ns", INT, _MONO),
        _field("t_close_mono_ns", INT, _MONO),
        _field("t_open_wall_ns", INT, "since 1970"),
        _field("t_close_wall_ns", INT, "since 1970"),
        _field("part", TEXT, "node (its meter), device or rest (declared)"),
        _field("name", TEXT, "of the part: feed, domain, or declared"),
        _field("source", TEXT, "of a node's part: the readings used"),
        _field("energy_mj", INT),
        _field("tolerance_mj", INT, "bound of its error"),
    ),
    "closure": (
        _field("check", TEXT, "C1 to C6, see docs/energy-tables.md"),
        _field("scope", TEXT, "what was checked: a counter, a device, a host or the job"),
        _maybe("expected_mj", INT),
        _maybe("found_mj", INT),
        _maybe("residual_mj", INT, "found - expected"),
        _maybe("residual_share", FLOAT, "residual / expected"),
        _maybe("tolerance_share", FLOAT, "0: must be exact"),
        _maybe("tolerance_mj", INT, "C3: the sum of all error bounds"),
        _maybe("residual_ns", INT, "C6: how far the host's two clocks moved apart"),
        _maybe("tolerance_ns", INT),
        _maybe("passed", BOOL, "null: not applicable"),
        _field("note", TEXT),
    ),
}

#: The tables by name. `closure` is written last: where it is, all others are complete.
ENERGY_SCHEMAS = {
    table: pa.schema(
        fields, {"millijoule.table": table, "millijoule.schema_version": str(ENERGY_SCHEMA_VERSION)}
    )
    for table, fields in _FIELDS.items()
}

_PLAIN_STRINGS = frozenset({"prompt_id", "sha256"})  # all different: a dictionary would be a copy


def run_id_of(fingerprint: str) -> str:
    """How paths and the `run_id` column name the job with this plan fingerprint."""
    return fingerprint[:RUN_ID_DIGITS]


def table_of(name: str, rows: list[tuple[Any, ...]]) -> pa.Table:
    """`rows`, whose values are in the order of the columns, as a table of `ENERGY_SCHEMAS[name]`."""
    return rows_as_table(ENERGY_SCHEMAS[name], rows)


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
