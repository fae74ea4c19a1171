"""The policy on whole jobs of the real driver, on simulated devices: who works, when it is over, what it costs."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from millijoule.jobs.simulating.devices import ACCELERATOR, DeviceKind, Fleet
from millijoule.jobs.simulating.fleets import mixed_kinds, pools_of
from millijoule.jobs.simulating.job import made_up_plan, run_job
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.fleet.room import NodeNow, Nodes
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import PoolOptions

#: A quick device, and one that needs three times the joules and takes eight times as long.
LEAN = DeviceKind("LEAN", 4.0, 400.0, 50.0, price=4.0, load_s=20.0, boot_s=10.0)
SLOW = DeviceKind("SLOW", 0.5, 150.0, 20.0, price=0.1, load_s=20.0, boot_s=10.0)
KINDS = {"lean": (LEAN, 4), "slow": (SLOW, 8)}
SHARDS, IMAGES = 300, 20


def pools(kinds=KINDS, **stated):
    return [
        Pool(
            name,
            PoolOptions(0, count, gpus_per_worker=1.0, selectors=({ACCELERATOR: kind.name},)),
            price_per_hour=kind.price,
            **stated,
        )
        for name, (kind, count) in kinds.items()
    ]


def run(prefer=None, deadline_s=None, kinds=KINDS, policy=True, shards=SHARDS):
    fleet = FleetPolicy(pools(kinds), prefer, deadline_s=deadline_s) if policy else None
    return run_job(made_up_plan(shards, IMAGES), Fleet(kinds, 1), fleet=fleet)


@cache
def stealing():
    return run(policy=False)


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "millijoule")


def test_a_deadline_is_met_by_the_lean_devices_alone_where_they_are_enough():
    deadline_s = 2 * stealing().makespan_s
    outcome = run(deadline_s=deadline_s)
    assert outcome.complete
    assert outcome.makespan_s <= deadline_s
    assert outcome.joules < 0.85 * stealing().joules
    probing = 2 * (SLOW.boot_s + SLOW.load_s + 2 * IMAGES / SLOW.images_per_s + 60) / 3600
    assert outcome.by_kind["SLOW"]["hours"] < 1.3 * probing


def test_where_the_lean_devices_are_not_enough_others_help_and_the_deadline_is_met():
    deadline_s = 1.1 * stealing().makespan_s
    outcome = run("energy", deadline_s)
    assert outcome.makespan_s <= deadline_s
    assert outcome.by_kind["SLOW"]["hours"] > 0.3 * stealing().by_kind["SLOW"]["hours"]


@pytest.mark.parametrize(
    ("spot", "times"),
    [
        (True, 1.25),
        (False, 1.5),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((True, 1.5), (False, 1.25))),
    ],
)
def test_a_job_as_long_as_a_shard_of_its_slowest_device_meets_its_deadline(times, spot):
    """What a device is worth shows in its first shard, in time for the second: there is none that would end too late."""
    kinds = mixed_kinds("even", 8, spot=spot)
    plan = made_up_plan(80, 16)
    deadline_s = times * run_job(plan, Fleet(kinds, 1)).makespan_s
    outcome = run_job(plan, Fleet(kinds, 1), fleet=FleetPolicy(pools_of(kinds), deadline_s=deadline_s))
    assert outcome.complete
    assert outcome.makespan_s <= deadline_s


def test_pools_alike_do_not_take_each_others_place():
    """Whichever of two equal pools works goes on; what its devices had cost to start is not paid again."""
    kinds = {name: (replace(LEAN, name=name.upper()), 4) for name in ("here", "there")}
    deadline_s = 2000.0
    policy = FleetPolicy(pools(kinds), deadline_s=deadline_s)
    outcome = run_job(made_up_plan(900, IMAGES), Fleet(kinds, 1), fleet=policy)
    assert outcome.makespan_s <= deadline_s
    assert outcome.calls["start"] <= 5  # three or so are enough; two of each pool are looked at


def test_money_is_saved_by_other_devices_than_joules():
    cheap = run("cost", 3 * stealing().makespan_s)
    lean = run("energy", 3 * stealing().makespan_s)
    assert cheap.money < lean.money
    assert lean.joules < cheap.joules


def test_the_preferred_pool_works_alone_without_a_deadline():
    outcome = run("energy")
    assert outcome.complete
    assert outcome.joules < 0.85 * stealing().joules


def test_speed_is_no_slower_than_work_stealing_and_repeats_no_work():
    outcome = run("speed")
    assert outcome.makespan_s <= stealing().makespan_s
    assert outcome.lost_attempts == 0


def test_the_ledger_of_a_simulated_job_has_all_that_its_devices_drew_while_workers_were_there():
    outcome = run("energy")
    assert outcome.ledger["complete"]
    held = sum(kind["joules"] for kind in outcome.by_kind.values())
    booked = outcome.ledger["total_mj"] / 1000
    # before a worker is there and after it has gone, a node is held idle for a minute or so
    beyond = 6 * 50.0 * (60 + 10 + 5)
    assert held - beyond < booked < held


def test_what_a_lost_spot_node_had_in_hand_is_made_again_and_its_joules_are_missing_and_not_zero():
    spot = DeviceKind(
        "SPOT", 4.0, 400.0, 50.0, load_s=20.0, boot_s=10.0, preemptions_per_hour=20, outage_s=60
    )
    outcome = run("speed", kinds={"spot": (spot, 4)}, shards=150)
    assert outcome.complete
    assert outcome.preemptions > 0
    assert outcome.ledger["total_mj"] is None


class Unmeasured(FleetPolicy):
    """Nobody can read a counter, nor model one."""

    def observe(self, commit):
        super().observe(replace(commit, energy_mj=None, energy_estimate_mj=None))


@pytest.fixture
def warnings(monkeypatch):
    """What the policy says; simulated jobs are silent."""
    said = []
    monkeypatch.setattr("millijoule.pipeline.fleet.policy.log.warning", lambda text, *_: said.append(text))
    return said


def test_where_no_joules_are_known_the_deadline_is_met_all_the_same(warnings):
    deadline_s = 1.2 * stealing().makespan_s
    unmeasured = Unmeasured(pools(), deadline_s=deadline_s)
    outcome = run_job(made_up_plan(SHARDS, IMAGES), Fleet(KINDS, 1), fleet=unmeasured)
    assert outcome.makespan_s <= deadline_s
    assert sum("nobody measures its joules" in line for line in warnings) == len(KINDS)


def test_where_no_joules_are_known_and_there_is_no_deadline_all_devices_work():
    outcome = run_job(made_up_plan(SHARDS, IMAGES), Fleet(KINDS, 1), fleet=Unmeasured(pools(), "energy"))
    assert outcome.makespan_s < 1.3 * stealing().makespan_s


def test_a_deadline_that_cannot_be_met_is_said_though_a_pool_has_no_nodes(warnings):
    kinds = {"lean": (DeviceKind("LEAN", 4.0, 400.0, 50.0), 0), "slow": (SLOW, 8)}
    both = pools({"lean": (LEAN, 4), "slow": (SLOW, 8)})
    run_job(made_up_plan(60, IMAGES), Fleet(kinds, 1), fleet=FleetPolicy(both, deadline_s=300.0))
    assert sum("the deadline will be missed" in line for line in warnings) == 1


def test_before_anybody_works_stated_rates_choose_devices_for_images_and_not_for_shards(caplog):
    """6,000 images in 1,030 s at 1 image/s each, 30 s of them to start: seven devices, where 300 would need one."""
    eight = pools({"slow": (SLOW, 8)}, images_per_s=1.0, joules_per_image=100.0)
    policy = FleetPolicy(eight, deadline_s=1030.0)
    plan = made_up_plan(SHARDS, IMAGES)
    policy.look(Coordinator(plan.shards, np.zeros(SHARDS, bool), 60.0, 1), [], 0.0)
    assert policy.targets == {"slow": 7}
    with caplog.at_level(logging.WARNING, "millijoule"):
        late = FleetPolicy(eight, deadline_s=300.0)
        late.look(Coordinator(plan.shards, np.zeros(SHARDS, bool), 60.0, 1), [], 0.0)
    assert "20.4 images/s are needed" in caplog.text  # 6,000 in 98 % of 300 s


def test_a_deadline_before_anybody_is_thought_to_be_ready_is_tried_on_the_nodes_that_are_there():
    """Thirty seconds for a start are a guess: a processor that is there may draw after three."""
    (asked,) = pools({"slow": (SLOW, 8)}, images_per_s=1.0, joules_per_image=100.0)
    asked = replace(asked, options=replace(asked.options, at_once=2))
    policy = FleetPolicy([asked], deadline_s=20.0)
    plan = made_up_plan(SHARDS, IMAGES)
    policy.look(Coordinator(plan.shards, np.zeros(SHARDS, bool), 60.0, 1), [], 0.0)
    assert policy.targets == {"slow": 2}


def sharing(deadline_s, stated, may_grow=False, prefer=None):
    """What is chosen of pools `(images per second, joules)`, whose workers have two processors of one node between them."""
    nodes = Nodes((NodeNow("n", {"CPU": 2.0}, {}),), may_grow)
    both = [
        Pool(
            name,
            PoolOptions(0, 8, at_once=2, nodes=nodes),
            images_per_s=rate,
            joules_per_image=joules_per_image,
        )
        for name, (rate, joules_per_image) in stated.items()
    ]
    policy = FleetPolicy(both, prefer, deadline_s=deadline_s)
    policy.look(Coordinator(made_up_plan(20, IMAGES).shards, np.zeros(20, bool), 60.0, 1), [], 0.0)
    return policy.targets


def test_pools_of_the_same_nodes_are_counted_on_once_where_nobody_joins(caplog):
    """400 images: two lean devices make them in 300 s, a quick one in 100 s; eight of each would, that the node does not hold."""
    stated = {"lean": (1.0, 1.0), "quick": (8.0, 5.0)}
    with caplog.at_level(logging.WARNING, "millijoule"):
        assert sharing(300.0, stated) == {"lean": 2, "quick": 0}
        assert sharing(100.0, stated) == {"lean": 0, "quick": 1}
        assert sharing(50.0, stated, may_grow=True) == {"lean": 8, "quick": 3}
        assert caplog.text == ""
        assert sharing(50.0, stated) == {"lean": 0, "quick": 2}
    assert "the deadline will be missed" in caplog.text
    assert sharing(None, stated, prefer="energy") == {"lean": 8, "quick": 0}


def test_devices_that_start_slowly_are_asked_for_in_time_and_in_vain_no_more():
    """6,000 images in 1,030 s at 1 image/s each: seven devices are enough where starts take 30 s, none are where they take 1,010 s."""
    eight = pools({"slow": (SLOW, 8)}, images_per_s=1.0, joules_per_image=100.0)
    shards = made_up_plan(SHARDS, IMAGES).shards
    targets = {}
    for start_s in (30.0, 250.0, 1010.0):
        policy = FleetPolicy(eight, deadline_s=1030.0)
        policy.start_s = {"slow": start_s}.__getitem__
        policy.look(Coordinator(shards, np.zeros(SHARDS, bool), 60.0, 1), [], 0.0)
        targets[start_s] = policy.targets["slow"]
    assert targets[30.0] == 7
    assert targets[250.0] == 8


def test_a_worker_is_started_near_the_end_as_far_as_it_is_ready_in_time():
    """The last shard takes the slow device 200 s, a lean one 5 s after its start."""
    stated = {"slow": 0.1, "lean": 4.0}
    asked = [replace(pool, images_per_s=stated[pool.name]) for pool in pools()]
    policy = FleetPolicy(asked, "speed")
    worker = SimpleNamespace(
        worker_id="a", pool="slow", ready="a node", node="a node", stopping=False, held={}, spawned=0.0
    )
    policy.look(Coordinator(made_up_plan(1, IMAGES).shards, np.zeros(1, bool), 60.0, 1), [worker], 0.0)
    assert [policy.may_start("lean", start_s) for start_s in (5.0, 190.0, 200.0)] == [True, True, False]


@pytest.mark.long
def test_a_deadline_is_met_though_devices_start_slowly_and_are_taken_away():
    """Starts of seven minutes; taken for thirty seconds, the last devices came too late."""
    kinds = {
        name: (
            replace(
                kind,
                boot_s=210.0,
                load_s=210.0,
                preemptions_per_hour=4 * kind.preemptions_per_hour,
                faults_per_hour=0.05,
            ),
            n,
        )
        for name, (kind, n) in mixed_kinds("old", 20, speed=10.0, spot=True).items()
    }
    plan = made_up_plan(300, 100)
    policy = FleetPolicy(pools_of(kinds), deadline_s=1855.0)
    assert run_job(plan, Fleet(kinds, 1), fleet=policy).makespan_s <= 1855.0


def test_a_pool_whose_nodes_do_not_come_is_made_up_for_until_they_do():
    none_there = DeviceKind("LEAN", 4.0, 400.0, 50.0)
    kinds = {"lean": (none_there, 0), "slow": (SLOW, 8)}
    asked = [
        Pool(
            "lean",
            PoolOptions(0, 4, gpus_per_worker=1.0, selectors=({ACCELERATOR: "LEAN"},)),
            images_per_s=4.0,
            joules_per_image=100.0,
        ),
        pools({"slow": (SLOW, 8)})[0],
    ]
    policy = FleetPolicy(asked, "energy", deadline_s=4000.0)
    outcome = run_job(made_up_plan(60, IMAGES), Fleet(kinds, 1), fleet=policy)
    assert outcome.complete
    assert outcome.makespan_s < 4000.0


def test_a_fast_device_keeps_runs_of_shards_that_take_as_long_as_one_of_a_slow_device():
    policy = FleetPolicy(pools(), "speed")
    lengths = {}

    def look(job_run):
        if job_run.coordinator.n_committed == SHARDS // 2 and not lengths:
            for worker in job_run.pool.workers.values():
                lengths.setdefault(worker.pool, []).append(policy.run_length(worker.worker_id))

    run_job(made_up_plan(SHARDS, IMAGES), Fleet(KINDS, 1), fleet=policy, on_tick=look)
    assert set(lengths["slow"]) == {1}
    assert min(lengths["lean"]) >= 2
