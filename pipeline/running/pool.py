"""The pool: Ray actors in, commits out. Starts workers as work needs them, feeds them leases, replaces the dead.

One loop owns everything: it waits on the futures of its workers and reacts. A worker that finishes a lease is given
the next at once. Nothing here is the truth: `Coordinator` decides who works on what, storage decides what is done, and
`NodeHealth` which nodes are fit for it. A worker leaves in one of two ways: with its last words, or as `gone`, so that
somebody else closes its account of the devices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray._private import state as ray_state
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError

from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import Demand
from millijoule.pipeline.running.node_health import NodeHealth
from millijoule.workers.errors import DamagedError, JobError, MillijouleError, StoreError
from millijoule.workers.lease import (
    AttemptResult,
    Lease,
    NodePlace,
    WorkerConfig,
    WorkerReady,
    WorkerStatus,
    WorkerStopped,
)

log = logging.getLogger(__name__)

#: The loop looks at clocks (deadlines, backoff, capacity) at least this often.
TICK_S = 0.2

#: How often busy workers are asked how far they are.
STATUS_PERIOD_S = 1.0

#: Silence about missing capacity ends after this long, and is repeated that often.
CAPACITY_NOTICE_S = 15.0

#: Between two looks at which nodes the cluster has, while some are shunned.
NODES_PERIOD_S = 1.0

#: Workers may die this often in a row before it is known on which node, without a commit or a lease in hand elsewhere.
UNPLACED_DEATHS = 16
UNPLACED_PAUSE_MOST_S = 30.0

#: An idle worker's last words take a counter read; a worker that needs longer than this is as good as dead.
STOP_TIMEOUT_S = 30.0

#: When a person or the cluster cuts the run off, idle workers have this long for their last words; nobody else has.
CUT_OFF_S = 3.0

#: First pause before a shard that failed on storage comes again; doubles up to the most.
STORE_BACKOFF_FIRST_S = 1.0
STORE_BACKOFF_MOST_S = 60.0

#: Ray's label that holds a node's id.
NODE_ID_LABEL = "ray.io/node-id"


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
    """What the pool tells its owner while it runs. Nothing of it may wait for storage."""

    def committed(self, result: AttemptResult, *, news: bool) -> None: ...
    def prepared(self, result: AttemptResult) -> None:
        """Write the commit that the attempt prepared, and call `WorkerPool.commit_stands` once one stands."""
        ...

    def discarded(self, result: AttemptResult) -> None:
        """The attempt's prepared commit will never stand: its energy is waste, its files go."""
        ...

    def stopped(self, stopped: WorkerStopped) -> None:
        """A worker's last words: it closed its account itself."""
        ...

    def gone(self, worker_id: str) -> None:
        """A worker ended without last words: its account of its devices is open."""
        ...

    def tick(self, pool: WorkerPool) -> None: ...


