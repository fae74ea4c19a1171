"""Ray's own autoscaler with fake GPU nodes: from zero up as far as the work needs, and back to zero.

Nodes are counted by a process that asks the cluster's head (`NodeWatch`), commits in the output's folder: no count of the
pool's own is believed.
"""

import time

import pytest
from support.jobs import assert_exactly_once, energy_rows, generate, write_prompts
from support.node_watch import NodeWatch
from support.scaling_cluster import ScalingCluster

QUICK = ("--model", "python:support.models:plain")
SLOW = ("--model", "python:support.models:slow")  # 0.05 s per image


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
    """No process of a worker is there for long after the driver has gone."""
    deadline = time.monotonic() + 30
    while cluster.workers() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not cluster.workers()


def bought(watch: NodeWatch) -> int:
    """Every GPU node there ever was; a node that comes again has another id."""
    return len(frozenset().union(*(s.nodes for s in watch.samples)))


def test_nodes_come_as_far_as_there_is_work_and_go(scaling, tmp_path):
    """Two dozen shards of no time, eight nodes at hand: one of them does it."""
    shards = 24
    prompts, output = write_prompts(tmp_path / "prompts.txt", 4 * shards), tmp_path / "out"
    arguments = ("--prompts", prompts, *QUICK, "--shard-size", 4, "--workers", "0:12", "--output", output)
    with NodeWatch(scaling.address, output, tmp_path / "nodes.jsonl") as watch:
        watch.wait_for_none()
        done = generate(tmp_path, *arguments, ray=scaling.address)
        assert done.returncode == 0, done.stderr
        assert no_workers_left(scaling)
        watch.wait_for_none()
        again = generate(tmp_path, *arguments, ray=scaling.address)  # finished: no reason to start a node
        assert again.returncode == 0, again.stderr
        watch.wait_for_none()
    assert_exactly_once(output, 4 * shards)
    assert "device: gpu, because node type gpu-worker " in done.stderr
    assert "device:" not in again.stderr
    samples = watch.samples
    print(f"nodes bought: {bought(watch)}")
    assert bought(watch) == 1
    assert (samples[0].nodes, samples[-1].nodes) == (frozenset(), frozenset())
    assert samples[-1].waiting == 0


def test_two_pools_have_no_node_that_makes_nothing(tmp_path):
    """Two labelled node types, three shards of no time: of the pools, which nobody knows anything of, one has a node."""
    prompts, output = write_prompts(tmp_path / "prompts.txt", 12), tmp_path / "out"
    types = {"quick": ({"CPU": 2, "GPU": 1}, 2), "lean": ({"CPU": 2, "GPU": 1}, 2)}
    pools = [f"{name}:millijoule.test/kind={name}:workers=0:2:gpus=1" for name in types]
    with (
        ScalingCluster(types, labels={name: {"millijoule.test/kind": name} for name in types}) as cluster,
        NodeWatch(cluster.address, output, tmp_path / "nodes.jsonl") as watch,
    ):
        arguments = ("--prompts", prompts, *QUICK, "--shard-size", 4, "--output", output)
        done = generate(tmp_path, *arguments, "--pool", *pools, ray=cluster.address)
        assert done.returncode == 0, done.stderr
        watch.wait_for_none()
    assert_exactly_once(output, 12)
    launched = frozenset().union(*(s.nodes for s in watch.samples))
    worked = {row["node_id"] for row in energy_rows(output, "attempt") if row["outcome"] == "committed"}
    assert launched == worked
    assert len(launched) == 1


