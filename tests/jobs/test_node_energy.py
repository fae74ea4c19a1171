"""`millijoule node-energy`: a power strip's log after the job, on local folders and S3; twice is once."""

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.report_outputs import measured_output

from millijoule.jobs.cli import main as millijoule
from millijoule.jobs.node_energy import main
from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import load_records
from millijoule.pipeline.closing.node_import import node_times
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.sql.query import open_tables, run_query
from millijoule.workers.storage.open import open_store

HOST_B_W = 300 + 50  # its GPU and its package
STEP_NS = 5_000_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job on host-a (two workers) and host-b (one); nobody changes it."""
    return Path(measured_output(tmp_path_factory.mktemp("job"), [f"prompt {i}" for i in range(60)]).url)


@pytest.fixture
def output(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def log(finished, tmp_path):
    """`log(watts, name)`: a strip's log around the job on host-b; `watts` by outlet."""
    store = open_store(str(finished))
    shards = load_job_shards(store, require_job(store))
    begin, end = node_times(load_records(store, len(shards)))["host-b"]

    def made(watts, name="pdu.csv", *, shift_s=0, within=(0.0, 1.0)):
        lines = ["time,outlet,watts"]
        first, last = (begin - 10 * STEP_NS, end + 10 * STEP_NS)
        first, last = (round(first + share * (last - first)) for share in within)
        for t in range(first, last, STEP_NS):
            at = datetime.fromtimestamp(t // 1000 / 1e6 + shift_s, UTC).isoformat()
            lines += [f"{at},{outlet},{w:.3f}" for outlet, w in watts.items()]
        path = tmp_path / name
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return made


def arguments(output, *files, rest="30+-2", node="host-b"):
    return [str(output), "--pdu", *files, "--node", node, "--rest", rest, "--clock-error", "0"]


def hashes(output):
    return {
        str(p.relative_to(output)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in output.rglob("*")
        if p.is_file()
    }


def rows(output, table):
    return pq.read_table(output / "energy" / table).to_pylist()


def test_the_strip_closes_against_devices_and_rest(output, log, capsys):
    assert main(arguments(output, log({"7": HOST_B_W + 30}))) == 0
    shown = capsys.readouterr().out
    assert "C3 holds for host-b boot boot-host-b by pdu: cpu, gpu counters and declared rest" in shown
    assert "evidence class: E1" in shown  # power was not sampled, and host-a has no meter
    by_scope = {r["scope"]: r for r in rows(output, "closure") if r["check"] == "C3"}
    closed = by_scope["host-b boot boot-host-b by pdu"]
    assert closed["passed"] is True
    assert abs(closed["residual_share"]) < 0.01
    assert by_scope["host-a boot boot-host-a"]["note"] == "no meter of this node was read"
    stats = json.loads((output / "stats.json").read_text())
    assert stats["closure"]["C3"] is True
    assert stats["images_ok"] == 60  # the rest of it stands
    assert list(check_output(open_store(str(output)))) == []
    with open_tables([open_store(str(output))]) as connection:
        assert run_query(connection, "closure_c3", {}).num_rows == 0


def test_twice_is_once_and_again_replaces(output, log):
    file = log({"7": HOST_B_W + 30})
    assert main(arguments(output, file)) == 0
    once = hashes(output)
    assert main(arguments(output, file)) == 0
    assert hashes(output) == once
    assert main(arguments(output, log({"7": HOST_B_W + 130}))) == 1
    readings = rows(output, "node_reading")
    assert {r["power_mw"] for r in readings} == {(HOST_B_W + 130) * 1000}
    assert len(readings) == len({r["t_wall_ns"] for r in readings})
    assert list(check_output(open_store(str(output)))) == []


def test_a_residual_is_an_exit_code_and_a_row(output, log, capsys):
    assert main(arguments(output, log({"7": 500}))) == 1
    assert "C3 FAILS for host-b" in capsys.readouterr().out
    with open_tables([open_store(str(output))]) as connection:
        (problem,) = run_query(connection, "closure_c3", {}).to_pylist()
    assert problem["problem"] == "residual beyond the tolerance"


def test_the_outlets_of_two_power_supplies_add_up(output, log, capsys):
    file = log({"7": 200, "8": HOST_B_W - 170, "9": 999})
    assert main([*arguments(output, file), "--outlet", "7", "8"]) == 0
    assert {(r["part"], r["name"]) for r in rows(output, "node_energy")} == {
        *(("node", "outlet 7"), ("node", "outlet 8"), ("rest", "declared")),
        *(("device", "cpu:package-0"), ("device", "gpu:GPU-33333333-cccc")),
    }
    assert main(arguments(output, file)) == 1
    assert "outlet 8 after 7: say which outlet is the node's" in capsys.readouterr().err


def test_files_that_follow_each_other_are_one_log(output, log, capsys):
    files = [
        log({"7": HOST_B_W + 30}, f"{n}.csv", within=w) for n, w in enumerate([(0.5, 1.0), (0.0, 0.4999)])
    ]
    main(arguments(output, *files))
    assert "C3 holds for host-b" in capsys.readouterr().out
    assert main(arguments(output, files[0], files[0])) == 1
    assert "two files have readings of the same time" in capsys.readouterr().err


def test_only_readings_around_the_job_are_kept(output, log):
    path = Path(log({"7": HOST_B_W + 30}))
    head, *lines = path.read_text().splitlines()
    before = [f"2020-01-01T00:00:{s:02d}+00:00,7,1" for s in range(60)]
    path.write_text("\n".join([head, *before, *lines]) + "\n")
    assert main(arguments(output, str(path))) == 0
    assert len(rows(output, "node_reading")) < len(lines)


def test_without_a_declared_rest_the_check_stays_open(output, log, capsys):
    with_rest = arguments(output, log({"7": HOST_B_W + 30}))
    without = [a for a in with_rest if a not in ("--rest", "30+-2")]
    assert main(without) == 0
    assert "the rest of the node is not declared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"node": "host-c"}, "--node host-c: this job ran on host-a, host-b", 1),
        ({"rest": "30"}, "--rest 30: watts and by how much they may be wrong, such as 180+-30", 2),
    ],
)
def test_options_that_cannot_be_meant_are_named(output, log, capsys, change, words, code):
    assert main(arguments(output, log({"7": 380}), **change)) == code
    assert words in capsys.readouterr().err


def test_a_log_of_another_time_is_refused_and_nothing_written(output, log, capsys):
    before = hashes(output)
    assert main(arguments(output, log({"7": 380}, shift_s=-7200))) == 1
    assert "its readings are from" in capsys.readouterr().err
    assert hashes(output) == before


def test_a_job_that_has_not_finished_is_refused(output, log, capsys):
    (output / "_SUCCESS").unlink()
    assert main(arguments(output, log({"7": 380}))) == 1
    assert "the job has not finished" in capsys.readouterr().err
    assert not (output / "_job/node_meters").exists()


@pytest.mark.long
def test_on_s3_through_the_command(finished, log, moto_s3, s3_env, capsys):
    s3_env(moto_s3)
    url = f"s3://{moto_s3.make_bucket('job')}/out"
    store = open_store(url)
    for path in finished.rglob("*"):
        if path.is_file():
            store.put(str(path.relative_to(finished)), path.read_bytes())
    assert millijoule(["node-energy", *arguments(url, log({"7": HOST_B_W + 30}))]) == 0
    assert "C3 holds for host-b" in capsys.readouterr().out
    assert len(list(store.list("_job/node_meters/"))) == 1
    assert list(check_output(store)) == []
