"""Second chances: rounds of extra shards for images that ended quarantined.

A commit is final, so a retry never touches the shard that failed: it appends shards, numbered after the plan's, that
hold one row per quarantined image. In the manifest an image's last round counts; `check` and resume see rounds as part
of the plan. Round `r` lies in `_job/retry-RRRR/`, its index is created exclusively and is what makes it exist.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.pipeline.output.commits import list_committed, read_commits
from millijoule.pipeline.output.image_rows import read_row_table, rows_table
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.planning.plan import SHARD_INDEX_SCHEMA, ShardIndex, load_shard_index
from millijoule.workers.errors import AlreadyExistsError, InputError, StoreError
from millijoule.workers.layout import RETRY_PREFIX, retry_index_key, retry_part_key, round_of_retry_index_key
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.shard_rows import Shard, read_shard_rows, rows_digest
from millijoule.workers.storage.protocol import Store

#: Rows of one shard are equal in these.
_HOMOGENEOUS = ("width", "height", "num_inference_steps")

#: A plan row that stands for one image of its prompt.
RETRY_ROW_SCHEMA = PLAN_ROW_SCHEMA.append(pa.field("first_image_index", pa.int32(), nullable=False))

ImageKey = tuple[str, int]


@dataclass(frozen=True)
class RetryRound:
    """One round: its shards, and the (prompt id, image index) pairs it makes anew."""

    number: int
    table: pa.Table = field(repr=False)  # SHARD_INDEX_SCHEMA
    images: frozenset[ImageKey] = field(repr=False)


class JobShards:
    """Every shard of a job in order: the plan's, then each retry round's. Indexed by shard id."""

    def __init__(self, plan: ShardIndex, rounds: tuple[RetryRound, ...] = ()) -> None:
        self.plan = plan
        self.rounds = rounds
        self.starts = [len(plan)]  # first shard id of each round, and the end
        for r in rounds:
            self.starts.append(self.starts[-1] + r.table.num_rows)
        self._last_round = {image: i for i, r in enumerate(rounds, 1) for image in r.images}
        self.n_images = np.concatenate([plan.n_images, *(r.table["n_images"].to_numpy() for r in rounds)])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, shard_id: int) -> Shard:
        if shard_id < len(self.plan):
            return self.plan[shard_id]
        i = self.round_of(shard_id) - 1
        row = self.rounds[i].table.slice(shard_id - self.starts[i], 1).to_pylist()[0]
        row["shard_id"] = shard_id
        return Shard(key=retry_part_key(self.rounds[i].number, row.pop("part")), **row)

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))

    def round_of(self, shard_id: int) -> int:
        """0 for a shard of the plan, else its retry round's place among the rounds, from 1."""
        return next(i for i, end in enumerate(self.starts) if shard_id < end)

    def images_of(self, shards: np.ndarray) -> int:
        """Planned images in the shards a bool mask `[n_shards]` selects."""
        return int(self.n_images[shards].sum())

    def is_last_round(self, shard_ids: np.ndarray, rows: pa.Table) -> np.ndarray:
        """Which of `rows` (IMAGE_ROW_SCHEMA) of shards `shard_ids` no later round makes anew: bool `[n]`."""
        if not self._last_round:
            return np.ones(rows.num_rows, bool)
        keys = zip(rows["prompt_id"].to_pylist(), rows["image_index"].to_pylist(), strict=True)
        last = np.fromiter((self._last_round.get(key, 0) for key in keys), np.int64, rows.num_rows)
        return last <= np.searchsorted(self.starts, shard_ids, "right")


def load_job_shards(store: Store, job: JobSpec) -> JobShards:
    """All shards of the job in `store`, retry rounds included.

    Raises:
        StoreError: plan or rounds are missing or damaged.
    """
    found = (round_of_retry_index_key(item.key) for item in store.list(RETRY_PREFIX))
    numbers = sorted(number for number in found if number is not None)
    return JobShards(load_shard_index(store, job.fingerprint), tuple(_load_round(store, n) for n in numbers))


