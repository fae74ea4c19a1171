"""One shard of the plan: where its rows lie, how a worker reads them, and which images they ask for.

A `Shard` names one Parquet row group of a plan part. In go a shard and the store, out come its rows and the image
requests with their final seeds. Nothing here decides what belongs to a shard; that is `pipeline.planning.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from operator import attrgetter
from threading import Lock
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import DamagedError
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.storage.protocol import Store

#: Seeds are unsigned 64-bit; a row's seed counts up by image index and wraps here.
SEED_RANGE = 2**64

#: Parts of the plan that a `ShardRowReader` holds, and how long their rows may be: shards of one row are read together.
MAX_HELD_PARTS, MAX_HELD_BYTES = 4, 1 << 20


@dataclass(frozen=True, slots=True)
class Shard:
    """A slice of the plan, homogeneous in size and steps: row group `row_group` of the plan part at `key`.

    `rows_sha256` is SHA-256 in hex over `prompt_id NUL num_images NUL` of each row; ids hold no NUL. `width`/`height` (pixels) and `num_inference_steps` are None for the
    model's own default.
    """

    shard_id: int
    key: str
    row_group: int
    n_rows: int
    n_images: int
    width: int | None
    height: int | None
    num_inference_steps: int | None
    first_prompt_id: str
    rows_sha256: str


class PlanRow(NamedTuple):
    """One prompt of the plan; the fields are the columns of `PLAN_ROW_SCHEMA`.

    `first_image_index` is a column of retry rounds only: there a row stands for one image of its prompt. Plans from before
    there were LoRAs have no column `lora`.
    """

    prompt_id: str
    prompt: str
    negative_prompt: str | None
    seed: int | None
    num_images: int
    width: int | None
    height: int | None
    num_inference_steps: int | None
    guidance_scale: float | None
    extra: str | None
    source: str
    lora: str | None = None
    first_image_index: int = 0

    @property
    def image_indices(self) -> range:
        """Of the images it asks for."""
        return range(self.first_image_index, self.first_image_index + self.num_images)


_COUNT, _FIRST_INDEX = attrgetter("num_images"), attrgetter("first_image_index")


def read_shard_rows(store: Store, shard: Shard, footer: pq.FileMetaData | None = None) -> list[PlanRow]:
    """The rows of `shard`, in plan order; `footer` of its plan part, if that was read before.

    Raises:
        NotFoundError: the plan part is gone.
        DamagedError: the part cannot be read, or holds other rows than the plan's index says.
    """
    with store.open_input(shard.key) as source, _damaged_plan(store, shard):
        table = pq.ParquetFile(source, metadata=footer).read_row_group(shard.row_group, use_threads=False)
        rows = _as_plan_rows(table)
    return _require_planned(store, shard, rows)


class ShardRowReader:
    """Reads the rows of many shards, neighbours about together: a part of the plan is opened once. From any thread.

    It holds the footers of the last `MAX_HELD_PARTS` parts, and their rows where these are few.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        # by key: the footer, and the rows of each row group unless these are many
        self._parts: dict[str, tuple[pq.FileMetaData, list[list[PlanRow]] | None]] = {}
        self._lock = Lock()

    def read(self, shard: Shard) -> list[PlanRow]:
        """See `read_shard_rows`."""
        with self._lock:
            part = self._parts.get(shard.key)
            if part is None:
                part = self._parts[shard.key] = _open_part(self.store, shard)
                if len(self._parts) > MAX_HELD_PARTS:
                    del self._parts[next(iter(self._parts))]
        footer, shards = part
        if shards is None or shard.row_group >= len(shards):
            return read_shard_rows(self.store, shard, footer)
        return _require_planned(self.store, shard, shards[shard.row_group])


def _open_part(store: Store, shard: Shard) -> tuple[pq.FileMetaData, list[list[PlanRow]] | None]:
    with store.open_input(shard.key) as source, _damaged_plan(store, shard):
        file = pq.ParquetFile(source)
        footer = file.metadata
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        if sum(g.total_byte_size for g in groups) > MAX_HELD_BYTES:
            return footer, None
        try:
            rows = iter(_as_plan_rows(file.read(use_threads=False)))
        except (
            pa.ArrowException,
            OSError,
            KeyError,
        ):  # whose row group is damaged is said when that is asked for
            return footer, None
        return footer, [list(islice(rows, g.num_rows)) for g in groups]


@contextmanager
def _damaged_plan(store: Store, shard: Shard) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, IndexError, OSError, KeyError) as error:
        raise DamagedError(
            f"{_where(store, shard)}: cannot read the rows of shard {shard.shard_id}: {error}. The plan is damaged; "
            "start again in another --output"
        ) from error


