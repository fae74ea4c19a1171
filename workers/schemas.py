"""Data that crosses between a worker and the rest of the system: what to draw, what was drawn, what it cost.

Everything here is a frozen dataclass or a PyArrow schema; nothing here does I/O. Times are nanoseconds, energies
integer millijoules, sizes bytes or pixels. A missing measurement is `None`, never 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

SCHEMA_VERSION = 1

#: One row of the plan: one prompt, possibly several images. A shard is one Parquet row group of these.
PLAN_ROW_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string()),
        pa.field("seed", pa.uint64()),  # null: derived from (job seed, prompt id, image index)
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("width", pa.int32()),  # null: the model's own size
        pa.field("height", pa.int32()),
        pa.field("num_inference_steps", pa.int32()),  # null: the model's own default
        pa.field("guidance_scale", pa.float64()),
        pa.field(
            "extra", pa.string()
        ),  # JSON object of the columns we pass through, null when there are none
        pa.field("source", pa.string(), nullable=False),  # "file:row", 1-based data row, for messages
    ]
)

#: One row per (prompt id, image index) as a worker writes it, without the image bytes.
IMAGE_ROW_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("image_index", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string()),
        pa.field("seed", pa.uint64(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_inference_steps", pa.int32()),
        pa.field("guidance_scale", pa.float64()),
        pa.field("status", pa.string(), nullable=False),  # "ok" | "quarantined"
        pa.field("error", pa.string()),
        pa.field("warnings", pa.list_(pa.string())),
        pa.field(
            "path", pa.string()
        ),  # of the object holding the image, relative to the output; tar: "x.tar#member"
        pa.field("sha256", pa.string()),  # of the encoded image bytes; null when quarantined
        pa.field("size_bytes", pa.int64()),
        pa.field("extra", pa.string()),
    ]
)


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    `width`/`height` (pixels), `num_inference_steps` and `guidance_scale` are None for the model's own default.
    `seed` is in [0, 2**64).
    """

    prompt_id: str
    image_index: int
    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    extra: str | None = None
    source: str = ""


@dataclass(frozen=True)
class ImageRow:
    """The outcome of one `ImageRequest`; the fields are the columns of `IMAGE_ROW_SCHEMA`."""

    request: ImageRequest
    status: str
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    path: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()

    def as_record(self) -> dict[str, Any]:
        """This row as a mapping with the columns of `IMAGE_ROW_SCHEMA`."""
        r = self.request
        return {
            "prompt_id": r.prompt_id,
            "image_index": r.image_index,
            "prompt": r.prompt,
            "negative_prompt": r.negative_prompt,
            "seed": r.seed,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": r.guidance_scale,
            "status": self.status,
            "error": self.error,
            "warnings": list(self.warnings) or None,
            "path": self.path,
            "sha256": self.sha256,
            "size_bytes": self.size_bytes,
            "extra": r.extra,
        }


#: An image row in a commit: the values of `IMAGE_ROW_SCHEMA`'s columns in order, `warnings` a list.
CarriedRow = tuple[Any, ...]

#: A commit carries the rows of its shard where they are few and short: opening a file for each takes longer than the row
#: itself, at the end of a job; and commits stay small.
MAX_CARRIED_ROWS = 16
MAX_CARRIED_BYTES = 8192

STATUSES = ("ok", "quarantined")

#: What JSON has for a column's type, and the numbers that fit it.
_JSON_TYPES = {
    pa.string(): str,
    pa.float64(): float,
    pa.list_(pa.string()): list,
    **dict.fromkeys((pa.int32(), pa.int64(), pa.uint64()), int),
}
_CARRIED_TYPES = tuple(
    (_JSON_TYPES[f.type],) if not f.nullable else (_JSON_TYPES[f.type], type(None)) for f in IMAGE_ROW_SCHEMA
)
_CARRIED_RANGES = tuple(
    (i, -(2 ** (f.type.bit_width - 1)), 2 ** (f.type.bit_width - 1))
    if pa.types.is_signed_integer(f.type)
    else (i, 0, 2**64)
    for i, f in enumerate(IMAGE_ROW_SCHEMA)
    if pa.types.is_integer(f.type)
)
_CARRIED_WARNINGS = IMAGE_ROW_SCHEMA.get_field_index("warnings")
_CARRIED_STATUS = IMAGE_ROW_SCHEMA.get_field_index("status")


def carried_rows(rows: Sequence[ImageRow]) -> tuple[CarriedRow, ...] | None:
    """What a commit carries of its shard's rows: all of them, or None where they are many or long."""
    if len(rows) > MAX_CARRIED_ROWS:
        return None
    table = pa.Table.from_pylist([row.as_record() for row in rows], schema=IMAGE_ROW_SCHEMA)
    carried = tuple(tuple(row.values()) for row in table.to_pylist())  # the very values that the file holds
    return carried if len(json.dumps(carried, separators=(",", ":"))) <= MAX_CARRIED_BYTES else None


