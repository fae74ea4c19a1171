"""Storms of faults over whole jobs: a seeded part of `make chaos-long`, and an oracle that can say no."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chaos import oracle
from support.chaos.faults import KINDS, WRONG_PIXELS, calm, storm

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder():
    """In memory, where there is room for it: storms make many small files, and flush them."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mj-storms-", dir=where))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def suite(folder, *arguments):
    """The command, in a process without threads; what it printed of its runs."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "support.chaos",
            folder / "runs",
            *arguments,
            "--record",
            folder / "record.json",
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "OPENBLAS_NUM_THREADS": "1",
            "MILLIJOULE_KEEP_RUNS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (folder / "record.json").exists(), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


SEEDED = ("--seed", "1", "--storms", "14", "--pixels", "1", "--at-once", "2")


@pytest.fixture(scope="module")
def storms(folder):
    """A dozen storms and a device that draws wrong pixels; the undisturbed runs stay for the oracle's own tests."""
    suite(folder, *SEEDED)
    return json.loads((folder / "record.json").read_text())


@pytest.mark.long
def test_nothing_is_lost_nothing_twice_no_joule_false_and_no_row_blamed(storms):
    assert storms["problems"] == []
    assert storms["faults_injected"] >= 30
    assert storms["kinds_injected"] >= 15
    assert storms["outcomes"]["unfinished"] == 0
    assert storms["outcomes"]["certified"] >= 5


@pytest.mark.long
def test_nobody_but_the_oracle_sees_a_device_that_draws_wrong_pixels(storms):
    seen = storms["not_seen"][WRONG_PIXELS]
    assert seen["injected"] == 1
    assert seen["images_with_other_pixels"] > 0
    assert seen["runs_in_which_the_product_says_anything"] == 0


@pytest.mark.long
def test_the_same_command_again_goes_on_where_it_was_and_makes_the_same_record(storms, folder):
    assert suite(folder, *SEEDED) == []
    again = json.loads((folder / "record.json").read_text())
    assert again | {"environment": storms["environment"]} == storms


@pytest.fixture
def finished(storms, folder, tmp_path):
    """A copy of an undisturbed output, and its prompts."""
    shutil.copytree(folder / "runs" / "calm-0" / "out", tmp_path / "out")
    assert list(oracle.image_problems(tmp_path / "out", calm(0).plan.prompts)) == []
    return tmp_path / "out"


def change(output, how):
    """The manifest's rows are what `how` makes of them."""
    path = output / "manifest.parquet"
    table = pq.ParquetFile(path).read()
    path.unlink()
    pq.write_table(pa.Table.from_pylist(how(table.to_pylist()), schema=table.schema), path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda rows: rows[1:], "0 times"),
        (lambda rows: [*rows, rows[0]], "2 times"),
        (lambda rows: [rows[0] | {"status": "quarantined", "error": "no"}, *rows[1:]], "a row is blamed"),
        (lambda rows: [rows[0] | {"sha256": "0" * 64}, *rows[1:]], "the manifest's hash"),
        (lambda rows: [rows[0] | {"seed": 1}, *rows[1:]], "other pixels"),
        (lambda rows: [rows[0] | {"prompt": "another"}, *rows[1:]], "nobody asked for it"),
    ],
)
def test_the_oracle_sees_what_is_wrong_in_a_manifest(finished, how, words):
    change(finished, how)
    assert any(words in problem for problem in oracle.image_problems(finished, calm(0).plan.prompts))


@pytest.mark.long
def test_the_oracle_sees_a_lost_file_and_another_image(finished):
    undisturbed = oracle.hashes(finished)
    first = next(iter(undisturbed))
    others = undisturbed | {first: "0" * 64}
    assert len(list(oracle.image_problems(finished, calm(0).plan.prompts, others))) == 1
    min(oracle.data_files(finished)).unlink()
    assert list(oracle.image_problems(finished, calm(0).plan.prompts, undisturbed))


def test_the_oracle_sees_files_outside_and_processes_that_stay(tmp_path):
    (tmp_path / "core").touch()
    assert list(oracle.stray_files(tmp_path, {"out"})) == ["core is outside the output"]
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert len(list(oracle.orphans(process.pid))) == 1
        process.kill()
    assert list(oracle.orphans(process.pid)) == []


def test_a_seed_is_always_the_same_storm_and_all_kinds_come():
    assert len(KINDS) >= 20
    assert storm(7) == storm(7)
    drawn = [storm(seed) for seed in range(2 * len(KINDS))]
    came = {f.kind for s in drawn for r in s.rounds for f in r.faults}
    came |= {kind for s in drawn for r in s.rounds for kind in (*r.before, *(r.end or ())[:1])}
    came |= {kind for s in drawn for kind in s.after}
    assert came == set(KINDS)
