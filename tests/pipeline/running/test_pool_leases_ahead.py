"""Leases that a worker of the pool holds while it is at another, and who has them in the end."""

from __future__ import annotations

from itertools import pairwise

from support.pool_world import Script, script, suspected
from support.ray_stand_in import NEVER, Dies

from millijoule.jobs.simulating.clocked_ray import After
from millijoule.workers.errors import NodeError
from millijoule.workers.lease import (
    MAX_LEASES,
)


class Finishes(Script):
    """Each shard takes the device 1 s, and then somebody else almost as long."""

    def finishing_s(self, worker, lease):
        return 0.9


def test_the_device_begins_with_a_shard_while_the_one_before_is_finished(world):
    w = world(Finishes(), shards=8, nodes=1, workers=(0, 1)).run()
    assert [round(b - a, 3) for a, b in pairwise(w.begun_at)] == [1.0] * 7
    assert len(w.made) == 8


def test_a_worker_never_holds_more_than_one_lease_ahead(world):
    w = world(Finishes(), shards=20)
    most = []
    w.on_tick = lambda: most.extend(len(x.held) for x in w.pool.workers.values())
    w.run()
    assert max(most) == MAX_LEASES == 2


def test_at_the_end_a_lease_ahead_goes_to_the_worker_that_can_begin_at_once(world):
    """The first that is ready gets both shards; the second one is there a moment later."""

    class Later(Script):
        def load(self, worker):
            return After(2.0 if worker.worker_id == "w0001-0001" else 5.0)

        def shard(self, worker, lease):
            return After(30.0)

    w = world(Later(), shards=2, speculate=False).run()
    assert sorted(w.begun) == [("w0001-0001", 0), ("w0001-0002", 1)]
    assert w.ray.now < 60


def test_a_lease_that_the_next_one_has_overtaken_goes_to_the_worker_that_can_begin_at_once(world):
    """What there is of the first shard takes the first worker longer to read."""

    class Overtaken(Script):
        def load(self, worker):
            return After(2.0 if worker.worker_id == "w0001-0001" else 5.0)

        def reads_long(self, worker, lease):
            return (worker.worker_id, lease.shard.shard_id) == ("w0001-0001", 0)

        def shard(self, worker, lease):
            return After(30.0)

    w = world(Overtaken(), shards=2, speculate=False).run()
    assert sorted(w.begun) == [("w0001-0001", 1), ("w0001-0002", 0)]
    assert w.ray.now < 60


def test_nobody_waits_for_a_lease_that_has_begun_and_only_as_many_are_asked_for_as_are_needed(world):
    class Uneven(Script):
        def shard(self, worker, lease):
            return After(1.0 if worker.worker_id == "w0001-0003" else 20.0)

    w = world(Uneven(), shards=12, nodes=3, workers=(3, 3), speculate=False).run()
    assert len(w.begun) == 12  # none twice
    by = [by for by, _ in w.begun]
    assert by.count("w0001-0003") > 8


def test_of_two_shards_in_a_dead_workers_hands_neither_is_leased_beside_another_again(world):
    w = world(script("shard", lambda worker, lease: Dies(0.5)), shards=12, workers=(1, 1), nodes=1).run()
    assert sorted(shard for shard, _ in w.made) == list(range(12))
    first = [lease.shard.shard_id for _, lease in w.leased[:2]]
    assert first == [0, 1]
    again = [lease.shard.shard_id for by, lease in w.leased if by == "w0001-0002"]
    assert again[:2] == first
    begun_then = w.begun[1:3]
    assert begun_then == [("w0001-0002", 0), ("w0001-0002", 1)]
    assert w.coordinator.given_up == {}


def test_a_shard_that_waited_behind_one_that_hangs_is_not_blamed(world):
    """The row that hangs is found and quarantined; the other shard is made, whole, by somebody."""

    class Hangs(Script):
        def shard(self, worker, lease):
            return NEVER if lease.shard.shard_id == 0 and not lease.quarantine else After(1.0)

        def probe(self, worker, lease):
            first, end = lease.probe_rows
            return NEVER if first <= 2 < end else super().probe(worker, lease)

        def steps(self, worker):
            return 0

    w = world(Hangs(), shards=4, nodes=1, workers=(1, 1), speculate=False).run()
    assert sorted(shard for shard, _ in w.made) == [0, 1, 2, 3]
    quarantined = {lease.shard.shard_id for _, lease in w.leased if lease.quarantine}
    assert quarantined == {0}
    asked = {lease.shard.shard_id for _, lease in w.leased if lease.probe_rows}
    assert asked == {0}


def test_a_worker_that_stops_answering_is_replaced_once_and_both_its_shards_are_made(world, caplog):
    stopped = script("shard", lambda worker, lease: NEVER)
    stopped.status = lambda worker: NEVER if worker.worker_id == "w0001-0001" else None
    w = world(stopped, shards=8, speculate=False).run()
    assert sorted(shard for shard, _ in w.made) == list(range(8))
    assert caplog.text.count("is gone with shards 0 and 1 in hand: stood still; killed") == 1
    assert w.left == ["w0001-0001"]


def test_a_sick_workers_other_lease_is_taken_back_and_its_node_blamed_once(world):
    sick = script("shard", lambda worker, lease: After(0.5, NodeError("the device fails")))
    w = world(sick, shards=8).run()
    assert sorted(shard for shard, _ in w.made) == list(range(8))
    (record,) = w.pool.nodes.faulty
    assert record.faults == 1
    assert "w0001-0001" in w.words


def test_a_hearing_finds_a_worker_with_empty_hands(world):
    """While a row waits for a second opinion nobody gets a lease ahead."""
    heard = []

    class Hearing(Script):
        def shard(self, worker, lease):
            return suspected(worker, lease) if lease.shard.shard_id == 0 else After(1.0)

        def confirm(self, worker, lease):
            heard.append(w.ray.now)
            assert len(w.pool.workers[worker.worker_id].held) == 1
            return super().confirm(worker, lease)

    w = world(Hearing(), shards=40)
    w.run()
    assert len(heard) == 1
    assert heard[0] < 8


def test_near_a_cap_no_lease_is_held_ahead(world):
    w = world(shards=12)
    w.pool.leases_ahead = False
    most = []
    w.on_tick = lambda: most.extend(len(x.held) for x in w.pool.workers.values())
    w.run()
    assert max(most) == 1
    assert len(w.made) == 12
