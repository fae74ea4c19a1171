"""Whose fault it is: a row's, a node's, the store's. Real clusters, real faults; the oracle is the output and its images."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.cluster import RayCluster
from support.jobs import (
    assert_exactly_once,
    environment,
    generate,
    manifest,
    start,
    wait_for_commits,
    write_prompts,
)

PROMPTS = 60
BAD_NODE = Path(__file__).parents[1] / "support" / "bad_node"
TESTS = Path(__file__).parents[1]

FAULTS = {
    "has no model": "no such file",
    "dies at start": "died",
    "sees no output": "does not see the job's files",
    "cannot write the output": "Permission denied",
    "no scratch space": "No space left on device",
    "has a broken driver": "no device",
    "is sick after its third call": "illegal memory access",
    "has memory for one image only": "out of memory",
}


@pytest.fixture(scope="module")
def three_nodes():
    """A head without room for workers, two good nodes, and one where whatever a job's environment names goes wrong."""
    with RayCluster(head_cpus=0) as cluster:
        for bad in (True, False, False):
            cluster.add_node(cpus=1, env={"MILLIJOULE_TEST_NODE": "bad" if bad else "good"})
        yield cluster


def job(prompts, output, model, *more):
    return (
        *("--prompts", prompts, "--output", output, "--shard-size", 4),
        *("--model", f"python:support.models:{model}", *more),
    )


def with_fault(fault):
    return {"PYTHONPATH": f"{BAD_NODE}:{TESTS}", "MILLIJOULE_TEST_FAULT": fault}


#: One of each kind in every run: at a node's start, in its files, in its model; the others with the slow tests.
QUICK = ("has no model", "no scratch space", "has memory for one image only")


@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS]
)
def test_one_bad_node_of_three_blames_no_row_and_is_named(tmp_path, three_nodes, fault):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", PROMPTS)
    done = generate(tmp_path, *job(prompts, out, "on_bad_node"), ray=three_nodes.address, **with_fault(fault))
    assert done.returncode == 0, done.stderr
    assert {r["status"] for r in manifest(out)} == {"ok"}
    assert_exactly_once(out, PROMPTS)
    named = [line for line in done.stderr.splitlines() if line.startswith("node ")]
    assert len(named) == 1, done.stderr
    assert FAULTS[fault] in named[0]


@pytest.mark.slow
def test_where_no_node_can_work_the_job_ends_and_says_so_for_each(tmp_path):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", 8)
    with RayCluster(head_cpus=0) as cluster:
        for _ in range(2):
            cluster.add_node(cpus=1, env={"MILLIJOULE_TEST_NODE": "bad"})
        arguments = job(prompts, out, "on_bad_node")
        done = generate(tmp_path, *arguments, ray=cluster.address, **with_fault("has no model"))
        assert done.returncode == 1
        assert "no node is left that can work" in done.stderr
        lines = done.stderr[done.stderr.index("no node is left") :].splitlines()
        assert sum("left out for this run" in line and "no such file" in line for line in lines[1:3]) == 2
        cluster.add_node(cpus=1, env={"MILLIJOULE_TEST_NODE": "good"})
        done = generate(tmp_path, *arguments, ray=cluster.address, **with_fault("has no model"))
        assert done.returncode == 0, done.stderr
    assert_exactly_once(out, 8)


@pytest.mark.parametrize(
    "model", [pytest.param("dies_on_poison", marks=pytest.mark.slow), "dies_after_poison"]
)
def test_a_row_that_kills_is_found_even_if_it_kills_a_moment_later(tmp_path, ray_address, model):
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{'poison' if i == 5 else 'fine'} {i}" for i in range(8)))
    done = generate(tmp_path, *job(prompts, out, model), ray=ray_address)
    assert done.returncode == 3, done.stderr
    bad = {r["prompt"]: r["error"] for r in manifest(out) if r["status"] == "quarantined"}
    assert bad == {"poison 5": "every worker that generated this row died"}
    assert_exactly_once(out, 8)


