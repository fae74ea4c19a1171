"""Rows become shards: alike in size and steps, and as far as it goes in LoRAs, guidance and having a negative prompt; cut when they
have enough images, written as Parquet row groups.

A call of a model has one mix of LoRAs, one guidance scale, and negative prompts for all its rows or for none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.planning.plan import SHARD_INDEX_SCHEMA

#: Row groups of a part: enough to keep objects few, few enough for a quick footer.
SHARDS_PER_PART = 256

#: Shards of fewer images are not compressed: their columns are so short that it makes them longer, and a compressor is set
#: up for each of them, which took two thirds of the time that a plan of one-row shards takes.
_MIN_COMPRESSED_IMAGES = 16

#: Rows that wait for their shard to fill; above either limit those of one size are cut into shards as they are.
MAX_WAITING_ROWS = 200_000
MAX_WAITING_BYTES = 128 * 2**20

#: Rows of one shard are equal in these.
_ALIKE = ("width", "height", "num_inference_steps")

#: Size and steps in one number; mix of LoRAs; guidance scale; whether there is a negative prompt.
BucketKey = tuple[int, str, float, bool]

#: Start and end of a shard, or of what waits to become one, among rows.
Range = tuple[int, int]


class ShardCutter:
    """Sorts rows into buckets of what can share a call of a model, and cuts a shard whenever a bucket has enough images.

    What of a bucket does not fill a shard shares one with other buckets of the same size and step count: at the end, and when
    too many rows wait. Its rows are then in order of their buckets, so that each model's calls are of neighbours.

    Shards come in the order in which they become full. Rows keep their order within a bucket.

    Args:
        shard_size: images per shard at most, unless a single row has more.
        emit: takes rows and the ends of the shards among them.
    """

    def __init__(self, shard_size: int, emit: Callable[[pa.RecordBatch, list[Range]], None]) -> None:
        self._shard_size = shard_size
        self._emit = emit
        self._rows: pa.RecordBatch | None = None  # those that wait, in input order
        self._buckets: dict[BucketKey, list[int]] = {}  # their positions
        self._images: dict[BucketKey, int] = {}  # in each bucket

    def add(self, rows: pa.RecordBatch) -> None:
        """Take rows in input order; emits the shards they complete."""
        first = self._rows.num_rows if self._rows is not None else 0
        held = rows if self._rows is None else pa.concat_batches([self._rows, rows])
        shards: list[list[int]] = []
        buckets, images, size = self._buckets, self._images, self._shard_size

        def complete(key: BucketKey) -> None:
            shards.append(buckets.pop(key))
            del images[key]

        row_images = rows["num_images"].to_pylist()
        for position, (key, n) in enumerate(zip(_bucket_keys(rows), row_images, strict=True), first):
            if key in buckets and images[key] + n > size:
                complete(key)
            if key in buckets:
                buckets[key].append(position)
                images[key] += n
            else:
                buckets[key], images[key] = [position], n
            if images[key] >= size:
                complete(key)
        waiting = sum(map(len, buckets.values()))
        allowed = min(MAX_WAITING_ROWS, int(MAX_WAITING_BYTES * held.num_rows / max(held.nbytes, 1)))
        if waiting > allowed:
            shards += self._merge(held, allowed)
        self._emit_shards(held, shards)

    def finish(self) -> None:
        """Emit what is left, in the order of the first rows."""
        if self._rows is not None:
            self._emit_shards(self._rows, sorted(self._merge(self._rows, 0), key=min))

    def _merge(self, held: pa.RecordBatch, allowed: int) -> list[list[int]]:
        """Shards of the buckets of one size and step count together, the fullest first, until `allowed` rows wait."""
        alike: dict[int, list[BucketKey]] = {}
        for key in self._buckets:
            alike.setdefault(key[0], []).append(key)
        waiting = {size: sum(len(self._buckets[key]) for key in keys) for size, keys in alike.items()}
        images = held["num_images"].to_numpy()
        shards: list[list[int]] = []
        left = sum(waiting.values())
        for size in sorted(alike, key=lambda size: -waiting[size]):
            if left <= allowed:
                break
            left -= waiting[size]
            positions = [p for key in sorted(alike[size]) for p in self._buckets.pop(key)]
            for key in alike[size]:
                del self._images[key]
            shards += _cut(positions, images[positions].tolist(), self._shard_size)
        return shards

    def _emit_shards(self, held: pa.RecordBatch, shards: list[list[int]]) -> None:
        """Emit the rows of `held` at these positions; the others wait on."""
        if not shards:
            self._rows = held
            return
        ends = np.cumsum([len(shard) for shard in shards]).tolist()
        self._emit(held.take(pa.array(np.concatenate(shards))), list(zip([0, *ends], ends, strict=False)))
        waiting = np.array([p for bucket in self._buckets.values() for p in bucket], np.int64)
        kept = np.sort(waiting)
        self._rows = held.take(pa.array(kept))  # a copy, so that `held` can go
        moved = iter(np.searchsorted(kept, waiting).tolist())
        self._buckets = {key: list(islice(moved, len(bucket))) for key, bucket in self._buckets.items()}


def _cut(positions: list[int], images: list[int], shard_size: int) -> list[list[int]]:
    """`positions` in runs of at most `shard_size` images, or of a single row that has more."""
    shards: list[list[int]] = []
    n_images = shard_size
    for position, n in zip(positions, images, strict=True):
        if n_images + n > shard_size:
            shards.append([])
            n_images = 0
        shards[-1].append(position)
        n_images += n
    return shards


def _bucket_keys(rows: pa.RecordBatch) -> Iterator[BucketKey]:
    """A key per row: its first part is equal where size and steps are equal, all of it where rows can share a call.

    Null counts as 0 for sizes and steps, which no row may have, as infinity for guidance and as no text for LoRAs.
    """
    width, height, steps = (
        pc.fill_null(rows[name], 0).to_numpy(zero_copy_only=False).astype(np.int64) for name in _ALIKE
    )
    guidance = pc.fill_null(rows["guidance_scale"], float("inf")).to_pylist()
    negative = pc.is_valid(rows["negative_prompt"]).to_pylist()
    loras = pc.fill_null(rows["lora"], "").to_pylist()
    sizes = (((width << 14) | height) << 10 | steps).tolist()
    return zip(sizes, loras, guidance, negative, strict=True)


class ShardWriter:
    """Writes shards as row groups of part files in a local folder, and keeps their index.

    Args:
        schema: of the rows, `PLAN_ROW_SCHEMA` or more.
        shard_size: images per shard, about.
    """

    def __init__(self, folder: Path, schema: pa.Schema, shard_size: int) -> None:
        self.n_rows = 0
        self.n_images = 0
        self.n_shards = 0
        self.parts: list[Path] = []
        self._folder = folder
        self._schema = schema
        self._compression = "zstd" if shard_size >= _MIN_COMPRESSED_IMAGES else "none"
        self._open = ExitStack()
        self._part: pq.ParquetWriter
        self._index: list[pa.RecordBatch] = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, rows: pa.RecordBatch, ranges: list[Range]) -> None:
        """Append the shards `rows[start:end]` for each of `ranges`, which follow one another."""
        starts = pa.array([start for start, _ in ranges])
        n_images = np.add.reduceat(rows["num_images"].to_numpy(), starts.to_numpy())
        shard_ids = np.arange(self.n_shards, self.n_shards + len(ranges))
        for shard_id, (start, end) in zip(shard_ids.tolist(), ranges, strict=True):
            if shard_id % SHARDS_PER_PART == 0:
                self._next_part()
            self._part.write_batch(rows.slice(start, end - start), row_group_size=end - start)
        columns = [
            pa.array(shard_ids),
            pa.array(shard_ids // SHARDS_PER_PART, pa.int32()),
            pa.array(shard_ids % SHARDS_PER_PART, pa.int32()),
            pa.array([end - start for start, end in ranges], pa.int32()),
            pa.array(n_images),
            *(rows[name].take(starts) for name in (*_ALIKE, "prompt_id")),
            pa.array(_rows_digests(rows, ranges)),
        ]
        self._index.append(pa.RecordBatch.from_arrays(columns, schema=SHARD_INDEX_SCHEMA))
        self.n_shards += len(ranges)
        self.n_rows += rows.num_rows
        self.n_images += int(n_images.sum())

    def write_index(self, name: str, record: bytes) -> Path:
        """Write the index, with `record` (JSON) in its metadata under `name`."""
        path = self._folder / "shards.parquet"
        table = pa.Table.from_batches(self._index, SHARD_INDEX_SCHEMA).replace_schema_metadata({name: record})
        pq.write_table(table, path, compression="zstd")
        return path

    def _next_part(self) -> None:
        self._open.close()
        self.parts.append(self._folder / f"part-{len(self.parts):05d}.parquet")
        writer = pq.ParquetWriter(
            self.parts[-1],
            self._schema,
            compression=self._compression,
            use_dictionary=False,
            write_statistics=False,
        )
        self._part = self._open.enter_context(writer)


def _rows_digests(rows: pa.RecordBatch, ranges: list[Range]) -> list[str]:
    """`Shard.rows_sha256` of each range, hashed straight from the Arrow buffer."""
    texts = pc.binary_join_element_wise(rows["prompt_id"], pc.cast(rows["num_images"], pa.string()), "", "\0")
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    view = memoryview(data)
    return [hashlib.sha256(view[ends[start] : ends[end]]).hexdigest() for start, end in ranges]
