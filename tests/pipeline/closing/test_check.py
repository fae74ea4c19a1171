"""`check` notices every kind of damage, and nothing where there is none."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.local_job import plan, work

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning import shard_cutter
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.workers import shard_rows
from millijoule.workers.errors import DamagedError
from millijoule.workers.layout import CLOSINGS_PREFIX, SEGMENTS_PREFIX, commit_key, worker_key

PROMPTS = [f"prompt {i}" for i in range(20)]


@pytest.fixture(params=["parquet", "webdataset", "files"])
def output(request, tmp_path):
    store, job = plan(tmp_path, PROMPTS, output_format=request.param)
    work(store, job)
    return store, tmp_path / "out"


def one(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def edit_commit(folder: Path, change) -> None:
    path = one(folder, "_job/commits/*/*.json")
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


def edit_energy(folder: Path, table: str, change) -> None:
    path = one(folder, f"energy/{table}/*/*/part-*.parquet")
    rows = pq.ParquetFile(path).read()
    edited = rows.to_pylist()
    change(edited)
    pq.write_table(pa.Table.from_pylist(edited, rows.schema), path)


def edit_stats(folder: Path, change) -> None:
    path = folder / "stats.json"
    stats = json.loads(path.read_text())
    change(stats)
    path.write_text(json.dumps(stats))


def edit_success(folder: Path, **changes) -> None:
    path = folder / "_SUCCESS"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy_part(folder: Path) -> None:
    path = one(folder, "energy/image/*/*/part-*.parquet")
    path.with_name("part-00001.parquet").write_bytes(path.read_bytes())


def flip_a_byte(folder: Path) -> None:
    path = max((p for p in (folder / "data").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # it may be a hard link
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = next(p for p in sorted((folder / "data").rglob("*")) if p.is_file())
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1])


DAMAGE = {
    "a flipped byte": flip_a_byte,
    "a truncated file": truncate,
    "a missing file": lambda f: next(p for p in sorted((f / "data").rglob("*")) if p.is_file()).unlink(),
    "a missing commit": lambda f: one(f, "_job/commits/*/*.json").unlink(),
    "a commit for another plan": lambda f: edit_commit(f, lambda c: c.update(plan_fingerprint="0" * 64)),
    "a commit by another model": lambda f: edit_commit(f, lambda c: c.update(model_sha256="0" * 64)),
    "a commit with another count": lambda f: edit_commit(f, lambda c: c.update(images_ok=c["images_ok"] - 1)),
    "a commit that hides a file": lambda f: edit_commit(f, lambda c: c["files"][0].update(sha256="0" * 64)),
    "a commit that is not JSON": lambda f: one(f, "_job/commits/*/*.json").write_text("{"),
    "a carried row changed": lambda f: edit_commit(f, lambda c: c["rows"][2].__setitem__(10, "other")),
    "a carried row dropped": lambda f: edit_commit(f, lambda c: c["rows"].pop()),
    "a missing manifest": lambda f: (f / "manifest.parquet").unlink(),
    "a manifest row dropped": lambda f: edit_manifest(f, lambda rows: rows.pop()),
    "a manifest row doubled": lambda f: edit_manifest(f, lambda rows: rows.append(rows[0])),
    "a manifest hash changed": lambda f: edit_manifest(f, lambda rows: rows[3].update(sha256="0" * 64)),
    "a manifest prompt changed": lambda f: edit_manifest(f, lambda rows: rows[3].update(prompt="other")),
    "a manifest energy changed": lambda f: edit_manifest(f, lambda rows: rows[3].update(energy_mj=1)),
    "a manifest that is not Parquet": lambda f: (f / "manifest.parquet").write_bytes(b"x" * 100),
    "an energy part missing": lambda f: one(f, "energy/segment/*/*/part-*.parquet").unlink(),
    "an energy part that is not Parquet": lambda f: one(f, "energy/env/*/*/*.parquet").write_bytes(b"x"),
    "an energy part twice": copy_part,
    "an energy row dropped": lambda f: edit_energy(f, "image", lambda rows: rows.pop()),
    "an energy changed": lambda f: edit_energy(f, "attempt", lambda rows: rows[0].update(energy_mj=1)),
    "a failed check hidden": lambda f: edit_energy(f, "closure", lambda rows: rows[0].update(passed=True)),
    "a missing _SUCCESS": lambda f: (f / "_SUCCESS").unlink(),
    "a foreign _SUCCESS": lambda f: (f / "_SUCCESS").write_text("{}"),
    "images in _SUCCESS": lambda f: edit_success(f, images_ok=21),
    "filtered images in _SUCCESS": lambda f: edit_success(f, images_filtered=1),
    "a _SUCCESS of another shape": lambda f: (f / "_SUCCESS").write_text("[]"),
    "a commit without its files": lambda f: edit_commit(f, lambda c: c.update(files=[])),
    "a path that leads out": lambda f: edit_commit(
        f, lambda c: c["files"][0].update(path="../../etc/passwd")
    ),
    "a row table at the root": lambda f: edit_commit(f, lambda c: c.update(rows_path="/etc/passwd")),
    "a better evidence class": lambda f: edit_stats(f, lambda s: s.update(evidence_class="E3")),
    "more images in the totals": lambda f: edit_stats(f, lambda s: s.update(images_ok=1_000_000)),
    "energy in the totals": lambda f: edit_stats(f, lambda s: s["energy"].update(total_mj=1)),
    "energy per image": lambda f: edit_stats(f, lambda s: s.update(direct_mj_per_image=0.001)),
    "a closure that holds": lambda f: edit_stats(f, lambda s: s["closure"].update(C3=True)),
    "no totals": lambda f: (f / "stats.json").unlink(),
    "totals that are not JSON": lambda f: (f / "stats.json").write_text("junk"),
    "totals of another shape": lambda f: (f / "stats.json").write_text("[]"),
}


def test_a_sound_output_has_no_differences(output):
    assert list(check_output(output[0])) == []


def test_shards_that_are_not_committed_are_named_and_many_are_counted(tmp_path):
    store, job = plan(tmp_path, [f"p{i}" for i in range(31)], shard_size=1)
    shards = work(store, job)
    keys = [commit_key(shard) for shard in range(len(shards))]
    store.delete(keys[7:10])
    assert list(check_output(store)) == [f"shard {n}: not committed" for n in (7, 8, 9)]
    store.delete(keys[4:])
    assert list(check_output(store)) == [
        *(f"shard {n}: not committed" for n in range(4, 24)),
        "7 more shards: not committed",
    ]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed(output, damage):
    store, folder = output
    DAMAGE[damage](folder)
    assert list(check_output(store))


def test_a_missing_file_does_not_hide_damage_to_others_of_its_shard(tmp_path):
    store, job = plan(tmp_path, PROMPTS[:4], shard_size=4, output_format="files")
    work(store, job)
    lost, damaged, *_ = sorted(p for p in (tmp_path / "out" / "data").rglob("*") if p.is_file())
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[::-1])
    problems = list(check_output(store))
    assert any(lost.name in p and "missing" in p for p in problems)
    assert any(damaged.name in p and "SHA-256" in p for p in problems)


def test_a_commit_that_cannot_be_read_does_not_hide_other_damage(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=5)
    work(store, job)
    paths = sorted((tmp_path / "out").glob("_job/commits/*/*.json"))
    paths[0].write_text("{")
    edited = json.loads(paths[2].read_text())
    paths[2].write_text(json.dumps(edited | {"model_sha256": "0" * 64}))
    first, second = check_output(store)
    assert "not a commit" in first
    assert "made by another model" in second


def test_records_that_cannot_be_read_do_not_hide_other_damage(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=5)
    work(store, job)
    finish_job(store, job, load_job_shards(store, job))
    keys = [f"{CLOSINGS_PREFIX}w1.json", f"{SEGMENTS_PREFIX}000001-000009.json", worker_key("w9")]
    for key in keys:
        store.put(key, b"")
    data = one(tmp_path / "out", "data/*.parquet")
    data.write_bytes(data.read_bytes()[::-1])
    problems = list(check_output(store))
    for key in keys:
        assert sum(f"{key}: not what a driver or worker wrote" in p for p in problems) == 1
    assert any(data.name in p and "SHA-256" in p for p in problems)


@pytest.mark.parametrize(
    ("at", "value"), [(0, "other"), (2, "other"), (8, 0.5), (11, ["odd"]), (13, "0" * 64)]
)
def test_rows_of_a_commit_that_are_not_those_of_its_row_table_are_named(output, at, value):
    store, folder = output
    edit_commit(folder, lambda c: c["rows"][1].__setitem__(at, value))
    finish_job(store, require_job(store), load_job_shards(store, require_job(store)))  # as those rows say
    (problem,) = check_output(store)
    assert "the rows in its commit are not those of data/" in problem


def test_commits_without_rows_are_compared_with_row_tables(output):
    store, folder = output
    for path in folder.glob("_job/commits/*/*.json"):
        body = json.loads(path.read_text())
        del body["rows"]
        path.write_text(json.dumps(body))
    assert list(check_output(store)) == []
    edit_manifest(folder, lambda rows: rows[3].update(width=1))
    assert list(check_output(store))


def test_a_row_table_that_cannot_be_read_does_not_end_the_check(output):
    store, folder = output
    commits = sorted(folder.glob("_job/commits/*/*.json"))
    for path in commits:  # as of shards of more images than a commit carries rows of
        body = json.loads(path.read_text())
        del body["rows"]
        path.write_text(json.dumps(body))
    tables = [json.loads(path.read_text())["rows_path"] for path in (commits[0], commits[-1])]
    for table in tables:
        path = folder / table
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-1])
    problems = list(check_output(store))
    for table in tables:
        assert any(p.startswith(f"{table}: cannot be read as Parquet") for p in problems)
    assert any(p.startswith("manifest.parquet: it, or a row table") for p in problems)
    assert any(p.startswith("energy/: cannot be compared") for p in problems)


def test_a_commit_that_names_no_row_table_does_not_hide_other_damage(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=5)
    work(store, job)
    edit_commit(tmp_path / "out", lambda c: c.update(rows_path=f"{c['rows_path']}x"))
    flip_a_byte(tmp_path / "out")
    problems = list(check_output(store))
    assert any("does not exist" in p for p in problems)
    assert any("SHA-256" in p for p in problems)


def test_another_table_in_place_of_the_plan_is_said_in_words(tmp_path):
    store, job = plan(tmp_path, PROMPTS)
    work(store, job)
    part = one(tmp_path / "out", "_job/plan-*/part-*.parquet")
    groups = pq.ParquetFile(part).num_row_groups
    other = pa.table({"file": ["a"] * groups})
    part.unlink()  # it may be a hard link
    pq.write_table(other, part, row_group_size=1)
    with pytest.raises(DamagedError, match="The plan is damaged"):
        list(check_output(store))


@pytest.fixture
def footers(monkeypatch):
    """One entry for each time that the footer of a Parquet file is parsed."""
    parsed, open_file = [], pq.ParquetFile

    def opened(source, *, metadata=None):
        if metadata is None:
            parsed.append(source)
        return open_file(source, metadata=metadata)

    monkeypatch.setattr(shard_rows.pq, "ParquetFile", opened)
    return parsed


@pytest.mark.parametrize("held_bytes", [0, shard_rows.MAX_HELD_BYTES])
def test_a_part_of_the_plan_is_parsed_once_however_many_shards_it_has(
    tmp_path, monkeypatch, footers, held_bytes
):
    monkeypatch.setattr(shard_rows, "MAX_HELD_BYTES", held_bytes)
    store, job = plan(tmp_path, [f"p{i}" for i in range(40)], shard_size=2)
    shards = list(load_job_shards(store, job))
    alone = [shard_rows.read_shard_rows(store, shard) for shard in shards]
    footers.clear()
    reader = shard_rows.ShardRowReader(store)
    assert [reader.read(shard) for shard in shards] == alone
    assert len(footers) == 1
    other = dataclasses.replace(shards[3], row_group=4)
    for wrong in (other, dataclasses.replace(other, row_group=400)):
        with pytest.raises(DamagedError, match=f"row group {wrong.row_group}: .* shard 3"):
            reader.read(wrong)


def test_few_parts_of_the_plan_are_held(tmp_path, monkeypatch, footers):
    monkeypatch.setattr(shard_cutter, "SHARDS_PER_PART", 2)
    store, job = plan(tmp_path, [f"p{i}" for i in range(40)], shard_size=2)
    reader = shard_rows.ShardRowReader(store)
    shards = list(load_job_shards(store, job))
    footers.clear()
    assert [reader.read(s)[0].prompt for s in shards] == [f"p{i}" for i in range(0, 40, 2)]
    assert len(footers) == len({s.key for s in shards}) == 10
    for shard in shards[-2 * shard_rows.MAX_HELD_PARTS :]:
        reader.read(shard)
    assert len(footers) == 10
    reader.read(shards[0])
    assert len(footers) == 11


def test_files_that_no_commit_names_are_counted_in_a_note(output):
    store, folder = output
    job = require_job(store)
    finish_job(store, job, load_job_shards(store, job))
    notes = []
    assert list(check_output(store, on_note=notes.append)) == []
    assert not any("no commit names" in note for note in notes)
    (folder / "data" / "put-there-by-somebody.parquet").write_bytes(b"x")
    notes.clear()
    assert list(check_output(store, on_note=notes.append)) == []
    assert [note for note in notes if note.startswith("1 file in data/ that no commit names")]