def parse_carried_rows(raw: Any) -> tuple[CarriedRow, ...]:
    """The rows that a commit's JSON carries; raises ValueError where they do not fit `IMAGE_ROW_SCHEMA`."""
    if type(raw) is not list:
        raise ValueError(f"its rows are {raw!r:.100}")
    return tuple(_parse_carried_row(row) for row in raw)


def _parse_carried_row(row: Any) -> CarriedRow:
    if type(row) is not list or len(row) != len(_CARRIED_TYPES):
        raise ValueError(f"a row is {row!r:.100}, not {len(_CARRIED_TYPES)} values")
    for i, (value, types) in enumerate(zip(row, _CARRIED_TYPES, strict=True)):
        if type(value) not in types:
            raise ValueError(f"a row has {value!r:.100} for {IMAGE_ROW_SCHEMA[i].name}")
        if type(value) is str:
            value.encode()  # half of a surrogate pair is no text
    for i, low, end in _CARRIED_RANGES:
        if row[i] is not None and not low <= row[i] < end:
            raise ValueError(f"a row has {row[i]} for {IMAGE_ROW_SCHEMA[i].name}")
    for warning in row[_CARRIED_WARNINGS] or ():
        if type(warning) is not str:
            raise ValueError(f"a row has {warning!r:.100} for a warning")
        warning.encode()
    if row[_CARRIED_STATUS] not in STATUSES:
        raise ValueError(f"a row has status {row[_CARRIED_STATUS]!r:.100}")
    return tuple(row)


#: A counter book has so many epochs of its own in `wrap_epoch`, and books on a boot differ in a number below the other.
BOOK_EPOCHS = 1 << 10
BOOK_NUMBERS = 1 << 21


def wraps(domain: str) -> bool:
    """Whether the counter of `domain` wraps, so that its total is known to whoever followed it only."""
    return not domain.startswith("gpu:")


@dataclass(frozen=True, slots=True)
class CounterRead:
    """One reading of every energy counter a worker can see, at one instant.

    `energy_mj` maps a domain ("gpu:GPU-<uuid>", "cpu:package-0", "dram:package-0") to its cumulative counter in
    millijoules since the counter's own zero, already unwrapped; a domain that could not be read is absent.
    `estimate_mj` is a modelled figure on a scale of its own (see `workers.meters.meter`), never mixed with `energy_mj`.
    `t_mono_ns` is CLOCK_MONOTONIC of host boot `boot_id`, comparable between processes of one boot only.
    `epoch` grows when a counter was reset. `wrap_epoch` names the book, too, in which wrapping counters were unwrapped
    (`workers.meters.counter_book`); None: not stated.
    """

    boot_id: str
    t_mono_ns: int
    t_wall_ns: int
    latency_ns: int
    energy_mj: dict[str, int] = field(default_factory=dict)
    estimate_mj: int | None = None
    epoch: int = 0
    wrap_epoch: int | None = None

    def epoch_of(self, domain: str) -> int:
        """Readings of a domain may be subtracted within one boot and one of these only."""
        return self.wrap_epoch if self.wrap_epoch is not None and wraps(domain) else self.epoch

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> CounterRead:
        """Inverse of `dataclasses.asdict`; names are shared with all others, a ledger holds many reads."""
        energy_mj = {sys.intern(domain): mj for domain, mj in dict(raw["energy_mj"]).items()}
        return CounterRead(**{**raw, "boot_id": sys.intern(raw["boot_id"]), "energy_mj": energy_mj})


#: What a worker was doing between two reads.
SEGMENT_CLASSES = ("load", "warmup", "idle", "shard", "loser", "retry", "gap")


@dataclass(frozen=True, slots=True)
class Segment:
    """The stretch between two counter reads of one worker. The close read opens the worker's next segment."""

    worker_id: str
    segment_class: str
    open: CounterRead
    close: CounterRead
    shard_id: int | None = None
    attempt_id: str | None = None

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Segment:
        """Inverse of `dataclasses.asdict`."""
        return next(segments_from_dicts([raw]))


def segments_from_dicts(raws: Iterable[dict[str, Any]]) -> Iterator[Segment]:
    """Inverse of `dataclasses.asdict` of each; a read that closes one segment and opens the next is one object."""
    last_raw, last = None, None
    for raw in raws:
        opened = last if last is not None and raw["open"] == last_raw else CounterRead.from_dict(raw["open"])
        last_raw, last = raw["close"], CounterRead.from_dict(raw["close"])
        names = {
            name: sys.intern(raw[name])
            for name in ("worker_id", "segment_class", "attempt_id")
            if raw.get(name) is not None
        }
        yield Segment(**{**raw, **names, "open": opened, "close": last})


class PowerSample(NamedTuple):
    """One look at a device's power, in milliwatts; None: not supported. Not energy, and never summed into it.

    `t_mono_ns` and `t_wall_ns` are when the device says it took the values. A tuple, so that a commit's JSON stays
    small.
    """

    t_mono_ns: int
    t_wall_ns: int
    power_average_mw: int | None  # mean of one second (NVML field 185)
    power_instant_mw: int | None  # NVML field 186