@dataclass(eq=False)
class _Worker:
    worker_id: str
    actor: Any
    run: Any  # the actor's method, looked up once
    spawned: float
    away: frozenset[str] = frozenset()  # nodes it must not be placed on
    place: NodePlace | None = None
    ready: WorkerReady | None = None
    lease: Lease | None = None
    late: int = 0  # deadlines missed in a row by the lease in hand
    next_status: float = 0.0
    status_pending: bool = False
    stop_by: float | None = None  # its last words were asked for, and are due then

    @property
    def stopping(self) -> bool:
        return self.stop_by is not None


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
        self.nodes = NodeHealth()
        self.draining: str | None = None  # why no more leases are given
        self.deaths = 0
        self._futures: dict[Any, tuple[_Worker, str]] = {}
        self._committing: dict[str, AttemptResult] = {}  # prepared commits in the owner's hands
        self._closing = False
        self._spawned = 0
        self._unplaced_deaths = 0
        self._spawn_not_before = 0.0
        self._candidates: list[str] = []
        self._candidates_until = 0.0
        self._store_failures = 0
        self._waiting_since: float | None = None
        self._demand = Demand(options)

    def run(self) -> None:
        """Work until the coordinator is done, or until drained after `drain`; then collect every worker's last words.

        An exception that `JobEvents.tick` raises cuts the run off: nobody who is busy is waited for.

        Raises:
            DamagedError: the plan or a commit is not what was written.
            JobError: no node is left that can work.
        """
        try:
            try:
                while not self.coordinator.done and not self._drained:
                    self._tick(time.monotonic())
            except MillijouleError:
                self._collect_last_words()
                raise
            self._collect_last_words()
        finally:
            self._cut_off()

    def drain(self, reason: str) -> None:
        """Give no more leases; `run` returns when those that are out have ended."""
        self.draining = self.draining or reason

    def commit_stands(self, result: AttemptResult, standing: bytes) -> None:
        """The answer to `JobEvents.prepared`: the commit that now stands for the shard."""
        self._committing.pop(result.lease.attempt_id, None)
        outcome = "committed" if standing == result.commit_json else "exists"
        self._complete(AttemptResult(result.lease, outcome, standing), time.monotonic())

    @property
    def ready_workers(self) -> int:
        return sum(w.ready is not None for w in self.workers.values())

    @property
    def _drained(self) -> bool:
        return bool(self.draining) and not self.coordinator.active and not self._committing

    # -- one turn of the loop ------------------------------------------------------------------------------------

    def _tick(self, now: float) -> None:
        self._resize(now)
        self._feed(now)
        self._look_after(now)
        self._notice_missing_capacity(now)

    def _look_after(self, now: float) -> None:
        self._ask_status(now)
        for future in self._wait():
            entry = self._futures.pop(future, None)
            if entry is not None:
                self._settle(*entry, future, time.monotonic())
        self._watch_deadlines(time.monotonic())
        for result in self.coordinator.take_void():
            self.events.discarded(result)
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
        shunned = self._shunned(now)
        if shunned is not None:
            for worker in [w for w in workers if w.place is None and w.away - shunned]:
                self._remove(worker)  # it waits for other nodes, and may have this one now
            while not draining and len(workers) < demand.wanted() and now >= self._spawn_not_before:
                self._spawn(now, shunned)
        surplus = demand.withdrawable(workers, now, draining=draining)
        for worker in surplus:
            self._remove(worker)
        if surplus:
            log.info("workers still waiting for a node and no longer needed: %d taken back", len(surplus))

    def _shunned(self, now: float) -> set[str] | None:
        """Nodes to keep new workers away from; None while there is no other node.

        Raises:
            JobError: all nodes there are, are out, and nobody is at work.
        """
        shunned = self.nodes.shunned(now)
        if not shunned:
            return shunned
        if now >= self._candidates_until:
            self._candidates_until = now + NODES_PERIOD_S
            self._candidates = _nodes_for(self.options)
        if not self._candidates or set(self._candidates) - shunned:
            return shunned
        out = {n.node_id: n for n in self.nodes.out}
        at_work = any(w.place is not None for w in self.workers.values())
        if not at_work and all(node_id in out for node_id in self._candidates):
            reasons = "\n".join(f"  {out[node_id]}" for node_id in self._candidates)
            raise JobError(
                f"no node is left that can work:\n{reasons}\nNothing that was committed is lost: mend the cause and "
                "run the same command again"
            )
        return None

    def _spawn(self, now: float, shunned: Set[str] = frozenset()) -> None:
        self._spawned += 1
        worker_id = f"w{self.config.driver_epoch:04d}-{self._spawned:04d}"
        options = self.options
        actor = self.actor_class.options(
            name=None,
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            resources=options.resources or None,
            label_selector={NODE_ID_LABEL: f"!in({','.join(sorted(shunned))})"} if shunned else None,
        ).remote(worker_id, self.config)
        worker = _Worker(worker_id, actor, actor.run.remote, now, frozenset(shunned))
        self.workers[worker_id] = worker
        self._futures[actor.place.remote()] = (worker, "place")
        self._futures[actor.start.remote()] = (worker, "start")

    def _feed(self, now: float) -> None:
        if self.draining:
            return
        peers = {
            w.worker_id: w.ready.node_id
            for w in self.workers.values()
            if w.ready is not None and not w.stopping
        }
        for worker in list(self.workers.values()):
            if worker.worker_id not in peers or worker.lease is not None or worker.stopping:
                continue
            alone = self.options.max_workers == 1
            lease = self.coordinator.next_lease(worker.worker_id, now, peers, alone=alone)
            if lease is None:
                if len(self.workers) > self.options.min_workers and self._surplus():
                    self._stop(worker, now)
                continue
            worker.lease, worker.late, worker.next_status = lease, 0, now + STATUS_PERIOD_S
            self._futures[worker.run(lease)] = (worker, "run")

    def _surplus(self) -> bool:
        """An idle worker is of no use: the leases out are fewer than the workers, and it cannot help a straggler."""
        staying = sum(not w.stopping for w in self.workers.values())
        spare = 1 if self.coordinator.speculate and self.coordinator.remaining else 0
        return staying > self.coordinator.useful_workers + spare

    def _stop(self, worker: _Worker, now: float) -> None:
        """Ask for last words; they come once what the worker has in hand has ended."""
        worker.stop_by = now + STOP_TIMEOUT_S
        self._futures[worker.actor.stop.remote()] = (worker, "stop")

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
            if kind in ("status", "place") and isinstance(error, ActorUnavailableError):
                worker.status_pending = False
                return
            self._bury(worker, error, now)
            return
        except RayTaskError as error:
            self._raised(worker, kind, error.cause if error.cause is not None else error, now)
            return
        except (RayError, GetTimeoutError) as error:
            self._bury(worker, error, now)
            return
        if kind == "place":
            worker.place = value
        elif kind == "start":
            worker.ready = value
            worker.place = NodePlace(value.node_id, value.host)
        elif kind == "run":
            self._attempt_ended(worker, value, now)
        elif kind == "status":
            self._status(worker, value, now)
        elif kind == "stop":
            self._stopped(worker, value)
        elif kind == "afterwards":
            self._answered_afterwards(worker)

    def _attempt_ended(self, worker: _Worker, result: AttemptResult, now: float) -> None:
        worker.lease = None
        assert worker.ready is not None
        lease, node_id = result.lease, worker.ready.node_id
        if result.outcome == "cancelled":
            self.coordinator.released(lease.attempt_id)
            return
        if result.outcome == "probed":
            # survived only if the process answers afterwards, too
            worker.lease = lease
            self._futures[worker.actor.status.remote()] = (worker, "afterwards")
            return
        if result.outcome == "suspect":
            self.coordinator.suspected(result, node_id, now)
            return
        if result.outcome == "contradicted":
            self._contradicted(worker, result, now)
            return
        self.nodes.worked(node_id)
        if result.outcome == "confirmed":
            waiting = self.coordinator.confirmed(lease.attempt_id)
            if waiting is not None:
                self._commit(waiting)
        elif result.outcome == "prepared":
            self._commit(result)
        else:
            self._complete(result, now)

    def _answered_afterwards(self, worker: _Worker) -> None:
        assert worker.lease is not None
        assert worker.ready is not None
        self.nodes.worked(worker.ready.node_id)
        self.coordinator.probed(worker.lease.attempt_id)
        worker.lease = None

    def _commit(self, result: AttemptResult) -> None:
        self._committing[result.lease.attempt_id] = result
        self.events.prepared(result)

    def _complete(self, result: AttemptResult, now: float) -> None:
        lease = result.lease
        news = self.coordinator.complete(lease.attempt_id, lease.shard.shard_id, now)
        self._cancel_losers(lease.shard.shard_id)
        self._unplaced_deaths = self._store_failures = 0
        self.events.committed(result, news=news)

    def _contradicted(self, witness: _Worker, result: AttemptResult, now: float) -> None:
        """Another worker drew what the accuser could not: the fault is the accuser's."""
        assert witness.ready is not None
        accusation = self.coordinator.contradicted(result.lease.attempt_id)
        if accusation is None:
            return
        (suspect,) = result.suspects
        second = "itself, on a second try," if accusation.worker_id == witness.worker_id else "another worker"
        reason = f"failed on what {second} drew: {suspect.reason}"
        accuser = self.workers.get(accusation.worker_id)
        host = accuser.ready.host if accuser is not None and accuser.ready is not None else "?"
        record = self.nodes.fault(accusation.node_id, host, reason, now)
        log.warning("worker %s on %s %s (%s)", accusation.worker_id, host, reason, record.state)
        if accuser is not None and not accuser.stopping:
            if accuser.lease is not None:
                self.coordinator.released(accuser.lease.attempt_id)
                accuser.actor.cancel.remote(accuser.lease.attempt_id)
                accuser.lease = None
            self._stop(accuser, now)

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
        if self.coordinator.renew(
            status.attempt_id, status.images_done, status.steps, now, waits_for_store=status.waits_for_store
        ):
            worker.late = 0

    def _stopped(self, worker: _Worker, stopped: WorkerStopped) -> None:
        self.events.stopped(stopped)
        self._remove(worker, last_words=True)

    def _raised(self, worker: _Worker, kind: str, error: Exception, now: float) -> None:
        """A call raised in a worker that lives on."""
        reason = first_line(error)
        if kind in ("status", "place"):
            worker.status_pending = False
            return
        if kind == "stop":
            log.warning("worker %s could not close its books: %s", worker.worker_id, reason)
            self._remove(worker)
            return
        if isinstance(error, DamagedError):
            raise error
        lease, worker.lease = worker.lease, None
        if isinstance(error, StoreError) and error.transient and lease is not None:
            self._store_failures += 1
            pause = min(STORE_BACKOFF_MOST_S, STORE_BACKOFF_FIRST_S * 2 ** (self._store_failures - 1))
            log.warning("shard %d: %s; trying again in %.0f s", lease.shard.shard_id, reason, pause)
            self.coordinator.released(lease.attempt_id, now + pause)
            return
        if lease is not None:
            if isinstance(error, MillijouleError):
                self.coordinator.released(lease.attempt_id)
            else:  # not foreseen: it may be the shard that does it
                self.coordinator.crashed(lease.attempt_id, reason)
        place = worker.place or _place_of(worker)
        record = self.nodes.fault(place.node_id, place.host, reason, now)
        log.warning(
            "worker %s on %s cannot work: %s (%s)", worker.worker_id, place.host, reason, record.state
        )
        self._stop(worker, now)

    def _bury(self, worker: _Worker, error: Exception, now: float) -> None:
        """Take a dead, or useless, worker out."""
        self._remove(worker)
        self.deaths += 1
        reason = first_line(error)
        lease = worker.lease
        place = worker.place or _place_of(worker)
        progress = self.coordinator.progress
        preempted = getattr(error, "preempted", False)
        lost_node = preempted or not _is_alive(place.node_id)
        if lease is not None:
            if preempted:
                self.coordinator.released(lease.attempt_id)
            elif lost_node:
                self.coordinator.node_died(lease.attempt_id, reason)
            else:
                stood_still = isinstance(error, TimeoutError)
                self.coordinator.crashed(lease.attempt_id, reason, stood_still=stood_still)
        shard = f" with shard {lease.shard.shard_id} in hand" if lease else ""
        log.warning("worker %s on %s is gone%s: %s", worker.worker_id, place.host, shard, reason)
        if lost_node and place.node_id:
            return  # a node that is gone, or is being taken away, gets no worker anyway
        if place.node_id:
            if self.coordinator.progress > progress:  # a search was narrowed
                self.nodes.worked(place.node_id)
            if worker.ready is None:  # no row can have done that
                self.nodes.fault(place.node_id, place.host, reason, now)
            else:
                self.nodes.death(place.node_id, place.host, reason, now)
            return
        self._unplaced_deaths += 1
        pause = min(UNPLACED_PAUSE_MOST_S, 0.5 * 2 ** (self._unplaced_deaths - 1))
        self._spawn_not_before = max(self._spawn_not_before, now + pause)
        if self._unplaced_deaths > UNPLACED_DEATHS and not self.coordinator.active:
            raise JobError(
                f"{self._unplaced_deaths} workers in a row ended before they started; the last: {reason}. Nothing "
                "that was committed is lost: mend the cause and run the same command again"
            )

    # -- clocks --------------------------------------------------------------------------------------------------

    def _watch_deadlines(self, now: float) -> None:
        by_attempt = {w.lease.attempt_id: w for w in self.workers.values() if w.lease is not None}
        for entry in self.coordinator.expired(now):
            attempt_id = entry.lease.attempt_id
            worker = by_attempt.get(attempt_id)
            if worker is None:
                if attempt_id not in self._committing:
                    self.coordinator.released(attempt_id)
                continue
            worker.late += 1
            where = worker.ready.host if worker.ready else "?"
            if worker.late == 1 and entry.lease.writes:
                if (
                    self._closing
                ):  # nobody needs the shard any more, but what it has in hand may end by itself
                    continue
                log.warning(
                    "worker %s on %s made no progress on shard %d for %.0f s; leasing the shard again",
                    worker.worker_id,
                    where,
                    entry.lease.shard.shard_id,
                    self.coordinator.lease_s,
                )
                self.coordinator.lease_again(attempt_id)
            else:
                self._bury(worker, TimeoutError("stood still; killed"), now)
        for worker in list(self.workers.values()):
            if worker.stop_by is not None and worker.lease is None and now > worker.stop_by:
                log.warning("worker %s did not say its last words; killed", worker.worker_id)
                self._remove(worker)

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

    def _remove(self, worker: _Worker, *, last_words: bool = False) -> None:
        self.workers.pop(worker.worker_id, None)
        for future in [f for f, (w, _) in self._futures.items() if w is worker]:
            del self._futures[future]
        ray.kill(worker.actor)
        if not last_words:
            self.events.gone(worker.worker_id)

    def _collect_last_words(self) -> None:
        """Let every worker end what it has in hand and close its books; each by itself, so that none costs another's."""
        self._closing = True
        now = time.monotonic()
        for worker in list(self.workers.values()):
            if worker.stopping:
                continue
            if worker.ready is None:
                self._remove(worker)
                continue
            if worker.lease is not None:
                worker.actor.cancel.remote(worker.lease.attempt_id)
            self._stop(worker, now)
        while self.workers or self._committing:
            now = time.monotonic()
            for worker in self.workers.values():
                if worker.lease is not None:
                    worker.stop_by = now + STOP_TIMEOUT_S  # counts from the end of what it has in hand
            self._look_after(now)

    def _cut_off(self) -> None:
        """End what still runs: nothing, after a normal end. Idle workers may say their last words."""
        self._closing = True
        calls = {}
        try:
            for worker in self.workers.values():
                if worker.ready is not None and worker.lease is None:
                    calls[worker.actor.stop.remote()] = worker
            done = ray.wait(list(calls), num_returns=len(calls), timeout=CUT_OFF_S)[0] if calls else []
            for call in done:
                try:
                    self._stopped(calls[call], ray.get(call))
                except RayError as error:
                    log.warning("last words of %s were lost: %s", calls[call].worker_id, first_line(error))
        finally:
            for worker in list(self.workers.values()):
                self._remove(worker)
            for result in self.coordinator.take_void(all_waiting=True):
                self.events.discarded(result)


def _nodes_for(options: PoolOptions) -> list[str]:
    """Ids of the nodes of the cluster that could hold a worker, were they empty."""
    asked = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker, **options.resources}
    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in asked.items())
    ]


def _place_of(worker: _Worker) -> NodePlace:
    """Where Ray says that a worker is, or was; both texts empty, "?" for the host, where it does not know."""
    try:
        found = ray_state.actors(worker.actor._actor_id.hex())
        node_id = found["Address"]["NodeID"]
        host = next(n["NodeManagerHostname"] for n in ray.nodes() if n["NodeID"] == node_id)
    except Exception:  # not a public interface: nothing may depend on its answer
        return NodePlace("", "?")
    return NodePlace(node_id, host)


def _is_alive(node_id: str) -> bool:
    """Whether the cluster still has this node; a node that is not known yet counts."""
    found = [n["Alive"] for n in ray.nodes() if n["NodeID"] == node_id]
    return not found or found[0]


def first_line(error: BaseException) -> str:
    """The part of an error a log line has room for: Ray's multi-line texts say the cause in the first lines."""
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    head = " ".join(lines[:1]) if not isinstance(error, RayActorError) else " ".join(lines[:2])
    return head[:300]
