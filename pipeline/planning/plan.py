"""A plan as it lies in the store: parts with one Parquet row group per shard, the bad rows, and the shard index.

All of it is in `_job/plan-<fp12>/`; the index is written last, so its presence says that the plan is whole. Nothing here
knows about workers or leases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import StoreError
from millijoule.workers.layout import plan_bad_rows_key, plan_index_key
from millijoule.workers.records import decode
from millijoule.workers.storage.protocol import Store

T = TypeVar("T")

#: Where the index of a plan keeps the `Plan`.
PLAN_METADATA = "millijoule.plan"

SHARD_INDEX_SCHEMA = pa.schema(
    [
        pa.field("shard_id", pa.int64(), nullable=False),
        pa.field("part", pa.int32(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("n_rows", pa.int32(), nullable=False),
        pa.field("n_images", pa.int32(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_inference_steps", pa.int32()),
        pa.field("first_prompt_id", pa.string(), nullable=False),
        pa.field("rows_sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Plan:
    """What a finished plan holds. `n_rows` are rows in shards; `n_bad_rows` those in `bad_rows_key`."""

    fingerprint: str
    n_rows: int
    n_images: int
    n_bad_rows: int
    n_shards: int
    n_parts: int
    warnings: tuple[str, ...] = ()

    @property
    def bad_rows_key(self) -> str:
        return plan_bad_rows_key(self.fingerprint)


def load_plan(store: Store, fingerprint: str) -> tuple[Plan, pa.RecordBatch]:
    """A plan that is already in the store, and its shards in order, `SHARD_INDEX_SCHEMA`: about 150 bytes each.

    Raises:
        NotFoundError: there is no whole plan with this fingerprint.
        StoreError: it cannot be read, or belongs to another fingerprint with the same beginning.
    """
    key = plan_index_key(fingerprint)
    table, plan = read_index(store, key, PLAN_METADATA, Plan)
    if plan.fingerprint != fingerprint or plan.n_shards != table.num_rows:
        raise StoreError(f"{store.url}/{key}: this is the plan of another job ({plan.fingerprint})")
    return plan, table


def read_index(store: Store, key: str, name: str, kind: type[T]) -> tuple[pa.RecordBatch, T]:
    """The shard index at `key`, `SHARD_INDEX_SCHEMA`, and the record of class `kind` in its metadata under `name`.

    Raises:
        NotFoundError: there is none.
        StoreError: it cannot be read.
    """
    with store.open_input(key) as file:
        try:
            table = pq.ParquetFile(file).read(use_threads=False)
            record = decode(kind, table.schema.metadata[name.encode()])
            (batch,) = table.cast(SHARD_INDEX_SCHEMA).combine_chunks().to_batches()
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{store.url}/{key}: damaged shard index: {error}. Start again in another --output"
            ) from error
    return batch, record
