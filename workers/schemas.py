"""Data that crosses between a worker and the rest of the system: what to draw, what was drawn, what it cost.

Everything here is a frozen dataclass, a named tuple where millions are made, or a PyArrow schema; nothing here does I/O. Times are nanoseconds, energies
integer millijoules, sizes bytes or pixels. A missing measurement is `None`, never 0.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Annotated, Any, Literal, NamedTuple, Self

import msgspec
import pyarrow as pa

from millijoule.workers.records import decode, encode

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
        ),  # JSON object of the columns passed through, null where there are none
        pa.field("source", pa.string(), nullable=False),  # "file:row", 1-based data row, for messages
        pa.field("lora", pa.string()),  # as `loras.words.read_cell` gives it; null: all declared ones
    ]
)

#: What became of an image: it is there; the model's own safety checker hid it, so that there is none; it could not be drawn.
STATUSES = ("ok", "filtered", "quarantined")

#: One row per (prompt id, image index) as a worker writes it, without the image bytes. `width` and `height` are those of what
#: was drawn to the end, whether or not there is an image of it, else null.
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
        pa.field("status", pa.string(), nullable=False),  # see STATUSES
        pa.field("error", pa.string()),  # why there is no image; null where the status is "ok"
        pa.field("warnings", pa.list_(pa.string())),
        pa.field("path", pa.string()),  # of the object with the image, below the output; tar: "x.tar#member"
        pa.field("sha256", pa.string()),  # of the encoded image bytes; null where there is no image
        pa.field("size_bytes", pa.int64()),
        pa.field("extra", pa.string()),
    ]
)


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    `width`/`height` (pixels), `num_inference_steps` and `guidance_scale` are None for the model's own default.
    `seed` is in [0, 2**64). `lora` says which of the declared LoRAs are used, None: all (`loras.words`).
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
    lora: str | None = None

    @classmethod
    def many(cls, fields: Iterable[dict[str, Any]]) -> list[Self]:
        """One with each of `fields`, all of its fields, which become the request's own; nothing is checked.

        The constructor of a frozen dataclass sets field after field by a call, which takes several times as long.
        """
        new, set_attribute = object.__new__, object.__setattr__
        requests = []
        for own in fields:
            request = new(cls)
            set_attribute(request, "__dict__", own)
            requests.append(request)
        return requests


class ImageRow(NamedTuple):
    """The outcome of one `ImageRequest`; the fields are the columns of `IMAGE_ROW_SCHEMA`.

    Only a row with status "ok" has an image, and so a path.
    """

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

    def stored(self, path: str, sha256: str, size_bytes: int) -> ImageRow:
        """The same row, its image stored."""
        return ImageRow(
            self.request,
            self.status,
            self.width,
            self.height,
            self.num_inference_steps,
            path,
            sha256,
            size_bytes,
            self.error,
            self.warnings,
        )

    def values(self) -> tuple[Any, ...]:
        """The columns of `IMAGE_ROW_SCHEMA`, in order."""
        asked = self.request
        return (
            asked.prompt_id,
            asked.image_index,
            asked.prompt,
            asked.negative_prompt,
            asked.seed,
            self.width,
            self.height,
            self.num_inference_steps,
            asked.guidance_scale,
            self.status,
            self.error,
            list(self.warnings) or None,
            self.path,
            self.sha256,
            self.size_bytes,
            asked.extra,
        )

    def as_record(self) -> dict[str, Any]:
        """This row as a mapping with the columns of `IMAGE_ROW_SCHEMA`."""
        return dict(zip(IMAGE_ROW_SCHEMA.names, self.values(), strict=True))


#: What a row has of its request.
_ASKED = attrgetter(
    "prompt_id", "image_index", "prompt", "negative_prompt", "seed", "guidance_scale", "extra"
)


def row_columns(rows: Sequence[ImageRow]) -> tuple[Sequence[Any], ...]:
    """The columns of `IMAGE_ROW_SCHEMA`, in order, of `rows`, of which there is one at least; see `ImageRow.values`."""
    requests, statuses, widths, heights, steps, paths, hashes, sizes, errors, warnings = zip(
        *rows, strict=True
    )
    ids, indices, prompts, negatives, seeds, scales, extras = zip(*map(_ASKED, requests), strict=True)
    told = [list(words) or None for words in warnings]
    of_request = ids, indices, prompts, negatives, seeds
    return (
        *(*of_request, widths, heights, steps, scales),
        *(statuses, errors, told, paths, hashes, sizes, extras),
    )


Int32 = Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

#: An image row in a commit: the values of `IMAGE_ROW_SCHEMA`'s columns in order.
CarriedRow = tuple[
    str,  # prompt_id
    Int32,  # image_index
    str,  # prompt
    str | None,  # negative_prompt
    Annotated[int, msgspec.Meta(ge=0)],  # seed, below 2**64, which msgspec cannot say
    Int32 | None,  # width
    Int32 | None,  # height
    Int32 | None,  # num_inference_steps
    float | None,  # guidance_scale
    Literal["ok", "filtered", "quarantined"],  # status
    str | None,  # error
    list[str] | None,  # warnings
    str | None,  # path
    str | None,  # sha256
    Int64 | None,  # size_bytes
    str | None,  # extra
]

#: A commit carries the rows of its shard where they are few and short: opening a file for each takes longer than the row
#: itself, at the end of a job; and commits stay small.
MAX_CARRIED_ROWS = 16
MAX_CARRIED_BYTES = 8192


def carried_rows(rows: Sequence[ImageRow]) -> tuple[CarriedRow, ...] | None:
    """What a commit carries of its shard's rows: all of them, or None where they are many or long."""
    if len(rows) > MAX_CARRIED_ROWS:
        return None
    table = pa.Table.from_pylist([row.as_record() for row in rows], schema=IMAGE_ROW_SCHEMA)
    # the very values that the file holds
    carried: Any = tuple(tuple(row.values()) for row in table.to_pylist())
    return carried if len(encode(carried)) <= MAX_CARRIED_BYTES else None


