"""Every way a worker, a node or a job can go, on a stand-in for Ray and its clock: `WorkerPool` with crew and outcomes."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import ray as real_ray
from support.ray_stand_in import NEVER, Deferred, Dies, RayStandIn

from millijoule.jobs.simulating.clocked_ray import After, install
from millijoule.pipeline.running.coordinator import POISON_REASON, Coordinator
from millijoule.pipeline.running.crew import STOP_TIMEOUT_S
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.node_health import FAULTS_BEFORE_OUT
from millijoule.pipeline.running.outcomes import UNPLACED_DEATHS
from millijoule.pipeline.running.pool import CAPACITY_NOTICE_S, CUT_OFF_S, WorkerPool
from millijoule.workers.errors import DamagedError, JobError, NodeError, StoreError
from millijoule.workers.lease import (
    MAX_LEASES,
    AttemptProgress,
    AttemptResult,
    Node,
    Suspect,
    WorkerConfig,
    WorkerStatus,
    WorkerStopped,
)
from millijoule.workers.shard_rows import Shard

CONFIG = WorkerConfig("", "", 0, "parquet", "", "", 1)
LEASE_S = 10.0
ROWS = 4


class Script:
    """What workers do; a test changes one of these. By default each loads for 2 s and makes a shard in 1 s."""

    def load(self, worker):
        return After(2.0)

    def locate(self, worker):
        return Node(worker.node.node_id, worker.node.host)

    def shard(self, worker, lease):
        """`After` some time committed; or the whole answer."""
        return After(1.0)

    def finishing_s(self, worker, lease):
        """How long a shard is finished after the device has done with it."""
        return 0.0

    def probe(self, worker, lease):
        return After(0.1, AttemptResult(lease, "probed"))

    def confirm(self, worker, lease):
        return After(0.1, AttemptResult(lease, "confirmed", suspects=lease.confirm))

    def stop(self, worker):
        return After(0.1, WorkerStopped(worker.worker_id, ()))

    def read_while_loading(self, worker):
        return After(0.1, f"read of {worker.worker_id}")

    def status(self, worker):
        """The whole answer; None: what the worker does."""
        return

    def reads_long(self, worker, lease):
        """Whether the next lease is ready before this one."""
        return False

    def steps(self, worker):
        """Progress that grows with time, while the worker is not stuck."""
        return int(10 * worker.world.ray.now)


class ScriptedWorker:
    """An actor. Its device does one lease after another: `line` are those in hand, the first is at work."""

    def __init__(self, world, node, worker_id, config):
        self.world, self.node, self.worker_id = world, node, worker_id
        world.actors[worker_id] = self
        self.line = []
        self.read = []  # leases that took long

    @real_ray.method(concurrency_group="work")
    def start(self):
        answer = self.world.script.load(self)
        if type(answer) is After and answer.answer is None and answer is not NEVER:
            return After(answer.seconds, Node(self.node.node_id, self.node.host))
        return answer

    @real_ray.method(concurrency_group="work")
    def run(self, lease):
        self.world.leased.append((self.worker_id, lease))
        self.line.append((lease, answer := Deferred()))
        waits = self.world.script.reads_long(self, self.line[0][0]) and self.line[0][0] not in self.read
        if waits and len(self.line) == 2:
            self.read.append(self.line[0][0])
            self.line.reverse()
            self._begin()
        elif len(self.line) == 1 and not waits:
            self._begin()
        return answer

    def _begin(self):
        lease, answer = self.line[0]
        self.world.begun.append((self.worker_id, lease.shard.shard_id))
        self.world.begun_at.append(self.world.ray.now)
        made = self._work(lease)
        if isinstance(made, Deferred):
            self.line[0] = lease, made
            made.then(lambda made: (answer.settle(made), self._next()))
            return
        if not isinstance(made, After):
            made = After(0.0, made)
        finishing_s = self.world.script.finishing_s(self, lease) if type(made) is After else 0.0
        answer.settle(replace(made, seconds=made.seconds + finishing_s) if finishing_s else made)
        if made.seconds < float("inf") and not isinstance(made, Dies):
            self.world.ray.at(made.seconds, self._next)

    def _work(self, lease):
        script = self.world.script
        if lease.probe_rows is not None:
            return script.probe(self, lease)
        if lease.confirm:
            return script.confirm(self, lease)
        answer = script.shard(self, lease)
        if type(answer) is After and answer.answer is None and answer is not NEVER:
            return After(answer.seconds, AttemptResult(lease, "committed", b"{}"))
        return answer

    def _next(self):
        del self.line[0]
        if self.line and self.worker_id in self.world.ray.running:
            self._begin()

    @real_ray.method(concurrency_group="work")
    def stop(self):
        return self.world.script.stop(self)

    @real_ray.method(concurrency_group="status")
    def locate(self):
        return self.world.script.locate(self)

    @real_ray.method(concurrency_group="status")
    def status(self):
        steps, answer = self.world.script.steps(self), self.world.script.status(self)
        if answer is not None:
            return answer
        return WorkerStatus(
            tuple(
                AttemptProgress(lease.attempt_id, 0, 0 if i else steps, waits=i > 0, has_begun=i == 0)
                for i, (lease, _) in enumerate(self.line)
            )
        )

    @real_ray.method(concurrency_group="status")
    def read_while_loading(self):
        return self.world.script.read_while_loading(self)

    @real_ray.method(concurrency_group="status")
    def cancel(self, attempt_id):
        self.world.cancelled.append((self.worker_id, attempt_id))
        self._withdraw(attempt_id)

    @real_ray.method(concurrency_group="status")
    def leave(self):
        self.world.told_to_leave.append(self.worker_id)

    @real_ray.method(concurrency_group="status")
    def give_back(self, attempt_id):
        return self._withdraw(attempt_id)

    def _withdraw(self, attempt_id):
        for lease, answer in self.line[1:]:
            if lease.attempt_id == attempt_id:
                self.line.remove((lease, answer))
                answer.settle(AttemptResult(lease, "cancelled"))
                return True
        return False


class World:
    """A cluster, a coordinator over `shards`, and the pool; and, as its owner, what the pool tells."""

    def __init__(self, monkeypatch, script, shards, workers, speculate=True, **options):
        self.script = script
        self.ray = RayStandIn(lambda node, *args: ScriptedWorker(self, node, *args))
        install(monkeypatch.setattr, self.ray, self.ray.time)
        kept = [Shard(i, "part", i, ROWS, ROWS, None, None, None, f"p{i}", "") for i in range(shards)]
        self.coordinator = Coordinator(kept, np.zeros(shards, bool), LEASE_S, 1, speculate)
        least, most = workers
        self.pool = WorkerPool(
            self.ray.actor_class, self.coordinator, CONFIG, PoolOptions(least, most, **options), self
        )
        self.made, self.lost, self.void, self.words, self.left = [], [], [], [], []
        self.cancelled, self.requests, self.reads = [], [], []
        self.leased, self.begun, self.begun_at = [], [], []
        self.actors, self.told_to_leave = {}, []
        self.on_tick = lambda: None

    def run(self):
        self.pool.run()
        assert self.ray.running == self.ray.requests == []
        assert sorted(self.words + self.left) == sorted(self.ray.asked_for)  # each left in one of two ways
        return self

    def committed(self, result, *, news):
        (self.made if news else self.lost).append((result.lease.shard.shard_id, result.lease.worker_id))

    def prepared(self, result):
        self.ray.at(0.5, lambda: self.pool.commit_stands(result, result.commit_json))

    def discarded(self, result):
        self.void.append(result.lease.worker_id)

    def stopped(self, stopped):
        self.words.append(stopped.worker_id)

    def loading(self, worker_id, read):
        self.reads.append((worker_id, read))

    def gone(self, worker_id):
        self.left.append(worker_id)

    def tick(self):
        self.requests.append(len(self.ray.requests))
        self.on_tick()

    def shards_of(self, worker_id):
        return [shard for shard, by in self.made if by == worker_id]


@pytest.fixture
def world(monkeypatch):
    def made(script=None, *, shards=6, workers=(0, 2), nodes=2, **options):
        world = World(monkeypatch, script or Script(), shards, workers, **options)
        world.nodes = [world.ray.add_node(f"host-{n + 1}", CPU=1.0) for n in range(nodes)]
        return world

    return made


def once(act):
    """A script's method that does `act` at its first call, and the usual after."""
    done = []

    def method(self, worker, *args, usual):
        if not done:
            done.append(worker.worker_id)
            return act(worker, *args)
        return usual(worker, *args)

    return method


