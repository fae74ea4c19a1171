"""Ray's own autoscaler with fake GPU nodes: from zero up as far as the work needs, and back to zero.

Nodes are counted by a process that asks the cluster's head (`NodeWatch`), commits in the output's folder: no count of the
pool's own is believed.
"""

import time

import pytest
from support.jobs import assert_exactly_once, generate, write_prompts
from support.node_watch import NodeWatch
from support.scaling_cluster import ScalingCluster

SLOW = ("--model", "python:support.models:slow")  # 0.05 s per image

#: The smallest shard that a calibration makes.
CALIBRATED_IMAGES = 16


@pytest.fixture(scope="module")
def scaling():
    types = {
        "gpu-worker": ({"CPU": 2, "GPU": 1}, 6),
        "gpu-few": ({"CPU": 2, "GPU": 1, "few": 1}, 2),
        "cpu-worker": ({"CPU": 2}, 2),
    }
    with ScalingCluster(types) as cluster:
        yield cluster


def no_workers_left(cluster: ScalingCluster) -> bool:
    """No process of a worker, and nothing that waits, a moment after the driver has gone."""
    deadline = time.monotonic() + 10
    while cluster.workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not cluster.workers()


def test_nodes_come_as_far_as_there_is_work_and_go(scaling, tmp_path):
    """Two dozen shards of under a second, six nodes at hand: four workers are the most that can be of use.

    They are asked for before anybody knows how long a shard takes; then none is worth the time a node needs to start.
    """
    shards = 24
    prompts = write_prompts(tmp_path / "prompts.txt", shards * CALIBRATED_IMAGES)
    output = tmp_path / "out"
    arguments = ("--prompts", prompts, *SLOW, "--shard-size", "0.1s", "--workers", "0:12", "--output", output)
    with NodeWatch(scaling.address, output, tmp_path / "nodes.jsonl") as watch:
        watch.wait_for(0)
        done = generate(tmp_path, *arguments, ray=scaling.address)
        assert done.returncode == 0, done.stderr
        assert no_workers_left(scaling)
        watch.wait_for(0)
        again = generate(tmp_path, *arguments, ray=scaling.address)  # finished: no reason to start a node
        assert again.returncode == 0, again.stderr
    assert_exactly_once(output, shards * CALIBRATED_IMAGES)
    said = [line for line in done.stderr.splitlines() if line.startswith("device: ")]
    assert len(said) == 1, done.stderr  # a calibration and its job share one decision
    assert said[0].startswith("device: gpu, because node type gpu-worker "), said
    assert "device:" not in again.stderr
    samples = watch.samples
    assert samples[0].nodes == frozenset()
    ever = frozenset().union(*(s.nodes for s in samples))
    print(f"nodes bought: {len(ever)}, at most {max(len(s.nodes) for s in samples)} at once")
    assert 1 <= len(ever) <= 4
    assert samples[-1].nodes == frozenset()
    assert samples[-1].waiting == 0


def test_requests_shrink_with_the_work(scaling, tmp_path):
    """A cluster that gives two nodes at most to ten shards: what waits beyond the shards that are left is taken back."""
    shards, images = 10, 80
    prompts = write_prompts(tmp_path / "prompts.txt", shards * images)
    output = tmp_path / "out"
    with NodeWatch(scaling.address, output, tmp_path / "nodes.jsonl") as watch:
        watch.wait_for(0)
        done = generate(
            tmp_path,
            *("--prompts", prompts, *SLOW, "--shard-size", images, "--output", output),
            *("--workers", "0:10", "--resources", "few=1"),
            ray=scaling.address,
        )
        assert done.returncode == 0, done.stderr
        assert no_workers_left(scaling)
        watch.wait_for(0)
    assert_exactly_once(output, shards * images)
    assert "device: gpu, because node type gpu-few " in done.stderr
    samples = watch.samples
    assert max(s.waiting for s in samples) > 2, "nothing ever waited: this test shows nothing"
    late = [s.waiting for s in samples if 0 < shards - s.commits <= 2]
    assert late
    assert min(late) == 0, late
    assert len(frozenset().union(*(s.nodes for s in samples))) <= 2
    assert samples[-1].waiting == 0