@dataclass(frozen=True)
class RowCounts:
    """How many rows of a shard ended how; `drawn` were drawn to the end, whatever their status."""

    ok: int
    filtered: int
    quarantined: int
    drawn: int

    @staticmethod
    def of(outcomes: Iterable[tuple[str, int | None]]) -> RowCounts:
        """Of rows by status and width; a row of an unknown status counts as quarantined."""
        rows = list(outcomes)
        statuses = Counter(status for status, _ in rows)
        ok, filtered = statuses["ok"], statuses["filtered"]
        drawn = sum(width is not None for _, width in rows)
        return RowCounts(ok, filtered, len(rows) - ok - filtered, drawn)


class Record:
    """What is stored as JSON, see `workers.records`."""

    __slots__ = ()

    def to_json(self) -> bytes:
        return encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Inverse of `to_json`; raises ValueError where `data` is not one."""
        return decode(cls, data)


#: A counter book has so many epochs of its own in `wrap_epoch`, and books on a boot differ in a number below the other.
BOOK_EPOCHS = 1 << 10
BOOK_NUMBERS = 1 << 21


def wraps(domain: str) -> bool:
    """Whether the counter of `domain` wraps, so that its total is known to whoever followed it only."""
    return not domain.startswith("gpu:")


@dataclass(frozen=True, slots=True)
class CounterRead(Record):
    """One reading of every energy counter a worker can see, at one instant.

    `energy_mj` maps a domain ("gpu:GPU-<uuid>", "cpu:package-0", "dram:package-0") to its cumulative counter in
    millijoules since the counter's own zero, already unwrapped; a domain that could not be read is absent.
    `estimate_mj` is a modelled figure on a scale of its own (see `workers.meters.meter`), never mixed with `energy_mj`.
    `t_mono_ns` is CLOCK_MONOTONIC of host boot `boot_id`, comparable between processes of one boot only.
    `epoch` grows when a counter was reset. `wrap_epoch` names the book, too, in which wrapping counters were unwrapped
    (`workers.meters.counter_book`); None: not stated.
    """

    boot_id: str
    t_mono_ns: Int64
    t_wall_ns: Int64
    latency_ns: Int64
    energy_mj: dict[str, Int64] = field(default_factory=dict)
    estimate_mj: Int64 | None = None
    epoch: Int64 = 0
    wrap_epoch: Int64 | None = None

    def __post_init__(self) -> None:
        # names are shared with all others: a ledger holds many reads
        object.__setattr__(self, "boot_id", sys.intern(self.boot_id))
        object.__setattr__(self, "energy_mj", {sys.intern(d): mj for d, mj in self.energy_mj.items()})

    def epoch_of(self, domain: str) -> int:
        """Readings of a domain may be subtracted within one boot and one of these only."""
        return self.wrap_epoch if self.wrap_epoch is not None and wraps(domain) else self.epoch


#: What a worker was doing between two reads.
SEGMENT_CLASSES = ("load", "warmup", "idle", "shard", "loser", "retry", "gap")


@dataclass(frozen=True, slots=True)
class Segment(Record):
    """The stretch between two counter reads of one worker. The close read opens the worker's next segment."""

    worker_id: str
    segment_class: str
    open: CounterRead
    close: CounterRead
    shard_id: int | None = None
    attempt_id: str | None = None

    def __post_init__(self) -> None:
        _intern(self, ("worker_id", "segment_class", "attempt_id"))


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
class PowerTrace(Record):
    """Samples of one device in order of time. `device` is a full GPU UUID: the counter's domain is "gpu:" before it."""

    device: str
    boot_id: str
    source: str
    samples: tuple[PowerSample, ...]