def script(name, act):
    """A script whose method `name` is `act(worker, ...)` the first time."""
    usual = getattr(Script(), name)
    method = once(act)
    made = Script()
    setattr(made, name, lambda *args: method(made, *args, usual=usual))
    return made


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


def suspected(worker, lease):
    suspect = Suspect(2, 0, "cannot draw")
    return After(1.0, AttemptResult(lease, "suspect", b"prepared", (suspect,), (0, 0)))


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


# -- leases ahead -----------------------------------------------------------------------------------------------------


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


# -- requests for nodes ------------------------------------------------------------------------------------------------


def test_a_cluster_without_nodes_is_asked_for_a_few_and_scaled_down_again(world, caplog):
    """An autoscaler that brings a node for each request; shards are few and short, so few are worth a node."""
    w = world(shards=40, workers=(0, 30), nodes=0, at_once=0)
    brought = []

    def autoscale():
        while len(brought) < len(w.ray.requests) + len(w.ray.running):
            brought.append(w.ray.add_node(f"host-{len(brought)}", CPU=1.0))

    w.on_tick = lambda: autoscale() if w.ray.now > 20 else None
    with caplog.at_level(logging.INFO):
        w.run()
    assert sorted(shard for shard, _ in w.made) == list(range(40))
    assert max(w.requests) == 4
    assert len(brought) == 4
    assert "waiting for the cluster: 4 workers asked for (1 CPU each), none running yet" in caplog.text


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
