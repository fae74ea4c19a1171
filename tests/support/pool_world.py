"""A `WorkerPool` with crew and outcomes on a stand-in for Ray and its clock, whose workers do what a test's script says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import ray as real_ray
from support.ray_stand_in import NEVER, Deferred, Dies, RayStandIn

from millijoule.jobs.simulating.clocked_ray import After, install
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.pool import WorkerPool
from millijoule.workers.lease import (
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
        self.times_fenced = 0
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

    def fenced(self):
        self.times_fenced += 1

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


def suspected(worker, lease):
    suspect = Suspect(2, 0, "cannot draw")
    return After(1.0, AttemptResult(lease, "suspect", b"prepared", (suspect,), (0, 0)))
