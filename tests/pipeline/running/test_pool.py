"""Every way a worker, a node or a job can go, on a stand-in for Ray and its clock: `WorkerPool` with crew and outcomes."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.pool_world import LEASE_S, Script, script, suspected
from support.ray_stand_in import NEVER, Deferred, Dies

from millijoule.jobs.simulating.clocked_ray import After
from millijoule.pipeline.running.coordinator import POISON_REASON
from millijoule.pipeline.running.crew import STOP_TIMEOUT_S
from millijoule.pipeline.running.node_health import FAULTS_BEFORE_OUT
from millijoule.pipeline.running.outcomes import UNPLACED_DEATHS
from millijoule.pipeline.running.pool import CUT_OFF_S
from millijoule.workers.errors import DamagedError, JobError, NodeError, StoreError
from millijoule.workers.lease import (
    AttemptProgress,
    AttemptResult,
    WorkerStatus,
)


def test_shards_are_made_once_each_and_every_worker_says_its_last_words(world):
    w = world().run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert w.words == w.ray.asked_for
    assert (w.left, w.lost) == ([], [])


def test_a_worker_that_dies_while_it_loads_is_a_fault_of_its_node_which_cools_off(world, caplog):
    w = world(script("load", lambda worker: Dies(1.0)), nodes=1, workers=(0, 1)).run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert w.left == ["w0001-0001"]
    (record,) = w.pool.nodes.faulty
    assert (record.host, record.faults) == ("host-1", 1)
    assert "worker w0001-0001 on host-1 is gone" in caplog.text


def test_a_node_on_which_nothing_loads_is_left_out_and_the_job_goes_on_without(world, caplog):
    class OneBadNode(Script):
        def load(self, worker):
            return After(0.0, NodeError("no model here")) if worker.node.host == "host-1" else After(2.0)

        def shard(self, worker, lease):
            return After(20.0)

    w = world(OneBadNode(), workers=(2, 2)).run()
    assert {by for _, by in w.made} == {"w0001-0002"}
    (record,) = w.pool.nodes.out
    assert (record.host, record.faults) == ("host-1", FAULTS_BEFORE_OUT)
    assert str(record).startswith("node host-1 (00000000): left out for this run: no model here")


def test_where_every_node_is_out_the_job_ends_and_names_each(world):
    bad = Script()
    bad.load = lambda worker: After(0.0, NodeError(f"no model on {worker.node.host}"))
    w = world(bad)
    with pytest.raises(JobError, match="no node is left that can work") as ended:
        w.pool.run()
    assert "no model on host-1" in str(ended.value)
    assert "no model on host-2" in str(ended.value)
    assert w.ray.running == []
    assert w.left == []  # each could still say its last words


def test_a_worker_that_dies_with_a_lease_costs_the_shard_a_second_lease(world, caplog):
    w = world(script("shard", lambda worker, lease: Dies(0.5)), shards=3).run()
    assert sorted(shard for shard, _ in w.made) == [0, 1, 2]
    assert caplog.text.count("is gone") == 1
    assert "worker w0001-0001 on host-1 is gone with shards 0 and 1 in hand" in caplog.text
    assert w.pool.nodes.faulty == []


def test_a_preempted_node_blames_nobody(world):
    w = world(shards=8)
    w.ray.at(4.5, lambda: w.ray.lose_node(w.nodes[0], preempted=True))
    w.run()
    assert w.shards_of("w0001-0001") == [0, 1]
    assert sorted(shard for shard, _ in w.made) == list(range(8))
    assert w.coordinator.given_up == {}
    assert w.pool.nodes.faulty == []


def test_a_worker_on_a_draining_node_ends_what_it_draws_gets_nothing_more_and_says_its_last_words(
    world, caplog
):
    w = world(shards=16)
    w.ray.at(4.5, lambda: w.ray.drain_node(w.nodes[0], 30.0))
    w.ray.at(5.0, lambda: w.ray.add_node("host-3", CPU=1.0))
    w.run()
    assert w.shards_of("w0001-0001") == [0, 1, 4, 6]  # the last was at work when the driver heard of it
    assert "w0001-0001" in w.words
    assert w.told_to_leave == ["w0001-0001"]
    assert w.left == w.lost == w.cancelled == []
    assert w.shards_of("w0001-0003")  # its place was taken at once
    assert "worker w0001-0001 leaves: its node host-1 is taken away, in" in caplog.text
    assert w.pool.nodes.faulty == []


def test_what_a_worker_cannot_end_before_its_node_does_is_called_off_in_time_for_its_last_words(world):
    class Long(Script):
        def shard(self, worker, lease):
            return Deferred() if worker.node.host == "host-1" else After(1.0)

    w = world(Long(), shards=4, speculate=False)
    w.ray.at(4.5, lambda: w.ray.drain_node(w.nodes[0], 30.0))
    made_when = []

    def answer_when_cancelled():
        for worker_id, attempt_id in w.cancelled[len(made_when) :]:
            made_when.append(w.ray.now)
            (lease, answer), *_ = w.actors[worker_id].line
            assert lease.attempt_id == attempt_id
            answer.settle(AttemptResult(lease, "cancelled"))

    w.on_tick = answer_when_cancelled
    w.run()
    assert sorted(shard for shard, _ in w.made) == list(range(4))
    assert 29.0 < made_when[0] < 34.5, "its last words have seconds left"
    assert "w0001-0001" in w.words


def test_a_worker_that_loads_on_a_draining_node_is_ended_and_somebody_else_closes_its_books(world):
    """It goes on spending until it is gone: words of its own would come too early."""
    w = world(script("load", lambda worker: After(60.0)), workers=(0, 1), nodes=1)
    w.ray.at(1.5, lambda: w.ray.drain_node(w.nodes[0], 30.0))
    w.ray.at(5.0, lambda: w.ray.add_node("host-2", CPU=1.0))
    w.run()
    assert w.left == ["w0001-0001"]
    assert "w0001-0001" not in w.words
    assert w.reads == [("w0001-0001", "read of w0001-0001")]
    assert {by for _, by in w.made} == {"w0001-0002"}


def test_any_number_of_preemptions_is_free_and_so_many_faults_in_a_row_are_not(world):
    class Short(Script):
        preempted = True

        def load(self, worker):
            self.loads = getattr(self, "loads", 0) + 1
            if self.loads > 200:
                return After(0.1)
            worker.world.ray.at(1.5, lambda: worker.world.ray.add_node(f"host-{self.loads}x", CPU=1.0))
            worker.world.ray.at(
                1.0, lambda: worker.world.ray.lose_node(worker.node, preempted=self.preempted)
            )
            return After(2.0)

    w = world(Short(), shards=2, workers=(1, 1), nodes=1).run()
    assert sorted(shard for shard, _ in w.made) == [0, 1]
    assert str(w.pool.deaths) == "workers lost: 200 with nodes that were taken away"
    faulty = Short()
    faulty.preempted = False
    with pytest.raises(JobError, match="65 workers were lost in a row"):
        world(faulty, shards=2, workers=(1, 1), nodes=1).run()


def test_workers_that_ray_takes_because_a_node_s_memory_is_full_are_the_node_s_trouble_and_no_row_s(world):
    class Full(Script):
        taken = 0

        def shard(self, worker, lease):
            if worker.node.host == "host-1":
                self.taken += 1
                return Dies(0.5, no_memory=True)
            return After(5.0)

    full = Full()
    w = world(full, shards=6).run()
    assert full.taken == FAULTS_BEFORE_OUT
    assert {by for _, by in w.made} == {"w0001-0002"}
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert w.coordinator.given_up == {}
    assert not [lease for _, lease in w.leased if lease.probe_rows is not None]  # no row was suspected
    (record,) = w.pool.nodes.out
    assert "running low on memory" in str(record)


def test_a_row_that_kills_is_found_by_halving_and_quarantined(world):
    class Poison(Script):
        row = 2
        seen = ()

        def shard(self, worker, lease):
            if lease.shard.shard_id == 1:
                self.seen = lease.quarantine
                if not lease.quarantine:
                    return Dies(0.5)
            return After(1.0)

        def probe(self, worker, lease):
            first, end = lease.probe_rows
            return Dies(0.1) if first <= self.row < end else super().probe(worker, lease)

    poison = Poison()
    w = world(poison, shards=3).run()
    assert sorted(shard for shard, _ in w.made) == [0, 1, 2]
    assert poison.seen == ((2, POISON_REASON),)
    assert w.pool.nodes.out == []


def test_a_probe_counts_as_survived_only_if_the_process_answers_afterwards(world):
    """It dies a moment after its answer: the next call finds it dead."""

    class Delayed(Script):
        def shard(self, worker, lease):
            if lease.shard.shard_id == 0 and not lease.quarantine:
                return Dies(0.5)
            return After(1.0)

        def probe(self, worker, lease):
            if lease.probe_rows[0] <= 3 < lease.probe_rows[1]:
                worker.world.ray.at(0.1, lambda: worker.world.ray.die(worker.worker_id))
            return super().probe(worker, lease)

    w = world(Delayed(), shards=1, nodes=1, workers=(0, 1)).run()
    assert [shard for shard, _ in w.made] == [0]


def test_a_worker_that_hangs_loses_its_shard_to_another_and_is_then_replaced(world, caplog):
    stuck = script("shard", lambda worker, lease: NEVER)
    stuck.steps = lambda worker: 0 if worker.worker_id == "w0001-0001" else int(10 * worker.world.ray.now)
    w = world(stuck, speculate=False).run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert w.left == ["w0001-0001"]
    assert "no progress on shard 0 for 10 s; leasing the shard again" in caplog.text
    assert w.shards_of("w0001-0001") == []


def test_a_worker_that_hangs_while_it_starts_is_killed_in_the_end_and_its_node_is_at_fault(
    world, caplog, monkeypatch
):
    """The device stands still in its first call: there is no lease that could expire."""
    monkeypatch.setattr("millijoule.pipeline.running.pool.START_MOST_S", 600.0)
    made = Script()
    usual = made.load
    made.load = lambda worker: NEVER if worker.worker_id == "w0001-0001" else usual(worker)
    w = world(made, shards=1, nodes=2, workers=(0, 1)).run()
    assert [by for _, by in w.made] == ["w0001-0002"]
    assert "no first image within 10 min; killed" in caplog.text
    assert 600.0 < w.ray.now < 620.0


def test_a_worker_that_loads_for_long_is_waited_for(world, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.running.pool.START_MOST_S", 600.0)
    w = world(script("load", lambda worker: After(590.0)), shards=1, workers=(1, 1)).run()
    assert w.made == [(0, "w0001-0001")]


def test_a_slow_worker_that_gets_on_keeps_its_shard(world, caplog):
    w = world(script("shard", lambda worker, lease: After(5 * LEASE_S)), shards=1, workers=(1, 1)).run()
    assert w.made == [(0, "w0001-0001")]
    assert "no progress" not in caplog.text


def test_a_straggler_is_raced_and_the_loser_is_told(world):
    w = world(script("shard", lambda worker, lease: After(60.0)), workers=(2, 2)).run()
    assert w.shards_of("w0001-0002") == [2, 3, 4, 5, 1, 0]  # what the straggler held ahead, too
    assert [by for by, _ in w.cancelled].count("w0001-0001") >= 1


def test_a_row_that_fails_is_heard_by_a_second_worker_and_its_commit_stands(world):
    heard = []

    class Hearing(Script):
        def shard(self, worker, lease):
            return suspected(worker, lease) if lease.shard.shard_id == 0 else After(1.0)

        def confirm(self, worker, lease):
            heard.append((worker.worker_id, lease.confirm[0].row, lease.healthy))
            return super().confirm(worker, lease)

    w = world(Hearing()).run()
    assert heard == [("w0001-0002", 2, (0, 0))]
    assert (0, "w0001-0001") in w.made
    assert w.void == []


def test_a_row_that_another_worker_draws_makes_the_accuser_sick(world, caplog):
    class Contradicted(Script):
        def shard(self, worker, lease):
            return suspected(worker, lease) if worker.worker_id == "w0001-0001" else After(1.0)

        def confirm(self, worker, lease):
            return After(0.1, AttemptResult(lease, "contradicted", suspects=lease.confirm))

    w = world(Contradicted()).run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert set(w.void) == {"w0001-0001"}
    assert w.shards_of("w0001-0001") == []
    assert [record.host for record in w.pool.nodes.faulty] == ["host-1"]
    assert "failed on what another worker drew: cannot draw" in caplog.text


def test_a_lone_worker_hears_itself(world):
    w = world(script("shard", suspected), shards=2, nodes=1, workers=(0, 1)).run()
    assert sorted(w.made) == [(0, "w0001-0001"), (1, "w0001-0001")]


def test_storage_that_fails_in_passing_is_waited_for_longer_each_time(world, caplog):
    away = []

    class Away(Script):
        def shard(self, worker, lease):
            if len(away) < 4:
                away.append(worker.world.ray.now)
                return After(0.0, StoreError("503", transient=True))
            return After(1.0)

    w = world(Away(), shards=1, nodes=1, workers=(0, 1)).run()
    pauses = [round(later - earlier) for earlier, later in pairwise(away)]
    assert pauses == [1, 2, 4]
    assert w.made == [(0, "w0001-0001")]
    assert w.pool.nodes.faulty == []


def test_a_damaged_object_ends_the_job_after_everybodys_last_words(world):
    w = world(
        script("shard", lambda worker, lease: After(0.5, DamagedError("part 3 is not what was written")))
    )
    with pytest.raises(DamagedError, match="part 3"):
        w.pool.run()
    assert sorted(w.words) == ["w0001-0001", "w0001-0002"]


def test_an_unforeseen_error_is_the_nodes_fault_and_perhaps_the_shards(world):
    w = world(script("shard", lambda worker, lease: After(0.5, ZeroDivisionError("division by zero")))).run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))
    assert [record.reasons for record in w.pool.nodes.faulty] == [["division by zero"]]


def test_a_commit_that_only_the_driver_can_write_is_waited_for(world):
    prepared = Script()
    prepared.shard = lambda worker, lease: After(1.0, AttemptResult(lease, "prepared", b"body"))
    w = world(prepared).run()
    assert sorted(shard for shard, _ in w.made) == list(range(6))


def test_a_shard_that_another_driver_committed_is_no_news(world):
    exists = script("shard", lambda worker, lease: After(1.0, AttemptResult(lease, "exists", b"theirs")))
    w = world(exists, shards=2)
    w.on_tick = lambda: w.coordinator.complete("theirs", 0, 0.0) if w.ray.now > 2.5 else None
    w.run()
    assert [shard for shard, _ in w.lost] == [0]
    assert [shard for shard, _ in w.made] == [1]


def test_a_drained_job_finishes_what_is_at_work_and_leases_nothing_more(world):
    w = world()
    w.on_tick = lambda: w.pool.drain("reached a cap") if w.made else None
    w.run()
    assert sorted(w.made) == sorted((shard, by) for by, shard in w.begun)
    assert len(w.made) <= 4  # two were at work, and two were begun when these ended
    assert w.coordinator.remaining == 6 - len(w.made)
    assert w.left == []


def test_a_run_that_is_cut_off_waits_for_idle_workers_only_and_not_long(world):
    class Slow(Script):
        def shard(self, worker, lease):
            return NEVER if lease.shard.shard_id == 0 else After(1.0)

    w = world(Slow(), shards=2, workers=(2, 2))

    class Stop(Exception):
        pass

    def stop():
        if len(w.made) == 1:
            stopped_at.append(w.ray.now)
            raise Stop

    stopped_at = []
    w.on_tick = stop
    with pytest.raises(Stop):
        w.pool.run()
    assert w.words == ["w0001-0002"]
    assert w.left == ["w0001-0001"]
    assert w.ray.now <= stopped_at[0] + CUT_OFF_S


def test_ray_is_not_called_again_once_its_head_is_lost(world, monkeypatch):
    w = world()

    class Lost(Exception):
        pass

    def lose():
        if w.made:
            w.pool.abandoned = True
            monkeypatch.setattr(w.ray, "kill", lambda actor: pytest.fail("called Ray"))
            monkeypatch.setattr(w.ray, "call", lambda *args: pytest.fail("called Ray"))
            raise Lost

    w.on_tick = lose
    with pytest.raises(Lost):
        w.pool.run()


def test_last_words_that_never_come_are_waited_for_and_given_up(world, caplog):
    w = world(script("stop", lambda worker: NEVER)).run()
    assert len(w.left) == 1
    assert "did not say its last words" in caplog.text
    assert w.ray.now > STOP_TIMEOUT_S


def test_a_worker_that_alone_does_not_reach_storage_keeps_no_job_that_is_done(world, caplog):
    """Its shard was made by another. It repeats its request for as long as it takes, which is for ever."""

    class CutOff(Script):
        def shard(self, worker, lease):
            return NEVER if worker.worker_id.endswith("1") else After(1.0)

        def status(self, worker):
            if worker.worker_id.endswith("1"):
                attempts = (AttemptProgress(lease.attempt_id) for lease, _ in worker.line)
                return WorkerStatus(tuple(attempts), waits_for_store=True)
            return None

        def stop(self, worker):
            return NEVER if worker.worker_id.endswith("1") else super().stop(worker)

    w = world(CutOff()).run()
    assert {by for _, by in w.made} == {"w0001-0002"}
    assert (w.words, w.left) == (["w0001-0002"], ["w0001-0001"])
    assert "w0001-0001 on host-1 did not say its last words: it still waits for storage" in caplog.text
    assert w.ray.now < 4 * STOP_TIMEOUT_S


@pytest.mark.parametrize("answers", [True, False])
def test_a_worker_that_still_loads_at_the_end_says_what_its_meter_does_and_is_not_waited_for_long(
    world, answers
):
    def loads_for_ever(usual):
        return lambda worker: NEVER if worker.worker_id.endswith("2") else usual(worker)

    made = Script()
    made.load = loads_for_ever(made.load)
    if not answers:
        made.read_while_loading = lambda worker: NEVER
    w = world(made)
    w.run()
    (late,) = [name for name in w.ray.asked_for if name.endswith("2")]
    assert w.left == [late]
    assert w.reads == ([(late, f"read of {late}")] if answers else [])
    assert w.ray.now < 30.0


def test_last_words_that_fail_leave_the_account_open(world, caplog):
    w = world(script("stop", lambda worker: After(0.1, OSError("no counter")))).run()
    assert len(w.left) == 1
    assert "could not close its books: no counter" in caplog.text


def test_workers_that_die_before_anybody_knows_where_end_the_job(world):
    dying = Script()
    dying.locate = dying.load = lambda worker: Dies(0.0)
    w = world(dying)
    w.ray.actors = lambda actor_id: {}  # Ray does not know either
    with pytest.raises(JobError, match=f"{UNPLACED_DEATHS + 1} workers in a row ended before they started"):
        w.pool.run()
    assert w.ray.now > 60  # with growing pauses


def test_a_superseded_run_has_its_workers_leave_and_gives_no_more_leases(world):
    def shard(worker, lease):
        if lease.shard.shard_id < 2:
            return After(1.0)
        return After(3.0, AttemptResult(lease, "superseded" if lease.shard.shard_id == 2 else "cancelled"))

    play = Script()
    play.shard = lambda worker, lease: shard(worker, lease)
    w = world(play, shards=8, speculate=False)

    def stand_down():
        if w.times_fenced and not w.pool.draining:
            w.pool.stand_down("superseded by run 2")

    w.on_tick = stand_down
    w.run()
    assert w.times_fenced >= 1
    assert sorted(shard for shard, _ in w.made) == [0, 1]
    assert set(w.told_to_leave) == {"w0001-0001", "w0001-0002"}
    assert w.words == w.ray.asked_for  # every account is closed by the worker itself
    assert w.coordinator.remaining == 6
    assert w.pool.draining == "superseded by run 2"


def test_a_commit_that_a_later_run_refused_is_waited_for_no_more(world):
    w = world(script("shard", suspected), shards=3, speculate=False)
    w.prepared = lambda result: w.ray.at(0.5, lambda: refuse(result))

    def refuse(result):
        w.pool.commit_refused(result)
        w.pool.stand_down("superseded by run 2")

    w.run()
    assert 0 not in [shard for shard, _ in w.made]
    assert w.words == w.ray.asked_for
