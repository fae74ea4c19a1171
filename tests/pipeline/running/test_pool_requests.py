"""Requests for nodes, which workers of the pool are until they have one."""

from __future__ import annotations

import logging

from support.pool_world import Script, script

from millijoule.jobs.simulating.clocked_ray import After
from millijoule.pipeline.running.pool import CAPACITY_NOTICE_S
from millijoule.workers.errors import NodeError


def test_a_cluster_without_nodes_is_asked_for_one_and_scaled_down_again(world, caplog):
    """An autoscaler that brings a node for each request; shards are few and short, so one is worth a node."""
    w = world(shards=40, workers=(0, 30), nodes=0, at_once=0)
    brought = []

    def autoscale():
        while len(brought) < len(w.ray.requests) + len(w.ray.running):
            brought.append(w.ray.add_node(f"host-{len(brought)}", CPU=1.0))

    w.on_tick = lambda: autoscale() if w.ray.now > 20 else None
    with caplog.at_level(logging.INFO):
        w.run()
    assert sorted(shard for shard, _ in w.made) == list(range(40))
    assert max(w.requests) == 1
    assert len(brought) == 1
    assert "waiting for the cluster: 1 worker asked for (1 CPU each), none running yet" in caplog.text


def test_workers_that_take_long_to_load_are_not_said_to_be_missing(world, caplog):
    w = world(shards=4, workers=(2, 2))
    w.script.load = lambda worker: After(CAPACITY_NOTICE_S + 5)
    w.run()
    assert len(w.made) == 4
    assert "waiting: workers there: 2, none has loaded its model and drawn its first image" in caplog.text
    assert "none running yet" not in caplog.text


def test_requests_that_are_no_longer_worth_a_node_are_taken_back_and_are_no_deaths(world, caplog):
    w = world(shards=60, workers=(0, 60), nodes=1)
    with caplog.at_level(logging.INFO):
        w.run()
    assert max(w.requests) == 59
    assert w.requests[-1] == 0
    assert {by for _, by in w.made} == {"w0001-0001"}
    assert len(w.ray.asked_for) == 60  # none is asked for in place of those taken back
    assert "taken back" in caplog.text
    assert "is gone" not in caplog.text


def test_a_draining_job_takes_all_its_requests_back(world):
    w = world(shards=60, workers=(4, 8), nodes=0)
    w.on_tick = lambda: w.pool.drain("a person said so") if w.ray.now > 3 else None
    w.run()
    assert w.made == []
    assert len(w.left) == 8


def test_a_worker_kept_away_from_a_node_that_cools_off_is_asked_for_anew_when_it_has(world):
    """The second request keeps away from the only node until that has cooled off; then it may have it."""
    w = world(script("load", lambda worker: After(0.0, NodeError("one bad start"))), nodes=1, workers=(0, 1))
    w.run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert w.pool.nodes.out == []


def test_a_worker_that_nobody_needs_any_more_when_its_node_has_cooled_off_is_gone_once(world):
    """Two reasons for which one turn ends the same worker."""

    class OneBadStart(Script):
        def load(self, worker):
            return After(0.0, NodeError("one bad start")) if worker.node.host == "host-1" else After(2.0)

        def shard(self, worker, lease):
            return After(100.0)

    w = world(OneBadStart(), workers=(2, 2))
    ends = []

    def drain_when_it_has_cooled_off():
        waiting = [worker for worker in w.pool.workers.values() if worker.away and worker.node is None]
        if waiting and not w.pool.nodes.shunned(w.ray.now):
            ends.extend(worker.worker_id for worker in waiting)
            w.pool.drain("enough")

    w.on_tick = drain_when_it_has_cooled_off
    w.run()
    assert ends
    assert sorted(set(w.left)) == sorted(w.left)
    assert set(ends) <= set(w.left)
