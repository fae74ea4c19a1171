"""The pool: the loop over a job's workers. Starts them as work needs them, feeds them leases, looks at clocks, ends them.

One loop owns everything: it waits for what workers answer (`Crew`), has it judged (`Outcomes`), and leases again at once.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.exceptions import RayError

from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import config_of
from millijoule.pipeline.running.cluster import first_line, nodes_for, words
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.crew import STOP_TIMEOUT_S, Crew, Worker
from millijoule.pipeline.running.demand import Demand, PoolOptions
from millijoule.pipeline.running.outcomes import JobEvents, Outcomes
from millijoule.pipeline.running.preemption import LAST_WORDS_S
from millijoule.pipeline.running.waiting import why_waiting
from millijoule.workers.errors import JobError, MillijouleError
from millijoule.workers.lease import AttemptResult, WorkerConfig

log = logging.getLogger(__name__)

#: The loop looks at clocks (deadlines, backoff, capacity) at least this often.
TICK_S = 0.2
#: Silence about missing capacity ends after this long, and is repeated that often.
CAPACITY_NOTICE_S = 15.0
#: Between two looks at which nodes the cluster has, while some are shunned.
NODES_PERIOD_S = 1.0
#: A worker that has a node and no first image after this long stands still: longer than any download and compilation takes.
START_MOST_S = 7_200.0
#: When a person or the cluster cuts the run off, idle workers have this long for their last words; nobody else has.
CUT_OFF_S = 3.0


class WorkerPool:
    """Runs a coordinator's leases on Ray actors, made of `actor_class`, until it is done or told to drain."""

    def __init__(
        self,
        actor_class: Any,
        coordinator: Coordinator,
        config: WorkerConfig,
        options: PoolOptions,
        events: JobEvents,
        fleet: FleetPolicy | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.options = options
        self.fleet = fleet
        pools = {name: pool.options for name, pool in fleet.pools.items()} if fleet else {"": options}
        self._configs = {name: config_of(config, pool) for name, pool in fleet.pools.items()} if fleet else {}
        if fleet is not None:
            coordinator.run_length, coordinator.expected_s = fleet.run_length, fleet.expected_s
            coordinator.at_most_s = fleet.at_most_s
        self.events = events
        self.draining: str | None = None  # why no more leases are given
        self.leases_ahead = True  # whether a worker may hold a lease that it has not come to
        self.abandoned = False  # Ray answers no more: nothing is asked of it
        self._crew = Crew(actor_class, config, events.gone)
        self._outcomes = Outcomes(self._crew, coordinator, events, options.max_workers)
        if fleet is not None:
            self._outcomes.on_piece = fleet.observe_piece
        self.workers = self._crew.workers
        self.nodes = self._outcomes.nodes
        self.deaths = self._outcomes.deaths
        stated = {n: p.images_per_s for n, p in fleet.pools.items() if p.images_per_s} if fleet else {}
        self._demand = Demand(pools, stated)
        if fleet is not None:
            fleet.start_s = self._demand.start_s
        self._closing = False
        self._candidates: list[str] = []
        self._candidates_until = 0.0
        self._waiting_since: float | None = None

    @property
    def ready_workers(self) -> int:
        return sum(w.ready is not None for w in self.workers.values())

    def run(self) -> None:
        """Work until the coordinator is done, or until drained after `drain`; then collect every worker's last words.

        An exception that `JobEvents.tick` raises cuts the run off: nobody who is busy is waited for.

        Raises:
            DamagedError: the plan or a commit is not what was written.
            JobError: no node is left that can work.
        """
        try:
            try:
                while not self.coordinator.done:
                    if self.draining and not self.coordinator.active and not self._outcomes.committing:
                        break
                    self.turn(time.monotonic())
            except MillijouleError:
                self._collect_last_words()
                raise
            self._collect_last_words()
        finally:
            self._cut_off()

    def drain(self, reason: str) -> None:
        """Give no more leases; `run` returns when those that are out have ended."""
        self.draining = self.draining or reason

    def stand_down(self, reason: str) -> None:
        """Give no more leases, and have what is in hand sealed and handed back after the batch that is drawn, as of a preemption."""
        self.drain(reason)
        for worker in self.workers.values():
            if worker.held and worker.ready is not None:
                self._crew.take_back(worker)
                self._crew.leave(worker)

    def commit_refused(self, result: AttemptResult) -> None:
        """The other answer to `JobEvents.prepared`: it never stands, as a later run has begun."""
        self._outcomes.committing.pop(result.lease.attempt_id, None)
        self.coordinator.released(result.lease.attempt_id)

    def commit_stands(self, result: AttemptResult, standing: bytes) -> None:
        """The answer to `JobEvents.prepared`: the commit that now stands for the shard."""
        self._outcomes.committing.pop(result.lease.attempt_id, None)
        outcome = "committed" if standing == result.commit_json else "exists"
        self._outcomes.complete(AttemptResult(result.lease, outcome, standing), time.monotonic())

    # -- one turn of the loop ------------------------------------------------------------------------------------

    def turn(self, now: float) -> None:
        """One turn of the loop at `now`, monotonic seconds."""
        self._let_leave(now)
        self._resize(now)
        self._feed(now)
        self._look_after(now)
        self._notice_missing_capacity(now)

    def _look_after(self, now: float) -> None:
        for worker in self.workers.values():
            if worker.held and not worker.status_pending and now >= worker.next_status:
                worker.status_pending = True
                self._crew.expect(worker, "status", worker.actor.status.remote())
        for answer in self._crew.answers(TICK_S):
            self._outcomes.settle(*answer, time.monotonic())
        self._watch_deadlines(time.monotonic())
        for result in self.coordinator.take_void():
            self.events.discarded(result)
        self.events.tick()

    def _let_leave(self, now: float) -> None:
        """Workers on nodes that are being taken away seal what they have in hand, get nothing more and say their last words."""
        draining = self._outcomes.draining
        draining.look(now)
        for worker in list(self.workers.values()):
            if worker.node is None or (ends := draining.ends(worker.node.node_id)) is None:
                continue
            if not worker.leaving:
                worker.leaving = True
                left = f", in {ends - now:.0f} s" if ends < float("inf") else ""
                log.warning(
                    "worker %s leaves: its node %s is taken away%s",
                    *(worker.worker_id, worker.node.host, left),
                )
                self._crew.take_back(worker)
                self._crew.leave(worker)
            if not worker.held and not worker.stopping and worker.ready is None:
                # it spends until it is gone: of its counters somebody else has the last word
                self._crew.stop_loading(worker, now)
            elif not worker.held and not worker.stopping:
                self._crew.stop(worker, now)
            if not worker.called_off and now >= ends - LAST_WORDS_S:
                worker.called_off = True
                for lease in worker.leases:
                    self._crew.cancel(worker, lease)

    def _resize(self, now: float) -> None:
        """Ask for the workers the work is worth, and take back requests it no longer is worth."""
        if self.fleet is not None:
            # others take the place of those that leave
            self.fleet.look(self.coordinator, [w for w in self.workers.values() if not w.leaving], now)
        shunned = self._shunned(now)
        if shunned is not None:
            for worker in [w for w in self.workers.values() if w.node is None and w.away - shunned]:
                self._crew.remove(worker)  # it waits for other nodes, and may have this one now
        staying = [w for w in self.workers.values() if not w.leaving]
        if self.fleet is None:
            self._demand.look(self.coordinator, staying, now)
        else:
            targets, order = self.fleet.targets, self.fleet.order
            self._demand.look(self.coordinator, staying, now, targets=targets, order=order)
        members: dict[str, list[Worker]] = {name: [] for name in self._demand.pools}
        for worker in staying:
            members[worker.pool].append(worker)
        workers = len(staying)
        for name, own in members.items():
            workers += self._resize_pool(name, own, workers, now, shunned)

    def _resize_pool(
        self, name: str, own: list[Worker], workers: int, now: float, shunned: set[str] | None
    ) -> int:
        """The same for one pool, which has `own` of all `workers`; returns by how many they have changed."""
        draining, more = bool(self.draining), 0
        if shunned is not None and not draining and now >= self._outcomes.spawn_not_before:
            more = self._demand.more(len(own), workers, name)
            if more and self.fleet is not None:
                more = more if self.fleet.may_start(name, self._demand.start_s(name, len(own))) else 0
            for _ in range(more):
                config, ending = self._configs.get(name), self._outcomes.draining.now
                self._crew.spawn(now, shunned, self._demand.pools[name], name, config, ending)
            if more > 0:
                own = [w for w in self.workers.values() if w.pool == name and not w.leaving]
        surplus = self._demand.withdrawable(own, now, draining=draining, pool=name)
        for worker in surplus:
            self._crew.remove(worker)
        if surplus:
            log.info("workers still waiting for a node and no longer needed: %d taken back", len(surplus))
        return more - len(surplus)

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
            asked = self._demand.pools.values()
            found = (node.node_id for o in asked for node in nodes_for(o.asked, o.selectors))
            self._candidates = list(dict.fromkeys(found))
        if not self._candidates or set(self._candidates) - shunned:
            return shunned
        out = [n for n in self.nodes.out if n.node_id in self._candidates]
        at_work = any(w.node is not None for w in self.workers.values())
        if not at_work and len(out) == len(self._candidates):
            reasons = "\n".join(f"  {node}" for node in out)
            raise JobError(
                f"no node is left that can work:\n{reasons}\nNothing that was committed is lost: mend the cause and "
                "run the same command again"
            )
        return None

    def _feed(self, now: float) -> None:
        if self.draining or not self.leases_ahead:
            for worker in self.workers.values():
                self._crew.take_back(worker)
        if self.draining:
            return
        ready = [w for w in self.workers.values() if w.ready is not None and not w.stopping and not w.leaving]
        peers = {w.worker_id: w.last_node().node_id for w in ready}
        alone, waiting = self.options.max_workers == 1, 0
        coming = self._crew.coming_back if any(not w.held for w in ready) else 0
        for worker in ready:
            if worker.held:
                continue
            if self.fleet is not None and not self.fleet.may_lease(worker):
                if self._members(worker.pool) > self._demand.pools[worker.pool].min_workers:
                    self._crew.stop(worker, now)
                continue
            lease = self.coordinator.next_lease(worker.worker_id, now, peers, alone=alone)
            if lease is not None:
                self._crew.lease(worker, lease)
                worker.next_status = now + self._outcomes.status_period_s
                continue
            # what another worker has not come to yet is better done here
            if coming or any(self._crew.take_back(w) for w in ready):
                coming = max(0, coming - 1)
                continue
            if self.fleet is not None and self.fleet.waits_for_rests(worker, waiting):
                waiting += 1
                continue
            # of use are as many as have work, and one more that may help a straggler
            spare = 1 if self.coordinator.speculate and self.coordinator.remaining else 0
            staying = sum(not w.stopping for w in self.workers.values())
            if (
                self._members(worker.pool) > self._demand.pools[worker.pool].min_workers
                and staying > self.coordinator.useful_workers + spare
            ):
                self._crew.stop(worker, now)
        for worker in ready if self.fleet is not None else ():
            if len(worker.held) > 1 and self.fleet is not None and self.fleet.wants_back(worker):
                self._crew.take_back(worker)
        for worker in ready if self.leases_ahead else ():
            if len(worker.held) == 1 and not worker.stopping:
                if self.fleet is not None and not self.fleet.may_lease(worker):
                    continue
                (in_hand,) = worker.leases
                lease = self.coordinator.next_lease_ahead(in_hand, now, len(ready))
                if lease is not None:
                    self._crew.lease(worker, lease)

    def _members(self, pool: str) -> int:
        return sum(w.pool == pool and not w.stopping for w in self.workers.values())

    # -- clocks --------------------------------------------------------------------------------------------------

    def _watch_deadlines(self, now: float) -> None:
        late = self.coordinator.expired(now)
        by_attempt = {attempt_id: w for w in self.workers.values() for attempt_id in w.held} if late else {}
        for entry in late:
            attempt_id = entry.lease.attempt_id
            worker = by_attempt.get(attempt_id)
            if worker is None:
                if attempt_id not in self._outcomes.committing:
                    self.coordinator.released(attempt_id)
                continue
            if attempt_id not in worker.held:
                continue  # it was buried with the worker's other lease
            held = worker.held[attempt_id]
            held.late += 1
            if held.late > 1 or not entry.lease.writes:
                self._outcomes.bury(worker, TimeoutError("stood still; killed"), now)
            elif not self._closing:  # then nobody needs the shard, but what it has in hand may end by itself
                log.warning(
                    "worker %s on %s made no progress on shard %d for %.0f s; leasing the shard again",
                    *(worker.worker_id, worker.last_node().host, entry.shard_id, self.coordinator.lease_s),
                )
                self.coordinator.lease_again(attempt_id)
                self._crew.take_back(worker)  # what waits behind it
        for worker in list(self.workers.values()):
            if worker.starts_too_long(now, START_MOST_S):
                minutes = START_MOST_S / 60
                self._outcomes.bury(
                    worker, TimeoutError(f"no first image within {minutes:.0f} min; killed"), now
                )
            elif worker.stop_by is not None and now > worker.stop_by and not self._ends_by_itself(worker):
                waits = ": it still waits for storage, with what nobody needs" if worker.held else ""
                log.warning(
                    "worker %s on %s did not say its last words%s; killed",
                    *(worker.worker_id, worker.last_node().host, waits),
                )
                self._crew.remove(worker)

    def _ends_by_itself(self, worker: Worker) -> bool:
        """Whether what a worker has in hand ends some time: not where it alone cannot reach the storage that has all by now."""
        return bool(worker.held) and not (self._closing and worker.waits_for_store)

    def _notice_missing_capacity(self, now: float) -> None:
        if self.ready_workers or not self.workers:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > CAPACITY_NOTICE_S:
            self._waiting_since = now
            there = sum(w.node is not None for w in self.workers.values())
            if there:
                log.warning(
                    "waiting: workers there: %d, none has loaded its model and drawn its first image", there
                )
                return
            pools = {w.pool for w in self.workers.values()}
            for name in sorted(pools):
                n = sum(w.pool == name for w in self.workers.values())
                options = self._demand.pools[name]
                why = why_waiting(options)
                log.warning(
                    "waiting for the cluster: %d worker%s asked for (%s each%s), none running yet%s",
                    *(
                        n,
                        "s" if n > 1 else "",
                        words(options.asked),
                        f", pool {name}" if name else "",
                        f": {why}" if why else "",
                    ),
                )

    # -- the end -------------------------------------------------------------------------------------------------

    def _collect_last_words(self) -> None:
        """Let every worker end what it has in hand and close its books; each by itself, so that none costs another's."""
        self._closing = True
        now = time.monotonic()
        for worker in [w for w in self.workers.values() if not w.stopping]:
            if worker.ready is None:
                if worker.node is None:
                    self._crew.remove(worker)
                else:
                    self._crew.stop_loading(worker, now)
                continue
            for lease in worker.leases:
                self._crew.cancel(worker, lease)
            self._crew.stop(worker, now)
        while self.workers or self._outcomes.committing:
            now = time.monotonic()
            for worker in self.workers.values():
                if self._ends_by_itself(worker):
                    worker.stop_by = now + STOP_TIMEOUT_S  # counts from the end of what it has in hand
            self._look_after(now)

    def _cut_off(self) -> None:
        """End what still runs: nothing, after a normal end. Idle workers may say their last words."""
        if self.abandoned:
            return
        idle = [w for w in self.workers.values() if w.ready is not None and not w.held]
        try:
            calls = {worker.actor.stop.remote(): worker for worker in idle}
            done = ray.wait(list(calls), num_returns=len(calls), timeout=CUT_OFF_S)[0] if calls else []
            for call in done:
                try:
                    self.events.stopped(ray.get(call))
                    self._crew.remove(calls[call], last_words=True)
                except RayError as error:
                    log.warning("last words of %s were lost: %s", calls[call].worker_id, first_line(error))
        finally:
            for worker in list(self.workers.values()):
                self._crew.remove(worker)
            for result in self.coordinator.take_void(all_waiting=True):
                self.events.discarded(result)
