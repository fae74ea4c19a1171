"""The raw rows of a comparison as Arrow tables: what was read, drawn and judged.

One schema per file of a bundle. Times are nanoseconds, energies integer millijoules; what was not measured is null.
Columns that follow from others (`DERIVED_BLOCK_COLUMNS`) are there for readers and are recomputed by every check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from millijoule.workers.schemas import CounterRead, PowerTrace

TEXT, FLAG, SHORT, LONG, DOUBLE = pa.string(), pa.bool_(), pa.int32(), pa.int64(), pa.float64()


def _schema(columns: list[tuple[str, pa.DataType]], nullable: tuple[str, ...] = ()) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns])


READ_SCHEMA = _schema(
    [
        ("block_id", TEXT),
        ("read_index", SHORT),  # 0 opens the block, the last one closes it
        ("boot_id", TEXT),
        ("epoch", SHORT),
        ("t_mono_ns", LONG),
        ("t_wall_ns", LONG),
        ("latency_ns", LONG),
        ("energy", pa.list_(pa.struct([("domain", TEXT), ("energy_mj", LONG)]))),
        ("estimate_mj", LONG),
    ],
    nullable=("estimate_mj",),
)

BLOCK_SCHEMA = _schema(
    [
        ("block_id", TEXT),  # as scheduled; warm-up and top-up have their own
        ("ordinal", SHORT),  # order of execution
        ("session", SHORT),  # run of the program that executed it
        ("kind", TEXT),
        ("arm", TEXT),
        ("side", TEXT),
        ("telemetry", FLAG),
        ("quadruple", SHORT),
        ("first_request", SHORT),
        ("registration_sha256", TEXT),
        ("images", LONG),
        ("accepted", LONG),
        ("seconds", DOUBLE),
        ("energy_mj", LONG),
        ("estimate_mj", LONG),
    ],
    nullable=("energy_mj", "estimate_mj"),
)
DERIVED_BLOCK_COLUMNS = ("images", "accepted", "seconds", "energy_mj", "estimate_mj")

#: In order of drawing within a block.
IMAGE_SCHEMA = _schema([("block_id", TEXT), ("request", SHORT), ("sha256", TEXT)])

#: One row per distinct (request, sha256).
JUDGEMENT_SCHEMA = _schema(
    [
        ("request", SHORT),
        ("sha256", TEXT),
        ("blank", FLAG),
        ("accepted", FLAG),  # by the judge's rule alone
        ("icons", TEXT),
        ("score", DOUBLE),
        ("metrics", pa.list_(DOUBLE)),  # in the order of the registered ones
    ],
    nullable=("icons", "score"),
)

#: Of each arm's first image of each request, and of the reference; `arm` is "A", "B" or "reference".
FEATURE_SCHEMA = _schema([("arm", TEXT), ("request", SHORT), ("values", pa.list_(pa.float32()))])

#: One row per distinct image; `pixels` is uint8 `[height, width, 3]` in C order.
PIXEL_SCHEMA = _schema([("sha256", TEXT), ("height", SHORT), ("width", SHORT), ("pixels", pa.binary())])

#: Samples taken during blocks, once a second.
POWER_SCHEMA = _schema(
    [
        ("block_id", TEXT),
        ("device", TEXT),  # full UUID; the counter's domain is "gpu:" before it
        ("t_mono_ns", LONG),  # of the boot of the block's reads
        ("power_average_mw", LONG),  # NVML field 185
        ("power_instant_mw", LONG),  # NVML field 186
    ],
    nullable=("power_average_mw", "power_instant_mw"),
)

SECOND_METER_SCHEMA = _schema(
    [
        ("source", TEXT),  # "power": same device, integrated; "node": whole machine
        ("t_wall_ns", LONG),
        ("energy_mj", LONG),  # since any zero
    ]
)

SCHEMAS = {
    "reads.parquet": READ_SCHEMA,
    "blocks.parquet": BLOCK_SCHEMA,
    "images.parquet": IMAGE_SCHEMA,
    "judgements.parquet": JUDGEMENT_SCHEMA,
    "features.parquet": FEATURE_SCHEMA,
    "pixels.parquet": PIXEL_SCHEMA,
    "second_meter.parquet": SECOND_METER_SCHEMA,
    "power.parquet": POWER_SCHEMA,
}
OPTIONAL_TABLES = ("pixels.parquet", "second_meter.parquet", "power.parquet")


@dataclass(frozen=True)
class Rows:
    """All tables of one comparison, each by its schema in `SCHEMAS`."""

    reads: pa.Table
    blocks: pa.Table
    images: pa.Table
    judgements: pa.Table
    features: pa.Table
    pixels: pa.Table | None = None
    second_meter: pa.Table | None = None
    power: pa.Table | None = None  # None: nothing was sampled

    def by_file(self) -> Iterator[tuple[str, pa.Table]]:
        """File name and table of those that are there."""
        for name in SCHEMAS:
            table = getattr(self, name.removesuffix(".parquet"))
            if table is not None:
                yield name, table


@dataclass(frozen=True)
class EncodedImages:
    """The image table as numbers, for millions of rows. `pair` tells distinct (request, sha256) apart.

    `block[i]` is an index of `block_ids`, `pair[i]` one of `pairs`; `[n]` each, in the order of the table.
    """

    block_ids: list[str]
    block: np.ndarray
    request: np.ndarray
    pairs: list[tuple[int, str]]
    pair: np.ndarray


def encode_images(images: pa.Table) -> EncodedImages:
    """Give numbers to the blocks and to the distinct images of a table of `IMAGE_SCHEMA`."""
    block_ids, block = _encode(images["block_id"])
    digests, digest = _encode(images["sha256"])
    request = images["request"].to_numpy().astype(np.int64)
    n = max(1, len(digests))
    distinct, pair = np.unique(request * n + digest, return_inverse=True)
    pairs = [(int(key) // n, digests[int(key) % n]) for key in distinct]
    return EncodedImages(block_ids, block, request, pairs, pair)


def decode_pixels(pixels: pa.Table) -> dict[str, np.ndarray]:
    """Images of a table of `PIXEL_SCHEMA`, uint8 `[height, width, 3]`, by digest."""
    return {
        row["sha256"]: np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)
        for row in pixels.to_pylist()
    }


def split_by_block(block: np.ndarray, values: np.ndarray, n: int) -> list[np.ndarray]:
    """`values` of each of blocks 0 to n - 1, in their order; `block` and `values` are `[images]`."""
    order = np.argsort(block, kind="stable")
    return np.split(values[order], np.searchsorted(block[order], np.arange(1, n)))[:n]


def _encode(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    if not len(column):
        return [], np.zeros(0, np.int64)
    encoded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    return encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)


def read_row(block_id: str, index: int, read: CounterRead) -> dict[str, object]:
    """A `CounterRead` as a row of `READ_SCHEMA`."""
    return {
        **asdict(read),
        "block_id": block_id,
        "read_index": index,
        "energy": [{"domain": d, "energy_mj": mj} for d, mj in sorted(read.energy_mj.items())],
    }


def power_rows(block_id: str, traces: Iterable[PowerTrace]) -> list[dict[str, object]]:
    """The samples of a block as rows of `POWER_SCHEMA`."""
    return [
        {"block_id": block_id, "device": trace.device, **sample._asdict()}
        for trace in traces
        for sample in trace.samples
    ]


def reads_by_block(reads: pa.Table) -> dict[str, list[CounterRead]]:
    """Each block's reads in the order of `read_index`."""
    found: dict[str, list[CounterRead]] = {}
    for row in sorted(reads.to_pylist(), key=lambda r: (r["block_id"], r["read_index"])):
        found.setdefault(row["block_id"], []).append(
            CounterRead(
                row["boot_id"],
                row["t_mono_ns"],
                row["t_wall_ns"],
                row["latency_ns"],
                {part["domain"]: part["energy_mj"] for part in row["energy"]},
                row["estimate_mj"],
                row["epoch"],
            )
        )
    return found
