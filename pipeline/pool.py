"""The pool: Ray actors in, commits out. Starts workers as work needs them, feeds them leases, replaces the dead.

One loop owns everything: it waits on the futures of its workers and reacts. A worker that finishes a lease is given
the next at once. Nothing here is the truth: `Coordinator` decides who works on what, storage decides what is done.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from millijoule.pipeline.coordinator import Coordinator
from millijoule.pipeline.demand import Demand
from millijoule.workers.errors import InputError, MillijouleError, StoreError
from millijoule.workers.lease import (
    AttemptResult,
    Lease,
    WorkerConfig,
    WorkerReady,
    WorkerStatus,
    WorkerStopped,
)
from millijoule.workers.schemas import PowerTrace, Segment

log = logging.getLogger(__name__)

#: The loop looks at clocks (deadlines, backoff, capacity) at least this often.
TICK_S = 0.2

#: How often busy workers are asked how far they are.
STATUS_PERIOD_S = 1.0

#: Silence about missing capacity ends after this long, and is repeated that often.
CAPACITY_NOTICE_S = 15.0

#: First pause before a dead worker is replaced; doubles with each death without progress in between.
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0

#: Workers may die this often in a row, plus twice per worker, without a commit or a narrowed search in between.
RESPAWN_BUDGET = 8

#: How long the pool waits for idle workers' last words when it closes.
STOP_TIMEOUT_S = 5.0

#: First pause before a shard that failed on storage comes again; doubles up to the most.
STORE_BACKOFF_FIRST_S = 1.0
STORE_BACKOFF_MOST_S = 60.0


class PoolError(MillijouleError):
    """The job cannot go on: workers keep dying, or cannot start."""


@dataclass(frozen=True)
class PoolOptions:
    """How many workers, and what each asks Ray for.

    `min_workers` may be 0: then nothing runs while nothing waits. `at_once` workers fit the nodes that are there: beyond
    them nodes are asked for as far as the work is worth it. None: one for each shard is asked for at once.
    """

    min_workers: int
    max_workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    at_once: int | None = None


class JobEvents(Protocol):
    """What the pool tells its owner while it runs."""

    def committed(self, result: AttemptResult, *, news: bool) -> None: ...
    def prepared(self, result: AttemptResult) -> bytes:
        """Write the commit of a store without exclusive create; the commit that stands afterwards."""
        ...

    def uncommitted(
        self, worker_id: str, segments: tuple[Segment, ...], power: tuple[PowerTrace, ...]
    ) -> None: ...
    def tick(self, pool: WorkerPool) -> None: ...


@dataclass(eq=False)
class _Worker:
    worker_id: str
    actor: Any
    run: Any  # the actor's method, looked up once
    spawned: float
    ready: WorkerReady | None = None
    lease: Lease | None = None
    late: int = 0  # deadlines missed in a row by the lease in hand
    next_status: float = 0.0
    status_pending: bool = False
    stopping: bool = False


class WorkerPool:
    """Runs a coordinator's leases on Ray actors until it is done or told to drain.

    Args:
        actor_class: what `ray.remote` returned for the worker.
        coordinator: decides who works on what.
        config: handed to every worker.
    """

    def __init__(
        self,
        actor_class: Any,
        coordinator: Coordinator,
        config: WorkerConfig,
        options: PoolOptions,
        events: JobEvents,
    ) -> None:
        self.actor_class = actor_class
        self.coordinator = coordinator
        self.config = config
        self.options = options
        self.events = events
        self.workers: dict[str, _Worker] = {}
        self.images_running = 0
        self.draining: str | None = None  # why no more leases are given
        self.deaths = 0
        self._futures: dict[Any, tuple[_Worker, str]] = {}
        self._spawned = 0
        self._deaths_in_a_row = 0
        self._progress_at_death = -1
        self._spawn_not_before = 0.0
        self._last_error = ""
        self._store_failures = 0
        self._waiting_since: float | None = None
        self._demand = Demand(options)

    def run(self) -> None:
        """Work until the coordinator is done, or until drained after `drain`.

        Raises:
            InputError, StoreError: a worker met something only a person can mend.
            PoolError: workers keep dying.
        """
        try:
            while not self.coordinator.done and not (self.draining and not self.coordinator.active):
                self._tick(time.monotonic())
        finally:
            self._close()

    def drain(self, reason: str) -> None:
        """Give no more leases; `run` returns when those that are out have ended."""
        self.draining = self.draining or reason

    @property
    def ready_workers(self) -> int:
        return sum(w.ready is not None for w in self.workers.values())

    # -- one turn of the loop ------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._resize(now)
        self._feed(now)
        self._ask_status(now)
        for future in self._wait():
            entry = self._futures.pop(future, None)
            if entry is not None:
                self._settle(*entry, future, time.monotonic())
        self._watch_deadlines(time.monotonic())
        self._notice_missing_capacity(now)
        self.events.tick(self)

    def _wait(self) -> list[Any]:
        futures = list(self._futures)
        if not futures:
            time.sleep(TICK_S / 4)
            return []
        ready, _ = ray.wait(futures, num_returns=1, timeout=TICK_S, fetch_local=False)
        if ready and len(futures) > 2:
            ready, _ = ray.wait(futures, num_returns=len(futures), timeout=0, fetch_local=False)
        return ready

    def _resize(self, now: float) -> None:
        """Ask for the workers the work is worth, and take back requests it no longer is worth."""
        demand, workers, draining = self._demand, self.workers.values(), self.draining is not None
        demand.look(self.coordinator, workers, now)
        while not draining and len(workers) < demand.wanted() and now >= self._spawn_not_before:
            self._spawn(now)
        surplus = demand.withdrawable(workers, now, draining=draining)
        for worker in surplus:
            self._remove(worker)
        if surplus:
            log.info("workers still waiting for a node and no longer needed: %d taken back", len(surplus))

    def _spawn(self, now: float) -> None:
        self._spawned += 1
        worker_id = f"w{self.config.driver_epoch:04d}-{self._spawned:04d}"
        options = self.options
        actor = self.actor_class.options(
            name=None,
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            resources=options.resources or None,
        ).remote(worker_id, self.config)
        worker = _Worker(worker_id, actor, actor.run.remote, now)
        self.workers[worker_id] = worker
        self._futures[actor.start.remote()] = (worker, "start")

    def _feed(self, now: float) -> None:
        if self.draining:
            return
        for worker in self.workers.values():
            if worker.ready is None or worker.lease is not None or worker.stopping:
                continue
            lease = self.coordinator.next_lease(worker.worker_id, now)
            if lease is None:
                if len(self.workers) > self.options.min_workers and self._surplus():
                    worker.stopping = True
                    self._futures[worker.actor.stop.remote()] = (worker, "stop")
                continue
            worker.lease, worker.late, worker.next_status = lease, 0, now + STATUS_PERIOD_S
            self._futures[worker.run(lease)] = (worker, "run")

    def _surplus(self) -> bool:
        """An idle worker is of no use: the leases out are fewer than the workers, and it cannot help a straggler."""
        staying = sum(not w.stopping for w in self.workers.values())
        spare = 1 if self.coordinator.speculate and self.coordinator.remaining else 0
        return staying > self.coordinator.remaining + spare

    def _ask_status(self, now: float) -> None:
        for worker in self.workers.values():
            if worker.lease is not None and not worker.status_pending and now >= worker.next_status:
                worker.status_pending = True
                self._futures[worker.actor.status.remote()] = (worker, "status")

    # -- what came back ------------------------------------------------------------------------------------------

    def _settle(self, worker: _Worker, kind: str, future: Any, now: float) -> None:
        if self.workers.get(worker.worker_id) is not worker:
            return  # buried before its last call came back
        try:
            value = ray.get(future, timeout=60)
        except RayActorError as error:
            if kind == "status" and isinstance(error, ActorUnavailableError):
                worker.status_pending = False
                return
            self._bury(worker, error, now)
            return
        except RayTaskError as error:
            self._raised(worker, kind, error.cause if error.cause is not None else error, now)
            return
        except (RayError, GetTimeoutError) as error:
            self._bury(worker, error, now, kill=True)
            return
        if kind == "start":
            worker.ready = value
        elif kind == "run":
            self._attempt_ended(worker, value, now)
        elif kind == "status":
            self._status(worker, value, now)
        elif kind == "stop":
            self._stopped(worker, value)

    def _attempt_ended(self, worker: _Worker, result: AttemptResult, now: float) -> None:
        worker.lease = None
        lease = result.lease
        if result.outcome == "probed":
            self.coordinator.probed(lease.attempt_id)
            return
        if result.outcome == "cancelled":
            self.coordinator.released(lease.attempt_id)
            return
        if result.outcome == "prepared":
            standing = self.events.prepared(result)
            outcome = "committed" if standing == result.commit_json else "exists"
            result = AttemptResult(lease, outcome, standing)
        news = self.coordinator.complete(lease.attempt_id, lease.shard.shard_id, now)
        self._cancel_losers(lease.shard.shard_id)
        self._deaths_in_a_row = self._store_failures = 0
        self.events.committed(result, news=news)

    def _cancel_losers(self, shard_id: int) -> None:
        """The shard is committed: whoever else works on it wastes energy."""
        for worker in self.workers.values():
            if worker.lease is not None and worker.lease.shard.shard_id == shard_id:
                worker.actor.cancel.remote(worker.lease.attempt_id)

    def _status(self, worker: _Worker, status: WorkerStatus, now: float) -> None:
        worker.status_pending = False
        worker.next_status = now + STATUS_PERIOD_S
        if worker.lease is None or status.attempt_id != worker.lease.attempt_id:
            return
        if self.coordinator.renew(status.attempt_id, status.images_done, status.steps, now):
            worker.late = 0

    def _stopped(self, worker: _Worker, stopped: WorkerStopped) -> None:
        self.events.uncommitted(stopped.worker_id, stopped.segments, stopped.power)
        self._remove(worker)

    def _raised(self, worker: _Worker, kind: str, error: Exception, now: float) -> None:
        """A call raised in a worker that lives on."""
        if kind in ("status", "stop"):
            worker.status_pending = False
            if kind == "stop":
                self._remove(worker)
            return
        transient = isinstance(error, StoreError) and error.transient
        if isinstance(error, (InputError, StoreError)) and not transient:
            raise error
        if kind == "start" or not transient:
            self._bury(worker, error, now, kill=True)
            return
        lease, worker.lease = worker.lease, None
        assert lease is not None
        self._store_failures += 1
        pause = min(STORE_BACKOFF_MOST_S, STORE_BACKOFF_FIRST_S * 2 ** (self._store_failures - 1))
        log.warning("shard %d: %s; trying again in %.0f s", lease.shard.shard_id, first_line(error), pause)
        self.coordinator.failed(lease.attempt_id, first_line(error), now + pause)

    def _bury(self, worker: _Worker, error: Exception, now: float, *, kill: bool = False) -> None:
        """Take a dead (or, with `kill`, useless) worker out, and pause before the next one."""
        self._remove(worker, kill=kill)
        self.deaths += 1
        reason = first_line(error)
        lease = worker.lease
        if lease is not None:
            if getattr(error, "preempted", False):
                self.coordinator.released(lease.attempt_id)
            else:
                self.coordinator.crashed(lease.attempt_id, reason)
        if self.coordinator.progress > self._progress_at_death:
            self._deaths_in_a_row = 0
        self._progress_at_death = self.coordinator.progress
        self._deaths_in_a_row += 1
        self._last_error = reason
        pause = min(BACKOFF_MOST_S, BACKOFF_FIRST_S * 2 ** (self._deaths_in_a_row - 1))
        self._spawn_not_before = max(self._spawn_not_before, now + pause)
        shard = f" with shard {lease.shard.shard_id} in hand" if lease else ""
        log.warning("worker %s is gone%s: %s", worker.worker_id, shard, reason)
        budget = RESPAWN_BUDGET + 2 * self.options.max_workers
        if self._deaths_in_a_row > budget:
            raise PoolError(
                f"{self._deaths_in_a_row} workers died in a row without finishing a shard; the last said: "
                f"{self._last_error}. Nothing that was committed is lost: mend the cause and run the same "
                "command again"
            )

    # -- clocks --------------------------------------------------------------------------------------------------

    def _watch_deadlines(self, now: float) -> None:
        by_attempt = {w.lease.attempt_id: w for w in self.workers.values() if w.lease is not None}
        for entry in self.coordinator.expired(now):
            worker = by_attempt.get(entry.lease.attempt_id)
            if worker is None:
                self.coordinator.released(entry.lease.attempt_id)
                continue
            worker.late += 1
            where = worker.ready.host if worker.ready else "?"
            if worker.late == 1 and entry.lease.probe_rows is None:
                log.warning(
                    "worker %s on %s made no progress on shard %d for %.0f s; leasing the shard again",
                    worker.worker_id,
                    where,
                    entry.lease.shard.shard_id,
                    self.coordinator.lease_s,
                )
                self.coordinator.lease_again(entry.lease.attempt_id)
            else:
                self._bury(worker, TimeoutError("stood still; killed"), now, kill=True)

    def _notice_missing_capacity(self, now: float) -> None:
        if self.ready_workers or not self.workers:
            self._waiting_since = None
            return
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > CAPACITY_NOTICE_S:
            self._waiting_since = now
            ask = [f"{self.options.cpus_per_worker:g} CPU"]
            if self.options.gpus_per_worker:
                ask.append(f"{self.options.gpus_per_worker:g} GPU")
            ask += [f"{v:g} {k}" for k, v in self.options.resources.items()]
            log.warning(
                "waiting for the cluster: %d workers asked for (%s each), none running yet",
                len(self.workers),
                ", ".join(ask),
            )

    # -- the end -------------------------------------------------------------------------------------------------

    def _remove(self, worker: _Worker, *, kill: bool = True) -> None:
        self.workers.pop(worker.worker_id, None)
        for future in [f for f, (w, _) in self._futures.items() if w is worker]:
            del self._futures[future]
        if kill:
            ray.kill(worker.actor)

    def _close(self) -> None:
        """Stop what still runs, collect the workers' last segments, then end all actors."""
        calls = []
        for worker in self.workers.values():
            if worker.ready is not None:
                if worker.lease is not None:
                    worker.actor.cancel.remote(worker.lease.attempt_id)
                calls.append(worker.actor.stop.remote())
        if calls:
            try:
                done, _ = ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
                for call in done:
                    stopped: WorkerStopped = ray.get(call)
                    self.events.uncommitted(stopped.worker_id, stopped.segments, stopped.power)
            except RayError as error:
                log.warning("a worker's last words were lost: %s", first_line(error))
        for worker in list(self.workers.values()):
            self._remove(worker)


def first_line(error: BaseException) -> str:
    """The part of an error a log line has room for: Ray's multi-line texts say the cause in the first lines."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = " ".join(lines[:1]) if not isinstance(error, RayActorError) else " ".join(lines[:2])
    return head[:300]