@dataclass(frozen=True)
class PowerTrace:
    """Samples of one device in order of time. `device` is a full GPU UUID: the counter's domain is "gpu:" before it."""

    device: str
    boot_id: str
    source: str
    samples: tuple[PowerSample, ...]

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> PowerTrace:
        """Inverse of `dataclasses.asdict`."""
        return PowerTrace(**{**raw, "samples": tuple(PowerSample(*s) for s in raw["samples"])})


@dataclass(frozen=True)
class WorkerEnvironment:
    """Where and with what a worker runs, stated once before it loads its model; None: not known.

    `opened` is its first counter read: from then on the worker owes an account of its devices (see `WorkerClosing`).
    `device` is the first of `gpus` (full UUIDs where they could be found), or "cpu". `device_name` is the product's
    name of the GPU or CPU, `driver_version` the GPU driver's. `torch_version` is None too where the model does
    without PyTorch.
    """

    worker_id: str
    driver_epoch: int
    node_id: str
    host: str
    device: str
    gpus: tuple[str, ...]
    device_name: str | None
    driver_version: str | None
    python_version: str
    torch_version: str | None
    energy_method: str
    opened: CounterRead | None = None

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> WorkerEnvironment:
        """Inverse of `to_json`; raises ValueError or TypeError where it is not one."""
        raw = json.loads(data)
        gpus, opened = tuple(raw["gpus"]), raw.get("opened")
        read = None if opened is None else CounterRead.from_dict(opened)
        return WorkerEnvironment(**{**raw, "gpus": gpus, "opened": read})


@dataclass(frozen=True)
class WorkerClosing:
    """The end of a worker's account of its devices: a counter read at or after the worker's end.

    Written by the driver. `read` is the worker's own last one, or of somebody on the same host who read the same counters
    once the worker was gone: what lies between the worker's last recorded segment and it is a gap with energy. None:
    nobody could read them, for `reason`; then what the worker used last is missing.

    Attributes:
        driver_epoch: the run of the job that wrote it. Where that is not the run that started the worker, it is not known
            how long the worker went on.
        by: worker id of who read; the worker's own where it closed its books itself.
    """

    worker_id: str
    driver_epoch: int
    by: str
    read: CounterRead | None
    reason: str = ""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @staticmethod
    def from_json(data: bytes) -> WorkerClosing:
        """Inverse of `to_json`; raises ValueError or TypeError where it is not one."""
        raw = json.loads(data)
        read = None if raw["read"] is None else CounterRead.from_dict(raw["read"])
        return WorkerClosing(**{**raw, "read": read})


@dataclass(frozen=True)
class DataFile:
    """A data object of an attempt; `path` is relative to the output folder."""

    path: str
    size_bytes: int
    sha256: str
    rows: int


#: Names that stand in many commits of a job; one object each, however many commits are held.
_REPEATED = (
    *("attempt_id", "worker_id", "node_id", "host", "device"),
    *("plan_fingerprint", "model_sha256", "energy_method"),
)


@dataclass(frozen=True, slots=True)
class Commit:
    """The one object whose exclusive creation makes an attempt the truth for its shard."""

    shard_id: int
    attempt_id: str
    driver_epoch: int
    worker_id: str
    node_id: str
    host: str
    device: str
    plan_fingerprint: str
    model_sha256: str
    files: tuple[DataFile, ...]
    rows_path: str  # Parquet file whose IMAGE_ROW_SCHEMA columns describe every row of the shard
    images_ok: int
    images_quarantined: int
    errors: dict[str, int]  # message -> count, at most 20 kinds
    t_start_wall_ns: int
    t_end_wall_ns: int
    energy_mj: int | None  # counter difference over the shard, all measured domains; None: not measured
    energy_domains: tuple[str, ...]
    energy_estimate_mj: int | None
    energy_method: str  # "nvml-counter", "rapl", "nvml-counter+rapl", "missing"
    segments: tuple[
        Segment, ...
    ]  # everything this worker closed since its previous commit, this shard's included
    power: tuple[PowerTrace, ...] = ()  # what this worker sampled since its previous commit
    rows: tuple[CarriedRow, ...] | None = None  # what the file at rows_path says, see `carried_rows`
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        raw = asdict(self)
        if self.rows is None:
            del raw["rows"]
        return json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_json(data: bytes) -> Commit:
        """Parse a commit object; raises ValueError or TypeError where it is not one."""
        return Commit.from_dict(json.loads(data))

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Commit:
        """The commit whose JSON says `raw`; raises as `from_json`."""
        raw = dict(raw)
        raw["files"] = tuple(DataFile(**f) for f in raw["files"])
        raw["energy_domains"] = tuple(map(sys.intern, raw["energy_domains"]))
        raw["segments"] = tuple(segments_from_dicts(raw["segments"]))
        raw["power"] = tuple(PowerTrace.from_dict(t) for t in raw.get("power", ()))
        if raw.get("rows") is not None:
            raw["rows"] = parse_carried_rows(raw["rows"])
        names = {name: sys.intern(raw[name]) for name in _REPEATED}
        return Commit(**{**raw, **names})
