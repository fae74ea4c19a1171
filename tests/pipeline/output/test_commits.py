"""Commits are read in the order of shards, wherever they lie."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
from support.ledgers import commit

from millijoule.pipeline.output.commits import CommitCompactor, read_commits
from millijoule.workers.layout import commit_key
from millijoule.workers.storage.open import open_store


def test_commits_come_in_order_of_shards_from_parts_in_any_order_and_from_objects(tmp_path):
    store = open_store(str(tmp_path))
    bodies = {n: commit(n, f"a{n}", 1).to_json() for n in range(9)}
    for n, body in bodies.items():
        store.put(commit_key(n), body)
    first, second = CommitCompactor(store, 1), CommitCompactor(store, 2)
    for n in (8, 0, 3):
        first.add(n, bodies[n])
    first.flush()
    for n in (5, 1, 3):  # 3 by both drivers; 2, 4, 6 and 7 by none
        second.add(n, bodies[n])
    second.flush()
    second.add(40, json.dumps({}).encode())  # of a plan that is not ours
    second.flush()
    for _ in range(2):
        assert [c.attempt_id for c in read_commits(store, 9)] == [f"a{n}" for n in range(9)]
    parts = sorted((tmp_path / "_job/ledger").iterdir())
    assert len(parts) == 3
    for part, junk in zip(
        parts, (b"junk", b"", part_without_commits()), strict=True
    ):  # they only save requests
        part.write_bytes(junk)
        assert [c.attempt_id for c in read_commits(store, 9)] == [f"a{n}" for n in range(9)]


def part_without_commits() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"shard_id": [1, 2]}), sink)
    return sink.getvalue()