@dataclass(frozen=True)
class WorkerEnvironment(Record):
    """Where and with what a worker runs, stated once before it loads its model; None: not known.

    `opened` is its first counter read: from then on the worker owes an account of its devices (see `WorkerClosing`).
    `device` is the first of `gpus` (full UUIDs where they could be found), or "cpu". `device_name` is the product's
    name of the GPU or CPU, `driver_version` the GPU driver's. `torch_version` is None too where the model does
    without PyTorch. `png_encoder` is "compiled" or "zlib": their files differ, their pixels do not. `kernels` is what draws:
    the form in which the CPU's compiled functions run ("avx2"), "pytorch", or a GPU's own kernels, "triton". `pool` is
    the worker's, None where its job has only one, and `price_per_hour` of its device as the pool states it. What it loaded, known once it
    has: `engine` is what runs the model's networks (None: its own kernels, or the model does not say), `rungs` what makes it cheaper,
    as options ("none": nothing), `batch_size` the most images of the model's own size per call, `cpu_threads` what it computes and
    encodes with on the host.
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
    png_encoder: str | None = None
    kernels: str | None = None
    pool: str | None = None
    engine: str | None = None
    rungs: str | None = None
    batch_size: int | None = None
    cpu_threads: int | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class WorkerClosing(Record):
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
class Commit(Record):
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
    errors: dict[str, int]  # why rows have no image -> count, at most 20 kinds
    t_start_wall_ns: int
    t_end_wall_ns: int
    energy_mj: int | None  # counter difference over the shard, all measured domains; None: not measured
    energy_domains: tuple[str, ...]
    energy_estimate_mj: int | None
    energy_method: str  # "nvml-counter", "rapl", "nvml-counter+rapl", "missing"
    segments: tuple[Segment, ...]  # all that this worker closed since its last commit, this shard's included
    power: tuple[PowerTrace, ...] = ()  # what this worker sampled since its previous commit
    rows: tuple[CarriedRow, ...] | None = None  # what the file at rows_path says, see `carried_rows`
    images_filtered: int = 0
    images_drawn: int | None = None  # to the end, whatever their status; None: from before it was stated
    parts: tuple[str, ...] = ()  # sealed parts that it is made of, of this attempt and of earlier ones
    images_by_others: dict[str, int] = field(
        default_factory=dict
    )  # of images_ok, by worker whose part it took over
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        _intern(self, _REPEATED)
        object.__setattr__(self, "energy_domains", tuple(map(sys.intern, self.energy_domains)))
        for row in self.rows or ():
            if row[4] >= 2**64:
                raise ValueError(f"a row has {row[4]} for seed")
        for before, after in pairwise(self.segments):
            if after.open == before.close:  # one object: a ledger holds many
                object.__setattr__(after, "open", before.close)


def _intern(record: Any, names: Sequence[str]) -> None:
    """Make the texts of these fields one object each with all that are equal."""
    for name in names:
        text = getattr(record, name)
        if text is not None:
            object.__setattr__(record, name, sys.intern(text))
