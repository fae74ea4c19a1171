"""Whatever is certified is what the counters ran, or it is marked missing: whole jobs in which anything dies.

The judge reads the history of stand-in boards, one counter per worker, never the ledger (`support.counter_judge`).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.fault_plans import KNOWN
from support.random_runs import summary

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder():
    """For many small files that are flushed to disk: in memory, where there is room for it."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mj-runs-", dir=where))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(names, folder):
    """Runs in a process without threads, from which those of the jobs are forked; results as they came."""
    done = subprocess.run(
        [sys.executable, "-m", "support.random_runs", names, str(folder)],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_true(results):
    """Nothing certified differs from the counters, and what only killed workers and readers is certified."""
    assert [r for r in results if r["problems"]] == []
    counts = summary(results)
    benign = counts["only_workers_and_readers_die"]
    assert benign["certified"] >= 0.9 * benign["runs"], counts
    others = counts["nodes_drivers_and_counters_too"]
    assert others["certified"] >= 0.25 * others["runs"], counts
    assert benign["unfinished"] + others["unfinished"] <= 0.02 * counts["runs"], counts


def test_random_runs(folder):
    results = run("0:16", folder)
    assert len(results) == 16
    assert sum(r["benign"] for r in results) >= 5
    assert sum(not r["benign"] for r in results) >= 5
    assert_true(results)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_hundred_random_runs(folder):
    results = run("100:400", folder)
    assert len(results) == 300
    assert_true(results)


@pytest.fixture(scope="module")
def known(folder):
    return {result["run"]: result for result in run(",".join(KNOWN), folder)}


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "resumed without a host"])
def test_a_run_in_which_somebody_can_read_is_certified(known, name):
    assert known[name]["problems"] == []
    assert known[name]["outcome"] == "certified"
    assert known[name]["total_mj"] == known[name]["ran_mj"]


def test_where_nobody_can_read_the_worker_is_named(known):
    result = known["resumed without a host"]
    assert result["problems"] == []
    assert result["outcome"] == "missing"
    assert any(reason.startswith("w0001-") and "its node is gone" in reason for reason in result["reasons"])
