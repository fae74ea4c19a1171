"""Exactly once under kill -9: real processes, killed at real points. The oracles are `assert_exactly_once`, and for the
energy of jobs that a stand-in node's counters follow `assert_books_close`."""

import json
import os
import signal
import time

import psutil
import pytest
from support.cluster import RayCluster
from support.jobs import (
    assert_books_close,
    assert_exactly_once,
    generate,
    hashes,
    manifest,
    start,
    wait_for_commits,
    wait_for_log,
    write_prompts,
)
from support.nodes import SteadyNode

PROMPTS = 96


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, ray_address):
    """Hashes of a run in which nothing dies."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "prompts.txt", PROMPTS)
    done = generate(folder, *job(prompts, folder / "out", "plain"), ray=ray_address)
    assert done.returncode == 0, done.stderr
    return hashes(folder / "out")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.txt", PROMPTS)


@pytest.fixture
def node(tmp_path):
    """Counters of a processor that nobody kills, for all workers of a job; `env` makes a job read them."""
    with SteadyNode(tmp_path) as steady:
        yield steady


def job(prompts, output, model, *more):
    return (
        *("--prompts", prompts, "--output", output, "--shard-size", 8),
        *("--model", f"python:support.models:{model}", *more),
    )


#: Kills at every step of an attempt, without Ray, are in tests/workers/test_commit_protocol.py and tests/chaos/test_storms.py.
@pytest.mark.parametrize(
    "model",
    [
        pytest.param("dies_before_upload", marks=pytest.mark.slow),
        "dies_between_uploads",
        pytest.param("dies_before_commit", marks=pytest.mark.slow),
        "dies_after_commit",
    ],
)
def test_a_worker_killed_at_any_point_of_an_attempt(tmp_path, prompts, ray_address, undisturbed, model, node):
    out = tmp_path / "out"
    done = generate(tmp_path, *job(prompts, out, model, "--format", "files"), ray=ray_address, **node.env)
    assert done.returncode == 0, done.stderr
    assert "is gone" in done.stderr  # it really died, and the log says so
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


def test_the_driver_killed_twice(tmp_path, prompts, ray_address, undisturbed, node):
    out = tmp_path / "out"
    for commits in (2, 6):
        driver = start(tmp_path, *job(prompts, out, "slow"), ray=ray_address, **node.env)
        wait_for_commits(out, commits)
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    before = {p: p.read_bytes() for p in out.glob("_job/commits/*/*.json")}
    done = generate(tmp_path, *job(prompts, out, "slow"), ray=ray_address, **node.env)
    assert done.returncode == 0, done.stderr
    assert all(p.read_bytes() == body for p, body in before.items())
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


#: Both signals, and two of one, are in tests/jobs/test_generate.py as well.
@pytest.mark.parametrize("signum", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_job_says_so_and_resumes(tmp_path, prompts, ray_address, undisturbed, signum, node):
    out = tmp_path / "out"
    driver = start(tmp_path, *job(prompts, out, "slow"), ray=ray_address, **node.env)
    wait_for_commits(out, 1)
    driver.send_signal(signum)
    assert driver.wait(60) == 5
    assert "run the same command again" in (tmp_path / "driver.log").read_text()
    done = generate(tmp_path, *job(prompts, out, "slow"), ray=ray_address, **node.env)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


def test_a_zombie_cannot_commit(tmp_path, prompts, ray_address, undisturbed, node):
    """A worker is stopped before its commit for longer than its lease, another makes the shard, the first wakes."""
    out = tmp_path / "out"
    pid_file = tmp_path / "stopped-pid"
    driver = start(
        tmp_path, *job(prompts, out, "stops_before_commit", "--lease-seconds", 4), ray=ray_address, **node.env
    )
    deadline = time.monotonic() + 90
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    wait_for_log(tmp_path, "leasing the shard again")
    psutil.Process(int(pid_file.read_text())).send_signal(signal.SIGCONT)
    assert driver.wait(90) == 0, (tmp_path / "driver.log").read_text()
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


def test_a_worker_that_never_wakes_is_replaced(tmp_path, prompts, ray_address, undisturbed, node):
    out = tmp_path / "out"
    done = generate(
        tmp_path, *job(prompts, out, "stops_before_commit", "--lease-seconds", 3), ray=ray_address, **node.env
    )
    assert done.returncode == 0, done.stderr
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


@pytest.mark.slow
def test_a_batch_longer_than_its_lease_is_left_alone_while_it_gets_on(tmp_path, ray_address, node):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", 8)
    done = generate(
        tmp_path,
        *job(prompts, out, "many_steps", "--lease-seconds", 2, "--workers", 1),
        ray=ray_address,
        **node.env,
    )
    assert done.returncode == 0, done.stderr
    assert "no progress" not in done.stderr
    assert "is gone" not in done.stderr
    assert_exactly_once(out, 8)
    assert_books_close(out)


def test_two_drivers_at_once(tmp_path, prompts, ray_address, undisturbed, node):
    """The one that began first stands down as soon as there is the other, which alone writes the end of the job."""
    out = tmp_path / "out"
    arguments = (*job(prompts, out, "slow"), "--workers", 1)
    drivers = [start(tmp_path, *arguments, ray=ray_address, **node.env) for _ in range(2)]
    assert sorted(d.wait(180) for d in drivers) == [0, 7], (tmp_path / "driver.log").read_text()
    assert len(list(out.glob("_job/epochs/*.json"))) == 2
    log = (tmp_path / "driver.log").read_text()
    assert log.count("run 1 (this one) stands down") == 1
    assert "superseded by run 2 (on " in log
    began_ns = (out / "_job/epochs/000002.json").stat().st_mtime_ns
    written = [(json.loads(p.read_text()), p.stat().st_mtime_ns) for p in out.glob("_job/commits/*/*.json")]
    late = [c["shard_id"] for c, at_ns in written if c["driver_epoch"] == 1 and at_ns > began_ns]
    assert len(late) <= 1, "no more than was being created"
    assert hashes(out) == undisturbed
    assert_exactly_once(out, PROMPTS)
    assert_books_close(out)


def test_a_row_that_hangs_its_worker_is_found(tmp_path, ray_address, node):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{'poison' if i == 2 else 'fine'} {i}\n" for i in range(8)))
    out = tmp_path / "out"
    arguments = (*job(prompts, out, "hangs_on_poison"), "--lease-seconds", 2)
    done = generate(tmp_path, *arguments, ray=ray_address, **node.env)
    assert done.returncode == 3, done.stderr
    assert [r["prompt"] for r in manifest(out) if r["status"] == "quarantined"] == ["poison 2"]
    assert_exactly_once(out, 8)
    assert_books_close(out)


def test_a_raylet_killed_takes_its_node_and_nothing_else(tmp_path, prompts, undisturbed, node):
    """The job starts on a cluster without room for workers, two nodes come, and one of their raylets is killed."""
    out = tmp_path / "out"
    with RayCluster(head_cpus=0) as cluster:
        driver = start(
            tmp_path, *job(prompts, out, "slow"), "--workers", "2:2", ray=cluster.address, **node.env
        )
        wait_for_log(tmp_path, "waiting for the cluster: 2 workers asked for (1 CPU each)")
        nodes = [cluster.add_node(cpus=1) for _ in range(2)]
        wait_for_commits(out, 3)
        orphans = nodes[0].workers()
        nodes[0].raylet().kill()
        assert driver.wait(120) == 0, (tmp_path / "driver.log").read_text()
        assert hashes(out) == undisturbed
        assert_exactly_once(out, PROMPTS)
        assert_books_close(out)
        _, alive = psutil.wait_procs(orphans, timeout=20)
        assert not alive, "workers of a dead raylet must end themselves"
