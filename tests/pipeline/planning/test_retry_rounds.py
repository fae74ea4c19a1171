"""Retry rounds: shards for the images that ended quarantined, after the plan's, read whatever version wrote them."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.local_job import plan, work
from support.models import Fussy, Plain

from millijoule.pipeline.planning import shard_cutter
from millijoule.pipeline.planning.plan import SHARD_INDEX_SCHEMA
from millijoule.pipeline.planning.retry_rounds import (
    RETRY_ROW_SCHEMA,
    RetryPlan,
    load_job_shards,
    plan_retry_round,
)
from millijoule.workers.errors import StoreError
from millijoule.workers.shard_rows import read_shard_rows


@pytest.fixture
def refused(tmp_path):
    """(store, job) with 20 images, of which 10 are quarantined."""
    store, job = plan(tmp_path, [f"prompt {i}" for i in range(20)], shard_size=4)
    work(store, job, Fussy("cpu"))
    return store, job


def test_a_round_holds_each_quarantined_image_once_in_parts_like_a_plan(refused, monkeypatch):
    monkeypatch.setattr(shard_cutter, "SHARDS_PER_PART", 2)
    store, job = refused
    assert plan_retry_round(store, job).images == 10
    shards = load_job_shards(store, job)
    again = [shards[i] for i in range(5, len(shards))]
    assert [(s.shard_id, s.n_images) for s in again] == [(5, 4), (6, 4), (7, 2)]
    assert [s.key for s in again] == [f"_job/retry-0001/part-0000{p}.parquet" for p in (0, 0, 1)]
    rows = [row for shard in again for row in read_shard_rows(store, shard)]
    assert [row.prompt for row in rows] == [f"prompt {i}" for i in range(1, 20, 2)]
    assert {(row.num_images, row.first_image_index) for row in rows} == {(1, 0)}
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_no_round_is_added_while_one_is_to_be_done_and_the_next_takes_what_it_left(refused):
    store, job = refused
    assert plan_retry_round(store, job) == RetryPlan(images=10, unfinished=0, shards=5)
    assert plan_retry_round(store, job) == RetryPlan(images=0, unfinished=3, shards=8)
    work(store, job, Fussy("cpu"))
    assert plan_retry_round(store, job) == RetryPlan(images=10, unfinished=0, shards=8)
    work(store, job, Plain("cpu"))
    assert plan_retry_round(store, job) == RetryPlan(images=0, unfinished=0, shards=11)
    assert [r.number for r in load_job_shards(store, job).rounds] == [1, 2]


def test_a_round_of_an_earlier_version_is_read(refused, tmp_path):
    """One part for all shards of a round, and an index with the images as `json.dumps` writes them."""
    store, job = refused
    planned = read_shard_rows(store, load_job_shards(store, job)[0])
    row = {f: getattr(planned[1], f) for f in RETRY_ROW_SCHEMA.names}
    part = pa.Table.from_pylist([row], RETRY_ROW_SCHEMA)
    index = {"shard_id": 0, "part": 0, "row_group": 0, "n_rows": 1, "n_images": 1}
    digest = hashlib.sha256(f"{row['prompt_id']}\0{row['num_images']}\0".encode()).hexdigest()
    index |= {"first_prompt_id": row["prompt_id"], "rows_sha256": digest}
    table = pa.Table.from_pylist([index], SHARD_INDEX_SCHEMA)
    for name, content in {
        "part-00000": part,
        "shards": table.replace_schema_metadata({"millijoule.images": json.dumps([[row["prompt_id"], 0]])}),
    }.items():
        pq.write_table(content, tmp_path / name)
        store.put_file(f"_job/retry-0001/{name}.parquet", tmp_path / name)
    shards = load_job_shards(store, job)
    assert len(shards) == 6
    assert [r.prompt for r in read_shard_rows(store, shards[5])] == ["prompt 1"]
    assert shards.rounds[0].images == {(row["prompt_id"], 0)}


def test_a_damaged_round_is_named(refused):
    store, job = refused
    store.put("_job/retry-0001/shards.parquet", b"no parquet")
    with pytest.raises(StoreError, match=r"_job/retry-0001/shards\.parquet: damaged"):
        load_job_shards(store, job)