def plan_retry(store: Store, job: JobSpec) -> int:
    """Add a round for every image that stands quarantined; the number of images in it, 0 when there is none.

    Raises:
        InputError: the job is not finished, or another driver started a round at this moment.
    """
    shards = load_job_shards(store, job)
    if not list_committed(store, len(shards)).all():
        return 0  # a round (or the job itself) is still to be done: go on with that
    rows = _quarantined(store, shards)
    if not rows.num_rows:
        return 0
    number = max((r.number for r in shards.rounds), default=0) + 1
    with tempfile.TemporaryDirectory(prefix="millijoule-retry-") as scratch:
        path = Path(scratch, "part.parquet")
        table = _write_shards(rows, job.shard_size, path)
        store.put_file(retry_part_key(number, 0), path)
    keys = list(zip(rows["prompt_id"].to_pylist(), rows["first_image_index"].to_pylist(), strict=True))
    table = table.replace_schema_metadata({"millijoule.images": json.dumps(keys)})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    try:
        store.put_exclusive(retry_index_key(number), sink.getvalue())
    except AlreadyExistsError as error:
        raise InputError(
            f"{store.url}: another driver just started a retry; run the command again"
        ) from error
    return rows.num_rows


def _quarantined(store: Store, shards: JobShards) -> pa.Table:
    """Plan rows, one image each, for the images whose last outcome is quarantined."""
    found: list[dict[str, Any]] = []
    for commit in read_commits(store, len(shards)):
        if not commit.images_quarantined:
            continue
        rows = read_row_table(store, commit) if commit.rows is None else rows_table(commit.rows)
        last = shards.is_last_round(np.full(rows.num_rows, commit.shard_id), rows)
        rows = rows.filter(pc.and_(pc.equal(rows["status"], "quarantined"), pa.array(last)))
        planned = {row.prompt_id: row for row in read_shard_rows(store, shards[commit.shard_id])}
        for prompt_id, k in zip(rows["prompt_id"].to_pylist(), rows["image_index"].to_pylist(), strict=True):
            row = planned[prompt_id]
            found.append(
                {name: getattr(row, name) for name in PLAN_ROW_SCHEMA.names}
                | {"first_image_index": k, "num_images": 1}
            )
    return pa.Table.from_pylist(found, RETRY_ROW_SCHEMA)


def _write_shards(rows: pa.Table, shard_size: int, path: Path) -> pa.Table:
    """Write `rows` as shards, homogeneous like the plan's, one row group each; their index."""
    index: list[dict[str, Any]] = []
    buckets = rows.group_by(list(_HOMOGENEOUS), use_threads=False).aggregate([]).to_pylist()
    with pq.ParquetWriter(path, RETRY_ROW_SCHEMA, compression="zstd") as writer:
        for bucket in buckets:
            alike = rows
            for name, value in bucket.items():
                column = alike[name]
                alike = alike.filter(pc.is_null(column) if value is None else pc.equal(column, value))
            for start in range(0, alike.num_rows, shard_size):
                shard = alike.slice(start, shard_size)
                writer.write_table(shard, row_group_size=shard.num_rows)
                index.append(
                    {
                        "shard_id": len(index),
                        "part": 0,
                        "row_group": len(index),
                        "n_rows": shard.num_rows,
                        "n_images": shard.num_rows,
                        "first_prompt_id": shard["prompt_id"][0].as_py(),
                        "rows_sha256": rows_digest(shard["prompt_id"], shard["num_images"]),
                        **bucket,
                    }
                )
    return pa.Table.from_pylist(index, SHARD_INDEX_SCHEMA)


def _load_round(store: Store, number: int) -> RetryRound:
    where = f"{store.url}/{retry_index_key(number)}"
    try:
        table = pq.read_table(pa.BufferReader(store.get(retry_index_key(number))))
        keys = json.loads(table.schema.metadata[b"millijoule.images"])
        return RetryRound(number, table.cast(SHARD_INDEX_SCHEMA), frozenset((i, k) for i, k in keys))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{where}: damaged retry round: {error}") from error
