"""How long a lease takes on unlike devices: the sums, and what they do to whole jobs of the real driver on simulated devices."""

import math

import pytest

from millijoule.jobs.simulating.devices import ACCELERATOR, DeviceKind, Fleet
from millijoule.jobs.simulating.job import made_up_plan, run_job
from millijoule.jobs.simulating.worker import SimulatedWorker
from millijoule.pipeline.fleet.lease_times import LEAST_PIECE_S, LeaseTimes, rest_seconds
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.running.demand import PoolOptions

QUICK = DeviceKind("QUICK", 2.0, 400.0, 50.0, load_s=20.0, boot_s=10.0)
SLOW = DeviceKind("SLOW", 0.04, 100.0, 20.0, load_s=20.0, boot_s=10.0)
KINDS = {"quick": (QUICK, 2), "slow": (SLOW, 8)}
IMAGES = 40  # 20 s of a quick device, 1,000 s of a slow one


def test_a_slow_device_draws_as_long_for_a_lease_as_a_quick_one_for_a_run():
    times = LeaseTimes(quickest_s=20.0, are_unlike=True)
    assert times.usual_s == 80.0
    assert times.at_most_s(1000.0, 0.0) == 80.0
    assert times.at_most_s(None, 0.0) == 80.0
    assert times.at_most_s(70.0, 0.0) is None
    assert LeaseTimes(quickest_s=20.0).at_most_s(1000.0, 0.0) is None, "devices alike make whole shards"


def test_near_the_end_a_piece_leaves_time_for_the_rest():
    times = LeaseTimes(quickest_s=20.0, rest_s=42.0, end_s=100.0, are_unlike=True)
    assert times.piece_s(0.0) == 29.0
    assert times.at_most_s(1000.0, 0.0) == 29.0
    assert times.piece_s(50.0) == 0.0, "not long enough for a piece"


def test_rests_of_many_slow_devices_come_at_once_to_the_quick_ones():
    assert rest_seconds([10.0, 12.0, 300.0]) == 10.0 * 2 + 2.0
    assert rest_seconds([10.0, 12.0, *[300.0] * 5]) == 10.0 * 4 + 2.0
    assert rest_seconds([]) == 0.0


class WholeShards(FleetPolicy):
    """Every lease is to the end of its shard."""

    def at_most_s(self, worker_id, is_ahead):
        return None

    @property
    def _times(self):
        return LeaseTimes()


def run(policy, shards=36, deadline_s=None):
    pools = [
        Pool(name, PoolOptions(0, count, gpus_per_worker=1.0, selectors=({ACCELERATOR: kind.name},)))
        for name, (kind, count) in KINDS.items()
    ]
    fleet = policy(pools, "speed", deadline_s=deadline_s)
    return run_job(made_up_plan(shards, IMAGES), Fleet(KINDS, 1), fleet=fleet), fleet


def test_slow_devices_work_to_the_end_where_they_make_pieces_and_the_job_is_over_sooner(monkeypatch):
    """At the end those of whole shards have stopped, or a quick device has made their shards once more."""
    drawn = []
    begin = SimulatedWorker._begin

    def noted(worker):
        begin(worker)
        held = worker._line[0]
        drawn.append((worker.node.kind.name, held.lease.at_most_s, held.images))

    monkeypatch.setattr(SimulatedWorker, "_begin", noted)
    whole, _ = run(WholeShards)
    assert {at_most_s for _, at_most_s, _ in drawn} == {None}
    drawn.clear()
    pieces, fleet = run(FleetPolicy)
    assert pieces.complete
    assert pieces.ledger["complete"]
    assert pieces.makespan_s < whole.makespan_s
    slow = [at_most_s or math.inf for kind, at_most_s, _ in drawn if kind == "SLOW"]
    assert max(slow) <= 4 * IMAGES / QUICK.images_per_s * 1.1
    assert any(kind == "QUICK" and images < IMAGES for kind, _, images in drawn), "nobody made a rest"
    # the simulated counters are the truth: all that workers drew is in the ledger, once
    held = sum(kind["joules"] for kind in pieces.by_kind.values())
    beyond = (
        10 * 50.0 * (60 + 10 + 5)
    )  # before a worker is there and after it has gone, its node is held idle
    assert held - beyond < pieces.ledger["total_mj"] / 1000 < held
    # what a shard takes on each pool, as the live metrics have it
    costs = fleet.shard_costs()
    for name, (kind, _) in KINDS.items():
        assert costs[name].seconds == pytest.approx(IMAGES / kind.images_per_s, rel=0.1)
        assert costs[name].joules == pytest.approx(IMAGES * kind.j_per_image, rel=0.1)
        assert costs[name].money is None
    assert fleet.images_made.total() == 36 * IMAGES
    slow_s = fleet.images_made["slow"] / SLOW.images_per_s
    assert 0.5 * len(slow) * LEAST_PIECE_S < slow_s < 8 * pieces.makespan_s
