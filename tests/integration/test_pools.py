"""Pools on a real Ray cluster whose nodes have labels: who runs where, and what the output says of it."""

from __future__ import annotations

import json

import pytest
from support.cluster import RayCluster
from support.jobs import assert_exactly_once, energy_rows, generate, write_prompts

from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.report import cells
from millijoule.pipeline.report.data import Report, collect_report
from millijoule.pipeline.report.page import render_page
from millijoule.workers.storage.open import open_store

POOLS = (
    "--pool",
    "fast:class=fast:workers=1:batch=4",
    "else:class=none|slow:workers=1:price=1",
    "--prefer",
    "speed",
)


@pytest.fixture(scope="module")
def cluster():
    with RayCluster(head_cpus=0) as made:
        made.add_node(1, labels={"class": "fast"}, here=1)
        made.add_node(1, labels={"class": "slow"}, there=1)
        yield made


@pytest.mark.long
def test_each_pool_works_on_the_nodes_with_its_labels_and_the_output_tells_them_apart(cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.txt", 40)
    output = tmp_path / "out"
    job = ("--prompts", prompts, "--output", output, "--model", "python:support.models:waits_for_company")
    done = generate(tmp_path, *job, "--shard-size", "2", *POOLS, ray=cluster.address)
    assert done.returncode == 0, done.stderr
    assert_exactly_once(output, 40)
    workers = energy_rows(output, "env")
    nodes = {pool: {w["node_id"] for w in workers if w["pool"] == pool} for pool in ("fast", "else")}
    assert all(len(ids) == 1 for ids in nodes.values()), nodes
    assert nodes["fast"] != nodes["else"]
    stats = json.loads((output / "stats.json").read_text())
    assert set(stats["pools"]) == {"fast", "else"}
    assert sum(pool["images_ok"] for pool in stats["pools"].values()) == 40
    (job,) = collect_report([open_store(str(output))], Rates()).jobs
    page = render_page(Report((job,))).decode()
    for name, pool in stats["pools"].items():
        assert (name, str(pool["workers"]), str(pool["shards"])) == cells.pool_cells(job)[
            list(stats["pools"]).index(name)
        ][:3]
        assert name in page


@pytest.mark.long
def test_a_dry_run_shows_each_pool_and_what_it_has_room_for(cluster, tmp_path):
    prompts = write_prompts(tmp_path / "p.txt", 4)
    job = ("--prompts", prompts, "--output", tmp_path / "out", "--model", "python:support.models:plain")
    pools = ("--pool", "fast:class=fast:workers=0:3", "gone:class=gone:workers=0:2")
    done = generate(tmp_path, *job, "--dry-run", *pools, ray=cluster.address)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "fast: 0 to 3 workers of 1 CPU, on nodes with class=fast, room now for 1" in said
    assert "images/s on one worker" in said
    assert "gone: 0 to 2 workers of 1 CPU, on nodes with class=gone, room now for 0" in said
    assert "not tried: no node of it is there now" in said
    assert not (tmp_path / "out").exists()