def test_a_shard_that_no_worker_can_make_is_quarantined_and_tried_again_on_request(tmp_path, ray_address):
    out = tmp_path / "out"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{'poison' if i < 2 else 'fine'} {i}" for i in range(4)))
    arguments = job(prompts, out, "dies_on_poison", "--shard-size", 2)
    done = generate(tmp_path, *arguments, ray=ray_address)
    assert done.returncode == 3, done.stderr
    assert [r["status"] for r in manifest(out)] == ["quarantined"] * 2 + ["ok"] * 2
    assert (out / "_SUCCESS").exists()
    assert pq.read_table(out / "energy" / "attempt").num_rows > 0
    again = generate(tmp_path, *arguments, "--retry-failed", ray=ray_address)
    assert again.returncode == 3, again.stderr
    assert "retrying 2 quarantined images" in again.stderr
    assert_exactly_once(out, 4)


SLOW_TO_SET_UP = """
import sys, time
from pathlib import Path
from millijoule.jobs.generate import main
from millijoule.jobs.set_up import job

def set_up_job(*_):
    Path(sys.argv[1]).touch()
    time.sleep(600)

job.set_up_job = set_up_job
sys.exit(main(sys.argv[2:]))
"""


def test_a_head_that_dies_ends_drivers_within_seconds_one_that_sets_its_job_up_as_well(tmp_path):
    out, begun = tmp_path / "out", tmp_path / "begun"
    prompts = write_prompts(tmp_path / "prompts.txt", 400)
    with RayCluster(head_cpus=0) as cluster:
        cluster.add_node(cpus=1)
        driver = start(tmp_path, *job(prompts, out, "slow"), ray=cluster.address)
        options = ["--prompts", prompts, "--output", tmp_path / "other", "--ray-address", cluster.address]
        second = subprocess.Popen(
            [sys.executable, "-c", SLOW_TO_SET_UP, begun, *options],
            env=environment(tmp_path),
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_commits(out, 2)
        while not begun.exists():
            assert second.poll() is None
            time.sleep(0.1)
        cluster.nodes[0].head_service().kill()
        assert driver.wait(120) == 1
        said_second = second.communicate(timeout=120)[1]
        assert second.returncode == 1
    for said in ((tmp_path / "driver.log").read_text(), said_second):
        assert "the head of the Ray cluster is gone" in said
        assert "run the same job again" in said


FROM_PYTHON = """
import sys
from millijoule.jobs import generate
from millijoule.workers.errors import JobError

address, prompts, output = sys.argv[1:]
try:
    generate(prompts=prompts, output=output, shard_size=4, model="python:support.models:slow", ray_address=address)
except JobError as error:
    print("raised:", error)
"""


@pytest.mark.slow
def test_a_head_that_dies_is_an_error_of_the_function_and_the_process_lives_on(tmp_path):
    out = tmp_path / "out"
    prompts = write_prompts(tmp_path / "prompts.txt", 400)
    with RayCluster(head_cpus=0) as cluster:
        cluster.add_node(cpus=1)
        caller = subprocess.Popen(
            [sys.executable, "-c", FROM_PYTHON, cluster.address, prompts, out],
            env=environment(tmp_path),
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for_commits(out, 2)
        cluster.nodes[0].head_service().kill()
        said, _ = caller.communicate(timeout=240)
    assert caller.returncode == 0
    assert "raised: the head of the Ray cluster is gone" in said


def test_storage_that_is_away_is_waited_for_and_nobody_is_blamed(
    tmp_path, ray_address, moto_s3, fault_proxy, s3_env
):
    proxy = fault_proxy(moto_s3)
    s3_env(moto_s3)
    url = f"s3://{moto_s3.make_bucket('away')}/out"
    s3_env(moto_s3.through(proxy))
    prompts = write_prompts(tmp_path / "prompts.txt", 60)
    driver = start(tmp_path, *job(prompts, url, "slow", "--lease-seconds", 3), ray=ray_address)
    deadline = time.monotonic() + 90
    while sum("PUT" in line and "/commits/" in line for line in proxy.requests) < 3:
        assert time.monotonic() < deadline, (tmp_path / "driver.log").read_text()
        time.sleep(0.1)
    fault = proxy.inject("status", pattern=".", times=1_000_000, status=503)
    time.sleep(15)  # five leases
    assert driver.poll() is None
    proxy.clear()
    assert fault.hits
    assert driver.wait(120) == 0, (tmp_path / "driver.log").read_text()
    said = (tmp_path / "driver.log").read_text()
    assert "is gone" not in said
    assert "no progress" not in said
    assert_exactly_once(url, 60)
