"""What the end of a job reads again it reads once, and little at a time."""

import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.ledgers import commit
from support.local_job import plan, work
from support.models import Plain

from millijoule.pipeline.closing import finish
from millijoule.pipeline.closing.finish import MANIFEST_SCHEMA, ManifestRows, merged
from millijoule.pipeline.energy import rows as energy_rows
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.output import image_rows
from millijoule.pipeline.output.commits import CommitCompactor, read_commits
from millijoule.pipeline.planning.retry import plan_retry
from millijoule.workers.errors import DamagedError, NotFoundError, RowError
from millijoule.workers.layout import commit_key
from millijoule.workers.storage.open import open_store


def manifest(shard_ids):
    n = range(len(shard_ids))
    columns = {
        "prompt_id": [f"p{i}" for i in n],
        "image_index": [0] * len(n),
        "prompt": ["x"] * len(n),
        "seed": list(n),
        "status": ["ok"] * len(n),
        "shard_id": shard_ids,
        "attempt_id": ["a"] * len(n),
    }
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(len(n), f.type)
        for f in MANIFEST_SCHEMA
    ]
    return pa.table(arrays, schema=MANIFEST_SCHEMA)


def test_each_shard_finds_its_rows_in_the_manifest_wherever_row_groups_end(tmp_path, monkeypatch):
    shard_ids = [0, 0, 1, 1, 1, 1, 1, 3, 4, 4, 7]  # 2, 5 and 6 have none left: a later round makes them anew
    pq.write_table(manifest(shard_ids), tmp_path / "m.parquet", row_group_size=2)
    commits = CommitTable.of(commit(n, "a", 1) for n in range(9))
    for batch in (1, 2, 3, 100):
        monkeypatch.setattr(finish, "MANIFEST_BATCH_ROWS", batch)
        found = list(ManifestRows(pq.ParquetFile(tmp_path / "m.parquet")).blocks(commits))
        assert [n for numbers, _ in found for n in numbers.tolist()] == shard_ids
        prompts = [p for _, rows in found for p in rows["prompt_id"].to_pylist()]
        assert prompts == [f"p{i}" for i in range(len(shard_ids))]
        assert all(a[-1] < b[0] for (a, _), (b, _) in pairwise(found))  # no shard in two blocks


def test_an_empty_manifest_has_no_rows(tmp_path):
    with pq.ParquetWriter(tmp_path / "m.parquet", MANIFEST_SCHEMA) as writer:
        writer.write_table(MANIFEST_SCHEMA.empty_table())
    commits = CommitTable.of(commit(n, "a", 1) for n in range(9))
    assert list(ManifestRows(pq.ParquetFile(tmp_path / "m.parquet")).blocks(commits)) == []
    with pq.ParquetWriter(tmp_path / "m.parquet", MANIFEST_SCHEMA) as writer:
        for part in (manifest([]), manifest([4]), manifest([])):
            writer.write_table(part, row_group_size=max(1, part.num_rows))
    ((numbers, rows),) = ManifestRows(pq.ParquetFile(tmp_path / "m.parquet")).blocks(commits)
    assert (numbers.tolist(), rows.num_rows) == ([4], 1)


def test_small_tables_are_merged_into_row_groups_without_looking_at_each_again():
    parts = [manifest([i]) for i in range(7)]
    assert [t.num_rows for t in merged(iter(parts), rows=3)] == [3, 3, 1]
    assert pa.concat_tables(merged(iter(parts), rows=3)) == pa.concat_tables(parts)


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


class _Fussy(Plain):
    """Refuses some prompts for good."""

    def draw(self, request):
        if "bad" in request.prompt:
            raise RowError("no such picture")
        return super().draw(request)


PRODUCTS = ("manifest.parquet", "stats.json", "_SUCCESS", "preview.png", "energy/")


def products(store):
    return {item.key: store.get(item.key) for item in store.list() if item.key.startswith(PRODUCTS)}


def drop_carried_rows(store, shard_ids):
    for shard_id in shard_ids:
        raw = json.loads(store.get(commit_key(shard_id)))
        del raw["rows"]
        store.put(commit_key(shard_id), json.dumps(raw).encode())


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
def test_rows_from_commits_and_from_row_tables_make_the_same_files(tmp_path, output_format, monkeypatch):
    monkeypatch.setattr(image_rows, "_SPOOL_ROWS", 7)
    monkeypatch.setattr(energy_rows, "_IMAGES_AT_ONCE", 11)
    prompts = [f"{'bad' if i % 9 == 4 else 'good'} prompt {i} \u2603" for i in range(60)]
    store, job = plan(tmp_path, prompts, shard_size=4, output_format=output_format)
    work(store, job, _Fussy("cpu"))
    assert plan_retry(store, job) == 7
    shards = work(store, job, Plain("cpu"))  # a second round makes the refused ones
    true = products(store)
    assert len(true) > 10
    for some in (range(0, len(shards), 2), range(1, len(shards), 2)):  # every other, then all
        drop_carried_rows(store, some)
        for key in true:
            store.delete([key])
        finish.finish_job(store, job, shards)
        assert products(store) == true


def test_the_end_of_a_job_opens_no_row_table_of_a_shard_whose_commit_carries_its_rows(tmp_path):
    store, job = plan(tmp_path, [f"p{i}" for i in range(36)], shard_size=16, output_format="files")
    shards = work(store, job)
    true = products(store)
    store.delete([item.key for item in store.list("data/") if item.key.endswith("rows.parquet")])
    finish.finish_job(store, job, shards)
    assert products(store) == true
    drop_carried_rows(store, [1])
    with pytest.raises(NotFoundError, match=r"rows\.parquet"):
        finish.finish_job(store, job, shards)


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row.pop(),
        lambda row: row.__setitem__(1, True),
        lambda row: row.__setitem__(1, 2**31),
        lambda row: row.__setitem__(4, -1),
        lambda row: row.__setitem__(2, None),
        lambda row: row.__setitem__(2, "half \ud800"),
        lambda row: row.__setitem__(9, "fine"),
        lambda row: row.__setitem__(11, [1]),
    ],
)
def test_a_carried_row_that_is_none_is_refused_by_the_name_of_its_commit(tmp_path, damage):
    store, job = plan(tmp_path, ["a", "b"], shard_size=1)
    shards = work(store, job)
    raw = json.loads(store.get(commit_key(1)))
    damage(raw["rows"][0])
    store.put(commit_key(1), json.dumps(raw).encode())
    for read in (finish.load_records, lambda store, n: list(read_commits(store, n))):
        with pytest.raises(DamagedError, match=r"00000001\.json: not a commit"):
            read(store, len(shards))
