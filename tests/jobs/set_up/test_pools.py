"""Pools that fit the same nodes: how many workers are asked for, and what is said of that before and in a job."""

from __future__ import annotations

import logging

import pytest
from support.stand_in_jobs import start_cluster

from millijoule.jobs import generate
from millijoule.jobs.set_up import pools_forecast
from millijoule.jobs.set_up.pools import pools_on
from millijoule.jobs.set_up.pools_forecast import Part, total_lines, totals_of
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.workers.lease import Calibration

IMAGES = 40


@pytest.fixture
def ray(monkeypatch):
    """One node with two CPUs. `waited`: the most workers without a node, whenever one was asked for."""
    ray = start_cluster(monkeypatch)
    ray.add_node("host-1", CPU=2.0)
    ray.waited, create = 0, ray.create

    def counted(options, args):
        handle = create(options, args)
        ray.waited = max(ray.waited, len(ray.requests))
        return handle

    ray.create = counted
    return ray


@pytest.fixture
def job(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("".join(f"prompt {i}\n" for i in range(IMAGES)))

    def call(*pools, **more):
        options = {"shard_size": 2, "telemetry": False, "model": "python:support.models:plain"}
        return generate(prompts=prompts, output=tmp_path / "out", pool=pools, **{**options, **more})

    return call


@pytest.fixture
def owned(monkeypatch):
    """`owned(own)`: whether the cluster is the job's own, which nobody will ever join."""

    def is_own(own):
        def on(request, cluster):
            return pools_on(request, Cluster("this machine", own=own))

        monkeypatch.setattr("millijoule.jobs.set_up.job.pools_on", on)

    return is_own


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("prefer", ["speed", "energy"])
def test_two_pools_of_the_same_nodes_ask_for_no_more_workers_than_fit(ray, job, owned, caplog, own, prefer):
    owned(own)
    with caplog.at_level(logging.INFO):
        result = job("a::workers=0:2", "b::workers=0:2", prefer=prefer)
    assert (result.status, result.images) == ("complete", IMAGES)
    assert ray.waited == 0
    assert "pool a: 0 to 2 workers of 1 CPU, room now for 2" in caplog.text
    assert "pool b: 0 to 2 workers of 1 CPU, room now for 0 beside the other pools, 2 alone" in caplog.text


def test_a_pool_leaves_the_other_what_it_may_not_have_itself(ray, job):
    job("a::workers=0:1", "b::workers=0:2", prefer="speed")
    assert len(ray.asked_for) == 2
    assert ray.waited == 0


@pytest.mark.parametrize("own", [True, False])
def test_where_nobody_joins_no_worker_waits_for_a_node_however_much_there_is_to_do(ray, job, owned, own):
    """Twenty shards of half an hour each, as stated, are worth more nodes, which may come elsewhere."""
    owned(own)
    job("a::workers=0:9:images_per_s=0.001", "b::workers=0:9:images_per_s=0.001", prefer="speed")
    assert (ray.waited == 0) == own


# -- a dry run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch):
    """One worker of `a` draws 2 images/s at 3 J, one of `b` 1 image/s at 1 J, modelled; `gone` has no node."""
    shown = {
        "a": Calibration(64, 32.0, 640, 192_000, None, "nvml-counter"),
        "b": Calibration(64, 64.0, 640, None, 64_000, "none"),
    }
    monkeypatch.setattr(pools_forecast, "calibrate_pool", lambda request, pool, images: shown[pool.name])


def said(capsys):
    lines = capsys.readouterr().out.splitlines()
    return {line[:12].strip(): line[12:] for line in lines if line[:12].strip()}, "\n".join(lines)


def test_a_dry_run_says_what_the_whole_job_takes(ray, job, capsys, calibrated):
    """Three workers fit the nodes: two of the quick pool, one of the other; of five images it makes one."""
    ray.add_node("host-2", CPU=1.0)
    job(
        "a::workers=0:2:price=1.8",
        "b::workers=0:2:price=3.6",
        dry_run=True,
        prefer="speed",
        price_per_kwh="0.5",
    )
    figures, text = said(capsys)
    assert "b: 0 to 2 workers of 1 CPU, room now for 1 beside the other pools, 2 alone" in text
    assert figures["time"] == "about 0:08 at 5 images/s"
    assert "by the workers that have room now (a 2, b 1), start-up not counted" in text
    joules = 0.8 * 3 + 0.2 * 1
    assert figures["energy"] == (
        f"about {joules:.3g} J per image, {joules * IMAGES / 3.6e6:.3g} kWh in all "
        "(a measured, b modelled from CPU time, not measured)"
    )
    devices, electricity = 8 / 3600 * (2 * 1.8 + 3.6), joules * IMAGES / 3.6e6 * 0.5
    assert figures["cost"] == f"about {devices:.3g} for devices"
    assert f"about {electricity:.3g} for electricity, at today's price and PUE 1" in text
    assert f"about {devices + electricity:.3g} together" in text


def test_a_dry_run_counts_the_workers_that_would_be_chosen(ray, job, capsys, calibrated):
    """The pool that costs least has all nodes; the other one's workers are not needed."""
    job("a::workers=0:2", "b::workers=0:2", dry_run=True, prefer="energy")
    figures, text = said(capsys)
    assert "a: 0 to 2 workers of 1 CPU, room now for 0 beside the other pools, 2 alone" in text
    assert "(b 2), start-up not counted" in text
    assert (
        figures["energy"] == "about 1 J per image, 1.11e-05 kWh in all (modelled from CPU time, not measured)"
    )
    assert figures["cost"] == "give --price-per-kwh for that of electricity"


def test_a_dry_run_of_pools_without_nodes_knows_no_totals(ray, job, capsys, calibrated):
    job(
        "gone:x=y:workers=0:2:images_per_s=4:joules=2",
        "nowhere:x=z:workers=0:2",
        dry_run=True,
        prefer="energy",
    )
    figures, text = said(capsys)
    assert text.count("not tried: no node of it is there now") == 2
    assert "4 images/s on one worker (stated), 2 J per image (stated)" in text
    assert figures["time"] == "unknown: none of the workers that are chosen has room now"
    assert figures["energy"] == figures["cost"] == "unknown"


def test_what_is_not_known_of_one_pool_is_not_known_of_the_job():
    a = Part("a", 1, 3.0, 2.0, "measured", 5.0)
    b = Part("b", 1, 1.0, None, "modelled from CPU time, not measured", None)
    totals = totals_of([a, b], 400)
    assert (totals.seconds, totals.joules_per_image, totals.kwh, totals.devices) == (100.0, None, None, None)
    lines = "\n".join(total_lines([a, b], 400, 0.5, 1.2))
    assert "energy      unknown: no counter, no estimate and no joules= of b (25% of the images)" in lines
    assert "unknown for devices: no price= of b (25% of the images)" in lines
    assert "unknown for electricity, as its energy is" in lines
    assert "together" not in lines