def _as_plan_rows(table: pa.Table) -> list[PlanRow]:
    there = set(table.column_names)
    columns = [
        table[name].to_pylist() if name in there else [PlanRow._field_defaults[name]] * len(table)
        for name in PlanRow._fields
    ]
    return list(map(PlanRow._make, zip(*columns, strict=True)))


def _require_planned(store: Store, shard: Shard, rows: list[PlanRow]) -> list[PlanRow]:
    """`rows`, which must be those that the plan's index says."""
    text = "".join(f"{row.prompt_id}\0{row.num_images}\0" for row in rows)
    if sha256(text.encode()).hexdigest() != shard.rows_sha256:
        raise DamagedError(
            f"{_where(store, shard)}: other rows than the plan's index says for shard {shard.shard_id}; the plan was "
            "overwritten or is damaged"
        )
    return rows


def _where(store: Store, shard: Shard) -> str:
    return f"{store.url}/{shard.key}, row group {shard.row_group}"


def shard_requests(rows: Iterable[PlanRow], job_seed: int) -> list[ImageRequest]:
    """Every image the rows ask for, in row order and then by image index."""
    asked = list(rows)
    if not asked:
        return []
    indices = _image_indices(asked)
    if indices is None:
        indices = [0] * len(asked)
    else:
        asked = [row for row in asked for _ in row.image_indices]
    columns = dict(zip(PlanRow._fields, zip(*asked, strict=True), strict=True))
    seeds = _seeds(job_seed, columns["prompt_id"], indices, columns["seed"])
    return ImageRequest.many(
        {
            "prompt_id": prompt_id,
            "image_index": k,
            "prompt": prompt,
            "seed": seed,
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "num_inference_steps": steps,
            "guidance_scale": scale,
            "extra": extra,
            "source": source,
            "lora": lora,
        }
        for prompt_id, k, prompt, seed, negative_prompt, width, height, steps, scale, extra, source, lora in zip(
            columns["prompt_id"],
            indices,
            columns["prompt"],
            seeds,
            columns["negative_prompt"],
            columns["width"],
            columns["height"],
            columns["num_inference_steps"],
            columns["guidance_scale"],
            columns["extra"],
            columns["source"],
            columns["lora"],
            strict=True,
        )
    )


def requests_by_place(rows: Sequence[PlanRow], job_seed: int) -> dict[tuple[int, int], ImageRequest]:
    """`shard_requests` by (row, image index)."""
    if _image_indices(rows) is None:
        places = [(i, 0) for i in range(len(rows))]
    else:
        places = [(i, k) for i, row in enumerate(rows) for k in row.image_indices]
    return dict(zip(places, shard_requests(rows, job_seed), strict=True))


def _image_indices(rows: Sequence[PlanRow]) -> list[int] | None:
    """Of all images that `rows` ask for, in order; None where each asks for its image 0, as most do."""
    if not any(map(_FIRST_INDEX, rows)) and set(map(_COUNT, rows)) <= {1}:
        return None
    return [k for row in rows for k in row.image_indices]


def _seeds(
    job_seed: int, prompt_ids: Sequence[str], indices: Sequence[int], given: Sequence[int | None]
) -> Sequence[int]:
    if all(seed is None for seed in given):
        return derive_seeds(job_seed, prompt_ids, indices)
    return [
        derive_seed(job_seed, prompt_id, k) if seed is None else (seed + k) % SEED_RANGE
        for prompt_id, k, seed in zip(prompt_ids, indices, given, strict=True)
    ]


def derive_seed(job_seed: int, prompt_id: str, image_index: int) -> int:
    """The seed of an image whose row gives none: the same whatever shard, worker, batch or retry draws it.

    The first 8 bytes, big-endian, of SHA-256 over `job_seed`, `prompt_id` and `image_index` joined by NUL.
    """
    text = f"{job_seed}\0{prompt_id}\0{image_index}".encode()
    return int.from_bytes(sha256(text).digest()[:8], "big")


def derive_seeds(job_seed: int, prompt_ids: Sequence[str], indices: Sequence[int]) -> list[int]:
    """`derive_seed` of many images, in half the time."""
    digests = [
        sha256(f"{job_seed}\0{prompt_id}\0{k}".encode()).digest()
        for prompt_id, k in zip(prompt_ids, indices, strict=True)
    ]
    seeds: list[int] = np.frombuffer(b"".join(digests), ">u8")[:: sha256().digest_size // 8].tolist()
    return seeds
