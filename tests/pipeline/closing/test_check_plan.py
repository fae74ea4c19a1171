"""`check` compares what a job, its plan and its table of rejected rows say of the input."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.stand_in_jobs import start_cluster

from millijoule.jobs import generate
from millijoule.pipeline.closing.check import check_output
from millijoule.workers.storage.open import open_store


@pytest.fixture
def output(tmp_path, monkeypatch):
    """Four images, two rejected rows."""
    start_cluster(monkeypatch).add_node("host-1", CPU=2.0)
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": f"p{i}"} for i in range(4)] + [{"prompt": None}, {"prompt": "big", "width": 10**9}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"shard_size": 2, "device": "cpu", "quiet": True, "telemetry": False}
    generate(prompts=prompts, output=tmp_path / "out", model="python:support.models:plain", **options)
    return tmp_path / "out"


def differences(output):
    return list(check_output(open_store(str(output))))


def test_a_sound_output_has_none(output):
    assert differences(output) == []


@pytest.mark.parametrize("name", ["rows", "images", "shards", "bad_rows"])
def test_a_job_that_counts_otherwise_is_named(output, name):
    path = output / "_job" / "job.json"
    job = json.loads(path.read_text())
    path.write_text(json.dumps(job | {name: job[name] + 1}))
    assert f"_job/job.json: {name} is {job[name] + 1}, the plan has {job[name]}" in differences(output)


def shorten(path):
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


def other_reason(path):
    rows = pq.read_table(path).to_pylist()
    rows[0]["reason"] = "made up"
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(path)), path)


@pytest.mark.parametrize("pattern", ["bad_rows.parquet", "_job/plan-*/bad_rows.parquet"])
def test_rejected_rows_of_which_a_copy_was_edited_are_named(output, pattern):
    (path,) = output.glob(pattern)
    other_reason(path)
    assert any(p.startswith("bad_rows.parquet: not the copy of _job/plan-") for p in differences(output))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shorten, "bad_rows.parquet: 1 row, 2 input rows were rejected"),
        (lambda path: path.unlink(), "bad_rows.parquet: missing, though 2 input rows were rejected"),
        (lambda path: path.write_bytes(b"x"), "bad_rows.parquet: cannot be read as Parquet"),
    ],
)
def test_rejected_rows_that_are_not_those_of_the_plan_are_named(output, damage, words):
    path = output / "bad_rows.parquet"
    data = path.read_bytes()
    path.unlink()  # it may be a hard link
    path.write_bytes(data)
    damage(path)
    assert [p for p in differences(output) if p.startswith(words)]
