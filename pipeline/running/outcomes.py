"""What came back from workers, and what follows from it for lease, worker and node: whose fault an ending was.

docs/failure-domains.md has the table. Nothing here is the truth: `Coordinator` decides who works on what, storage decides
what is done, and `NodeHealth` which nodes are fit for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from millijoule.pipeline.running.cluster import first_line, is_alive
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.crew import STOP_TIMEOUT_S, Crew, Worker
from millijoule.pipeline.running.node_health import NodeHealth
from millijoule.pipeline.running.preemption import DeathBudget, DrainingNodes
from millijoule.workers.errors import DamagedError, JobError, MillijouleError, StoreError
from millijoule.workers.lease import AttemptResult, Lease, Node, Piece, WorkerStatus, WorkerStopped
from millijoule.workers.schemas import CounterRead

log = logging.getLogger(__name__)

#: How often busy workers are asked how far they are, while they are few,
STATUS_PERIOD_S = 1.0
#: and how many answers a second there are to be read where they are many.
STATUSES_PER_S = 100
#: An answer that is there takes no time to fetch; one that takes so long is lost.
FETCH_TIMEOUT_S = 60.0
#: Workers may die this often in a row before it is known on which node, without a commit or a lease in hand elsewhere.
UNPLACED_DEATHS = 16
UNPLACED_PAUSE_FIRST_S, UNPLACED_PAUSE_MOST_S = 0.5, 30.0
#: First pause before a shard that failed on storage comes again; doubles up to the most.
STORE_BACKOFF_FIRST_S = 1.0
STORE_BACKOFF_MOST_S = 60.0


class JobEvents(Protocol):
    """What the pool tells its owner while it runs. Nothing of it may wait for storage.

    Methods:
        prepared: write the commit that the attempt prepared, and call `WorkerPool.commit_stands` once one stands.
        discarded: the attempt's prepared commit will never stand: its energy is waste, its files go.
        fenced: a worker found that a later run of the job has begun, and did not commit.
        stopped: a worker's last words: it closed its account itself.
        loading: what the own meter of a worker said that still loads when nobody needs it any more; `gone` follows.
        gone: a worker ended without last words: its account of its devices is open.
        tick: one turn of the pool's loop is over.
    """

    def committed(self, result: AttemptResult, *, news: bool) -> None: ...
    def prepared(self, result: AttemptResult) -> None: ...
    def discarded(self, result: AttemptResult) -> None: ...
    def fenced(self) -> None: ...
    def stopped(self, stopped: WorkerStopped) -> None: ...
    def loading(self, worker_id: str, read: CounterRead | None) -> None: ...
    def gone(self, worker_id: str) -> None: ...
    def tick(self) -> None: ...


class Outcomes:
    """Takes one answer after another; `committing` are prepared commits in the owner's hands, by attempt id.

    There are `max_workers` at once at most.
    """

    def __init__(self, crew: Crew, coordinator: Coordinator, events: JobEvents, max_workers: int) -> None:
        self.crew = crew
        self.coordinator = coordinator
        self.events = events
        self.nodes = NodeHealth()
        self.draining = DrainingNodes()
        self.deaths = DeathBudget(max_workers)
        self.committing: dict[str, AttemptResult] = {}
        self.on_piece: Callable[[str, Piece], None] = lambda worker_id, piece: None  # of a shard given back
        self.spawn_not_before = 0.0
        self._unplaced_deaths = 0
        self._store_failures = 0

    def settle(self, worker: Worker, what: str, lease: Lease | None, call: Any, now: float) -> None:
        """Take the answer to `call`, which was about `lease` if any, or the worker's death.

        Raises:
            DamagedError: the plan or a commit is not what was written.
            JobError: workers end before they start, one after another.
        """
        if self.crew.workers.get(worker.worker_id) is not worker:
            return  # buried before its last call came back
        try:
            value = ray.get(call, timeout=FETCH_TIMEOUT_S)
        except RayTaskError as error:
            self._raised(worker, what, lease, error.cause or error, now)
        except (RayError, GetTimeoutError) as error:
            if isinstance(error, ActorUnavailableError) and what in ("status", "locate"):
                worker.status_pending = False
            else:
                self.bury(worker, error, now)
        else:
            self._answered(worker, what, lease, value, now)

    def _answered(self, worker: Worker, what: str, lease: Lease | None, value: Any, now: float) -> None:
        if what == "locate":
            worker.node, worker.placed = value, now
        elif what == "start":
            worker.ready = worker.node = value
        elif what == "run":
            self._attempt_ended(worker, value, now)
        elif what == "status":
            self._status(worker, value, now)
        elif what == "stop":
            # one that was asked before it had opened its account may have since
            said = worker.ready is not None or not worker.leaving or bool(value.segments)
            if said:
                self.events.stopped(value)
            self.crew.remove(worker, last_words=said)
        elif what == "loading":
            self.events.loading(worker.worker_id, value)
            self.crew.remove(worker)
        elif what == "give_back":
            if not value and lease is not None and lease.attempt_id in worker.held:
                worker.held[lease.attempt_id].has_begun = True
        elif what == "afterwards":
            assert lease is not None
            self.nodes.worked(worker.last_node().node_id)
            self.coordinator.probed(lease.attempt_id)
            self._ended(worker, lease, now)

    def _status(self, worker: Worker, status: WorkerStatus, now: float) -> None:
        worker.status_pending = False
        worker.next_status = now + self.status_period_s
        worker.waits_for_store = status.waits_for_store
        for progress in status.attempts:
            held = worker.held.get(progress.attempt_id)
            if held:
                held.has_begun |= progress.has_begun
            if held and self.coordinator.renew(progress, now, waits_for_store=status.waits_for_store):
                held.late = 0

    @property
    def status_period_s(self) -> float:
        """Between two questions to one worker; far below `--lease-seconds` up to thousands of them."""
        return max(STATUS_PERIOD_S, len(self.crew.workers) / STATUSES_PER_S)

    # -- attempts ------------------------------------------------------------------------------------------------

    def _attempt_ended(self, worker: Worker, result: AttemptResult, now: float) -> None:
        lease, node_id = result.lease, worker.last_node().node_id
        if result.outcome == "probed":
            # survived only if the process answers afterwards, too
            self.crew.expect(worker, "afterwards", worker.actor.status.remote(), lease)
            return
        self._ended(worker, lease, now)
        if result.outcome == "cancelled":
            if result.piece is not None:
                self.coordinator.sealed(lease.shard.shard_id, result.piece.images)
                self.on_piece(worker.worker_id, result.piece)
            self.coordinator.released(lease.attempt_id)
        elif result.outcome == "superseded":
            self.coordinator.released(lease.attempt_id)
            self.events.fenced()
        elif result.outcome == "suspect":
            self.coordinator.suspected(result, node_id, now)
        elif result.outcome == "contradicted":
            self._contradicted(worker, result, now)
        else:
            self.nodes.worked(node_id)
            if result.outcome == "confirmed":
                if waiting := self.coordinator.confirmed(lease.attempt_id):
                    self._commit(waiting)
            elif result.outcome == "prepared":
                self._commit(result)
            else:
                self.complete(result, now)

    def _ended(self, worker: Worker, lease: Lease, now: float) -> None:
        """`lease` is in the worker's hands no longer."""
        worker.held.pop(lease.attempt_id, None)
        if worker.stopping:
            worker.stop_by = now + STOP_TIMEOUT_S  # counts from the end of what it has in hand

    def _commit(self, result: AttemptResult) -> None:
        self.committing[result.lease.attempt_id] = result
        self.events.prepared(result)

    def complete(self, result: AttemptResult, now: float) -> None:
        """A commit stands for the shard: whoever else works on it wastes energy."""
        lease = result.lease
        news = self.coordinator.complete(lease.attempt_id, lease.shard.shard_id, now)
        for other in self.coordinator.leases_of(lease.shard.shard_id):
            worker = self.crew.workers.get(other.worker_id)
            if worker is not None and other.attempt_id in worker.held:
                self.crew.cancel(worker, other)
        self._unplaced_deaths = self._store_failures = 0
        self.events.committed(result, news=news)

    def _contradicted(self, witness: Worker, result: AttemptResult, now: float) -> None:
        """Another worker drew what the accuser could not: the fault is the accuser's."""
        accusation = self.coordinator.contradicted(result.lease.attempt_id)
        if accusation is None:
            return
        (suspect,) = result.suspects
        second = "itself, on a second try," if accusation.worker_id == witness.worker_id else "another worker"
        reason = f"failed on what {second} drew: {suspect.reason}"
        accuser = self.crew.workers.get(accusation.worker_id)
        host = accuser.last_node().host if accuser is not None else "?"
        state = self.nodes.fault(Node(accusation.node_id, host), reason, now).state
        log.warning("worker %s on %s %s (%s)", accusation.worker_id, host, reason, state)
        if accuser is not None and not accuser.stopping:
            for lease in accuser.leases:
                self.coordinator.released(lease.attempt_id)
                self.crew.cancel(accuser, lease)
            accuser.held.clear()
            self.crew.stop(accuser, now)

    # -- failures ------------------------------------------------------------------------------------------------

    def _raised(self, worker: Worker, what: str, lease: Lease | None, error: Exception, now: float) -> None:
        """A call raised in a worker that lives on."""
        reason = first_line(error)
        if what in ("status", "locate"):
            worker.status_pending = False
            return
        if what == "give_back":
            return
        if what == "stop":
            log.warning("worker %s could not close its books: %s", worker.worker_id, reason)
            self.crew.remove(worker)
            return
        if isinstance(error, DamagedError):
            raise error
        if lease is not None:
            self._ended(worker, lease, now)
        if isinstance(error, StoreError) and error.transient and lease is not None:
            pause = min(STORE_BACKOFF_MOST_S, STORE_BACKOFF_FIRST_S * 2**self._store_failures)
            self._store_failures += 1
            log.warning("shard %d: %s; trying again in %.0f s", lease.shard.shard_id, reason, pause)
            self.coordinator.released(lease.attempt_id, now + pause)
            return
        if lease is not None and isinstance(error, MillijouleError):
            self.coordinator.released(lease.attempt_id)
        elif lease is not None:  # not foreseen: it may be the shard that does it
            self.coordinator.crashed(lease.attempt_id, reason)
        if worker.stopping:
            return  # its other lease has ended in the same way
        node = worker.last_node()
        state = self.nodes.fault(node, reason, now).state
        log.warning("worker %s on %s cannot work: %s (%s)", worker.worker_id, node.host, reason, state)
        for other in worker.leases:
            self.crew.cancel(worker, other)
        self.crew.stop(worker, now)

    def bury(self, worker: Worker, error: Exception, now: float) -> None:
        """Take a dead, or useless, worker out; raises JobError as `settle`."""
        self.crew.remove(worker)
        reason, node, stood_still = first_line(error), worker.last_node(), isinstance(error, TimeoutError)
        progress = self.coordinator.progress
        preempted = getattr(error, "preempted", False) or self.draining.takes(node.node_id)
        no_memory = isinstance(
            error, OutOfMemoryError
        )  # Ray took it because its node's was full: no row's fault
        lost_node = preempted or not is_alive(node.node_id)
        for attempt_id, held in worker.held.items():
            if preempted or no_memory or (stood_still and not held.late):  # the other one stood still
                self.coordinator.released(attempt_id)
            elif lost_node:
                self.coordinator.node_died(attempt_id, reason)
            else:
                self.coordinator.crashed(attempt_id, reason, stood_still=stood_still)
        numbers = [str(lease.shard.shard_id) for lease in worker.leases]
        in_hand = f" with shard{'s'[: len(numbers) - 1]} {' and '.join(numbers)} in hand" if numbers else ""
        worker.held.clear()
        log.warning("worker %s on %s is gone%s: %s", worker.worker_id, node.host, in_hand, reason)
        if preempted:
            self.deaths.preemption()
            return
        self.deaths.fault(reason, self.coordinator.progress)
        if not node.node_id:
            self._died_unplaced(reason, now)
        elif not lost_node:  # one that is gone, or is being taken away, gets no worker anyway
            if self.coordinator.progress > progress:  # a search was narrowed
                self.nodes.worked(node.node_id)
            # without `ready` no row can have done that
            blame = self.nodes.fault if worker.ready is None or no_memory else self.nodes.death
            blame(node, reason, now)

    def _died_unplaced(self, reason: str, now: float) -> None:
        pause = min(UNPLACED_PAUSE_MOST_S, UNPLACED_PAUSE_FIRST_S * 2**self._unplaced_deaths)
        self._unplaced_deaths += 1
        self.spawn_not_before = max(self.spawn_not_before, now + pause)
        if self._unplaced_deaths > UNPLACED_DEATHS and not self.coordinator.active:
            raise JobError(
                f"{self._unplaced_deaths} workers in a row ended before they started; the last: {reason}. Nothing "
                "that was committed is lost: mend the cause and run the same command again"
            )
