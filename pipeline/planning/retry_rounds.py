"""Retry rounds: extra shards for images that ended quarantined.

A commit is final, so a round never touches the shard that failed: it appends shards, numbered after the plan's, that
hold one row per quarantined image. In the manifest an image's last round counts; `check` and resume see rounds as part
of the plan. Round `r` lies in `_job/retry-RRRR/`, its index is created exclusively and is what makes it exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.output.commits import list_committed, read_commits
from millijoule.pipeline.output.image_rows import read_row_table, rows_table
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.planning.plan import load_plan, read_index
from millijoule.pipeline.planning.shard_cutter import Range, ShardCutter, ShardWriter
from millijoule.workers.errors import AlreadyExistsError, InputError
from millijoule.workers.layout import (
    RETRY_PREFIX,
    plan_part_key,
    retry_index_key,
    retry_part_key,
    round_of_retry_index_key,
)
from millijoule.workers.records import encode
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.scratch import scratch_folder
from millijoule.workers.shard_rows import PlanRow, Shard, read_shard_rows
from millijoule.workers.storage.protocol import Store

#: Where the index of a round keeps its images.
_IMAGES_METADATA = "millijoule.images"

#: A plan row that stands for one image of its prompt.
RETRY_ROW_SCHEMA = PLAN_ROW_SCHEMA.append(pa.field("first_image_index", pa.int32(), nullable=False))

ImageKey = tuple[str, int]


@dataclass(frozen=True)
class RetryRound:
    """One round: its shards, and the (prompt id, image index) pairs it makes anew."""

    number: int
    table: pa.RecordBatch  # SHARD_INDEX_SCHEMA
    images: frozenset[ImageKey]


class JobShards:
    """Every shard of a job in order: the plan's (`table`), then each retry round's. Indexed by shard id."""

    def __init__(self, fingerprint: str, table: pa.RecordBatch, rounds: tuple[RetryRound, ...] = ()) -> None:
        self.rounds = rounds
        self._tables = [table, *(r.table for r in rounds)]
        self._key_of = [
            partial(plan_part_key, fingerprint),
            *(partial(retry_part_key, r.number) for r in rounds),
        ]
        # first shard id of the plan and of each round, and the end
        self._starts = np.cumsum([0, *(t.num_rows for t in self._tables)])
        self._last_round = {image: i for i, r in enumerate(rounds, 1) for image in r.images}
        self._n_images = np.concatenate([t["n_images"].to_numpy() for t in self._tables])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, shard_id: int) -> Shard:
        if not 0 <= shard_id < len(self):
            raise IndexError(f"no shard {shard_id} among {len(self)}")
        r = int(np.searchsorted(self._starts, shard_id, "right")) - 1
        table, i = self._tables[r], shard_id - int(self._starts[r])
        row = {name: table[name][i].as_py() for name in table.schema.names}
        return Shard(key=self._key_of[r](row.pop("part")), **{**row, "shard_id": shard_id})

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))

    def images_of(self, shards: np.ndarray) -> int:
        """Planned images in the shards a bool mask `[n_shards]` selects."""
        return int(self._n_images[shards].sum())

    def is_last_round(self, shard_ids: np.ndarray, rows: pa.Table) -> np.ndarray:
        """Which of `rows` (IMAGE_ROW_SCHEMA) of shards `shard_ids` no later round makes anew: bool `[n]`."""
        if not self._last_round:
            return np.ones(rows.num_rows, bool)
        keys = zip(rows["prompt_id"].to_pylist(), rows["image_index"].to_pylist(), strict=True)
        last = np.fromiter((self._last_round.get(key, 0) for key in keys), np.int64, rows.num_rows)
        return last < np.searchsorted(self._starts, shard_ids, "right")


def load_job_shards(store: Store, job: JobSpec) -> JobShards:
    """All shards of the job in `store`, retry rounds included.

    Raises:
        StoreError: plan or rounds are missing or damaged.
    """
    _, table = load_plan(store, job.fingerprint)
    return JobShards(job.fingerprint, table, tuple(_rounds(store)))


def count_shards(store: Store, job: JobSpec) -> int:
    """As many as `load_job_shards` finds, without reading the plan."""
    return job.shards + sum(of_round.table.num_rows for of_round in _rounds(store))


def _rounds(store: Store) -> Iterator[RetryRound]:
    found = (round_of_retry_index_key(item.key) for item in store.list(RETRY_PREFIX))
    for number in sorted(number for number in found if number is not None):
        of_round, images = read_index(store, retry_index_key(number), _IMAGES_METADATA, list[ImageKey])
        yield RetryRound(number, of_round, frozenset(images))


@dataclass(frozen=True)
class RetryPlan:
    """What asking for a round came to: so many images in a new one; none while `unfinished` of all `shards` are still to be done."""

    images: int
    unfinished: int
    shards: int


def plan_retry_round(store: Store, job: JobSpec) -> RetryPlan:
    """Add a round for every image that stands quarantined, once the job and the rounds it has are done.

    Raises:
        InputError: another driver started a round at this moment.
    """
    shards = load_job_shards(store, job)
    committed = list_committed(store, len(shards))
    if unfinished := int((~committed).sum()):  # go on with these
        return RetryPlan(0, unfinished, len(shards))
    rows = _quarantined(store, shards, committed)
    if not rows.num_rows:
        return RetryPlan(0, 0, len(shards))
    number = max((r.number for r in shards.rounds), default=0) + 1
    with scratch_folder() as scratch:
        with ShardWriter(scratch, RETRY_ROW_SCHEMA, job.shard_size) as writer:
            cutter = ShardCutter(job.shard_size, writer.write)
            cutter.add(rows)
            cutter.finish()
        for part, path in enumerate(writer.parts):
            store.put_file(retry_part_key(number, part), path)
        images = zip(rows["prompt_id"].to_pylist(), rows["first_image_index"].to_pylist(), strict=True)
        index = writer.write_index(_IMAGES_METADATA, encode(list(images))).read_bytes()
    try:
        store.put_exclusive(retry_index_key(number), index)
    except AlreadyExistsError as error:
        raise InputError(
            f"{store.url}: another driver just started a retry round; run the command again"
        ) from error
    return RetryPlan(rows.num_rows, 0, len(shards))


@dataclass(frozen=True)
class RetryOutlook:
    """What a run that is asked for a round would make: `images` in `shards`, those that stand quarantined or, where the job is
    `unfinished`, what is not done yet; and a few of the rows."""

    images: int
    shards: int
    unfinished: bool
    rows: tuple[PlanRow, ...]


def foresee_retry(store: Store, job: JobSpec, few: int) -> RetryOutlook:
    """What `plan_retry_round` would lead to; nothing is written. About `few` rows are enough."""
    shards = load_job_shards(store, job)
    committed = list_committed(store, len(shards))
    rows: list[PlanRow] = []
    if not committed.all():
        left = np.flatnonzero(~committed).tolist()
        for shard_id in left:
            if len(rows) >= few:
                break
            rows += read_shard_rows(store, shards[shard_id])
        return RetryOutlook(shards.images_of(~committed), len(left), True, tuple(rows))
    failed, ends = _quarantined(store, shards, committed), list[Range]()
    cutter = ShardCutter(job.shard_size, lambda _, of_shards: ends.extend(of_shards))
    cutter.add(failed)
    cutter.finish()
    rows = [PlanRow(**row) for row in failed.slice(0, few).to_pylist()]
    return RetryOutlook(failed.num_rows, len(ends), False, tuple(rows))


def _quarantined(store: Store, shards: JobShards, committed: np.ndarray) -> pa.RecordBatch:
    """Plan rows, one image each, for the images whose last outcome is quarantined."""
    found: list[dict[str, Any]] = []
    for commit in read_commits(store, len(shards), committed):
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
    return pa.RecordBatch.from_pylist(found, RETRY_ROW_SCHEMA)
