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
from millijoule.pipeline.closing.finish import MANIFEST_SCHEMA, ManifestRows
from millijoule.pipeline.energy import rows as energy_rows
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.output import image_rows
from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.planning.retry_rounds import plan_retry_round
from millijoule.workers.errors import DamagedError, NotFoundError, RowError
from millijoule.workers.layout import commit_key


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
    monkeypatch.setattr(image_rows, "SPOOL_ROWS", 7)
    monkeypatch.setattr(energy_rows, "IMAGES_AT_ONCE", 11)
    prompts = [f"{'bad' if i % 9 == 4 else 'good'} prompt {i} \u2603" for i in range(60)]
    store, job = plan(tmp_path, prompts, shard_size=4, output_format=output_format)
    work(store, job, _Fussy("cpu"))
    assert plan_retry_round(store, job).images == 7
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


READ = {"boot_id": "b", "t_mono_ns": 0, "t_wall_ns": 0, "latency_ns": 0, "energy_mj": {"gpu:x": 1}}
SEGMENT = {"worker_id": "w", "segment_class": "idle", "open": READ, "close": READ}


@pytest.mark.parametrize(
    "damage",
    [
        *({"worker_id": 5}, {"images_ok": "1"}, {"images_ok": 2**63}, {"attempt_id": None}),
        *({"segments": [SEGMENT | {"worker_id": 3}]}, {"segments": [SEGMENT | {"attempt_id": 3}]}),
        *({"segments": [SEGMENT | {"shard_id": "x"}]}, {"segments": [SEGMENT | {"close": None}]}),
        *({"segments": [SEGMENT | {"open": {}}]}, {"segments": [SEGMENT | {"open": 3}]}),
        {"segments": [SEGMENT | {"open": READ | {"t_mono_ns": 2**63}}]},
        {"segments": [SEGMENT | {"open": READ | {"energy_mj": {"gpu:x": 1.5}}}]},
    ],
)
def test_a_commit_that_is_none_is_refused_by_its_name(tmp_path, damage):
    store, job = plan(tmp_path, ["a", "b"], shard_size=1)
    shards = work(store, job)
    store.put(commit_key(1), json.dumps(json.loads(store.get(commit_key(1))) | damage).encode())
    with pytest.raises(DamagedError, match=r"00000001\.json: not a commit"):
        finish.load_records(store, len(shards))


@pytest.mark.parametrize("output_format", ["parquet", "webdataset"])
def test_a_damaged_file_of_images_is_left_out_of_the_preview_and_the_job_ends(
    tmp_path, output_format, caplog
):
    """What is damaged `millijoule check` tells; manifest and books do not need the images."""
    store, job = plan(tmp_path, [f"p{i}" for i in range(6)], shard_size=2, output_format=output_format)
    shards = work(store, job)
    first = next(iter(read_commits(store, 3))).files[0].path
    damaged = first.removesuffix(".tar") + ".index.json" if first.endswith(".tar") else first
    store.put(damaged, store.get(damaged)[:-20])
    finish.finish_job(store, job, shards)
    assert store.exists("_SUCCESS")
    assert store.exists("preview.png")
    assert f"{first}: cannot be read, and its images are not shown" in caplog.text


def test_a_damaged_row_table_is_named(tmp_path):
    store, job = plan(tmp_path, [f"p{i}" for i in range(4)], shard_size=2, output_format="files")
    shards = work(store, job)
    drop_carried_rows(store, [1])
    rows_path = list(read_commits(store, 2))[1].rows_path
    store.put(rows_path, store.get(rows_path)[:-20])
    with pytest.raises(DamagedError, match=rf"{rows_path}: cannot be read as Parquet"):
        finish.finish_job(store, job, shards)