@pytest.mark.slow
def test_requests_shrink_with_the_work(scaling, tmp_path):
    """Two nodes at most for some sixty shards: what waits beyond the shards that are left is taken back, not left to be bought."""
    images = 3600
    prompts, output = write_prompts(tmp_path / "prompts.txt", images), tmp_path / "out"
    with NodeWatch(scaling.address, output, tmp_path / "nodes.jsonl") as watch:
        watch.wait_for_none()
        done = generate(
            tmp_path,
            *("--prompts", prompts, *SLOW, "--shard-size", "3s", "--output", output),
            *("--workers", "0:10", "--resources", "few=1"),
            ray=scaling.address,
        )
        assert done.returncode == 0, done.stderr
        assert no_workers_left(scaling)
        watch.wait_for_none()
    assert_exactly_once(output, images)
    said = [line for line in done.stderr.splitlines() if line.startswith("device: ")]
    assert len(said) == 1, done.stderr  # a calibration and its job share one decision
    assert said[0].startswith("device: gpu, because node type gpu-few "), said
    samples = watch.samples
    shards = samples[-1].commits
    late = [s.waiting for s in samples if s.commits in (shards - 1, shards - 2)]
    print(f"{shards} shards; waiting at most {max(s.waiting for s in samples)}, in the end {late}")
    assert max(s.waiting for s in samples) >= 2, "nothing ever waited: this test shows nothing"
    assert min(late) == 0
    assert max(len(s.nodes) for s in samples) == 2
    assert (samples[0].nodes, samples[-1].nodes) == (frozenset(), frozenset())
    assert samples[-1].waiting == 0


MARKET = "ray.io/market-type"


@pytest.mark.slow
def test_a_spot_pool_takes_on_demand_nodes_beyond_the_spot_ones_and_waiting_has_a_reason(tmp_path):
    """One spot node is to be had, and two workers' work: the second comes on demand. For what no node has, nothing is bought."""
    images = 400
    prompts = write_prompts(tmp_path / "prompts.txt", images)
    job = ("--prompts", prompts, *SLOW, "--shard-size", 8)
    types = {"spot": ({"CPU": 2, "GPU": 1}, 1), "on-demand": ({"CPU": 2, "GPU": 1}, 4)}
    with (
        ScalingCluster(types, labels={name: {MARKET: name} for name in types}) as cluster,
        NodeWatch(cluster.address, tmp_path / "out", tmp_path / "nodes.jsonl") as watch,
    ):
        pool = ("--pool", f"gpu:{MARKET}=spot|on-demand:workers=2:2:gpus=1")
        done = generate(tmp_path, *job, "--output", tmp_path / "out", *pool, ray=cluster.address)
        assert done.returncode == 0, done.stderr
        bought = {node: kind for s in watch.samples for node, kind in s.types.items()}
        watch.wait_for_none()
        so_far = len(watch.samples)
        pool = ("--pool", f"gpu:{MARKET}=reserved:workers=0:2:gpus=1", "--deadline", "30s")
        waited = generate(tmp_path, *job, "--output", tmp_path / "waits", *pool, ray=cluster.address)
        assert not any(s.nodes or s.coming for s in watch.samples[so_far:])
    assert_exactly_once(tmp_path / "out", images)
    assert sorted(bought.values()) == ["on-demand", "spot"]
    assert waited.returncode == 4, waited.stderr
    assert f"no node type with 1 CPU and 1 GPU and {MARKET}=reserved" in waited.stderr


def test_gpus_that_no_node_type_has_are_refused(scaling, tmp_path):
    """Asked of the real autoscaler, which says that it cannot; no node comes for the question."""
    prompts, output = write_prompts(tmp_path / "prompts.txt", 4), tmp_path / "out"
    with NodeWatch(scaling.address, output, tmp_path / "nodes.jsonl") as watch:
        watch.wait_for_none()
        done = generate(
            tmp_path,
            *("--prompts", prompts, *SLOW, "--output", output, "--gpus-per-worker", 4),
            ray=scaling.address,
        )
        watch.wait_for_none()
    assert done.returncode == 1
    assert "--gpus-per-worker 4: the cluster at" in done.stderr
    assert "cannot start a node with 1 CPU and 4 GPU" in done.stderr
    assert not any(s.nodes for s in watch.samples)


def test_a_cluster_without_gpus_or_autoscaler_says_so(ray_address, tmp_path):
    arguments = ("--prompts", write_prompts(tmp_path / "prompts.txt", 4), *SLOW, "--output", tmp_path / "out")
    refused = generate(tmp_path, *arguments, "--device", "gpu", ray=ray_address)
    assert refused.returncode == 1
    assert "--device gpu: the cluster at" in refused.stderr
    assert "no autoscaler" in refused.stderr
    done = generate(tmp_path, *arguments, ray=ray_address)
    assert done.returncode == 0, done.stderr
    assert "device: cpu, because the cluster at" in done.stderr
