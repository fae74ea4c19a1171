"""The workers of one driver: Ray actors, and the calls to them that are out. What their answers mean is not decided here.

A worker leaves in one of two ways: with its last words, or as gone, so that somebody else closes its account of the devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import ray

from millijoule.pipeline.running.cluster import node_of
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.lease import Lease, Node, WorkerConfig

#: An idle worker's last words take a counter read; a worker that needs longer than this is as good as dead.
STOP_TIMEOUT_S = 30.0
#: One that still loads answers from another thread, as far as what it imports lets it.
LOADING_TIMEOUT_S = 3.0
#: A driver of so many workers or more waits, after a first answer, this long per worker for further ones: it takes them in few
#: turns of its loop, which looks at all workers, and not one by one. Nobody waits for it: who draws has a lease ahead.
MANY_WORKERS, GATHER_S = 50, 50e-6
#: Ray's label that holds a node's id.
NODE_ID_LABEL = "ray.io/node-id"


@dataclass(eq=False)
class HeldLease:
    """A lease in a worker's hands."""

    lease: Lease
    late: int = 0  # deadlines missed in a row
    asked_back: bool = False
    has_begun: bool = False  # by the worker's word, when it was asked for or how far it is


@dataclass(eq=False)
class Worker:
    """One actor. Times are seconds on the driver's monotonic clock."""

    worker_id: str
    actor: Any
    run: Any  # the actor's method, looked up once
    spawned: float
    away: frozenset[str]  # nodes it must not be placed on
    pool: str = ""
    node: Node | None = None  # None until it has said where it is
    placed: float | None = None  # when it did
    ready: Node | None = None  # None until its model is loaded
    held: dict[str, HeldLease] = field(default_factory=dict)  # by attempt id, in the order they were given
    next_status: float = 0.0
    status_pending: bool = False
    stop_by: float | None = None  # its last words were asked for, and are due then
    waits_for_store: bool = False  # by its last status: it repeats a request, for as long as it takes
    leaving: bool = False  # its node is being taken away
    called_off: bool = False  # what it has in hand is not waited for any more

    @property
    def stopping(self) -> bool:
        return self.stop_by is not None

    @property
    def leases(self) -> list[Lease]:
        """Those in hand, in the order they were given."""
        return [held.lease for held in self.held.values()]

    def starts_too_long(self, now: float, most_s: float) -> bool:
        """Whether it has had a node for longer than `most_s`, and no first image yet."""
        return (
            self.ready is None
            and not self.stopping
            and self.placed is not None
            and now - self.placed > most_s
        )

    def last_node(self) -> Node:
        """Where it is, or was, by its own word or else by Ray's."""
        return self.node or node_of(self.actor)


class Crew:
    """All workers there are, by id, in the order they were asked for.

    `gone` is called with the id of a worker that ended without last words.
    """

    def __init__(self, actor_class: Any, config: WorkerConfig, gone: Callable[[str], None]) -> None:
        self.actor_class = actor_class
        self.config = config
        self.workers: dict[str, Worker] = {}
        self._gone = gone
        self._calls: dict[Any, tuple[Worker, str, Lease | None]] = {}
        self._spawned = 0

    def spawn(
        self,
        now: float,
        shunned: Set[str],
        options: PoolOptions,
        pool: str = "",
        config: WorkerConfig | None = None,
        ending: Set[str] = frozenset(),
    ) -> None:
        """Ask for one more worker of a pool, on any node that suits it but those `shunned` and those that are `ending`."""
        self._spawned += 1
        worker_id = f"w{self.config.driver_epoch:04d}-{self._spawned:04d}"
        options = options.elsewhere(NODE_ID_LABEL, sorted(shunned | ending))
        actor = self.actor_class.options(name=None, **options.actor_options()).remote(
            worker_id, config or self.config
        )
        worker = Worker(worker_id, actor, actor.run.remote, now, frozenset(shunned), pool)
        self.workers[worker_id] = worker
        self.expect(worker, "locate", actor.locate.remote())
        self.expect(worker, "start", actor.start.remote())

    def expect(self, worker: Worker, what: str, call: Any, lease: Lease | None = None) -> None:
        """`call` is out, about `lease` if any; `answers` will give it back as `what`."""
        self._calls[call] = worker, what, lease

    def lease(self, worker: Worker, lease: Lease) -> None:
        """Put `lease` into the worker's hands."""
        worker.held[lease.attempt_id] = HeldLease(lease)
        self.expect(worker, "run", worker.run(lease), lease)

    def take_back(self, worker: Worker) -> bool:
        """Ask for a lease that the worker may not have come to yet: it then ends as cancelled. False where there is none.

        That is one behind the first; or the first, where its rows, or the parts there are of it, took longer to read.
        """
        first, behind = list(worker.held.values())[:1], list(worker.held.values())[1:]
        overtaken = first if any(held.has_begun for held in behind) else []
        for held in [*behind, *overtaken]:
            if not held.asked_back and not held.has_begun:
                held.asked_back = True
                call = worker.actor.give_back.remote(held.lease.attempt_id)
                self.expect(worker, "give_back", call, held.lease)
                return True
        return False

    @property
    def coming_back(self) -> int:
        """Leases that were asked for and may still come."""
        held = (h for worker in self.workers.values() for h in worker.held.values())
        return sum(h.asked_back and not h.has_begun for h in held)

    def cancel(self, worker: Worker, lease: Lease) -> None:
        """Tell the worker that nobody needs what it makes of `lease`."""
        worker.actor.cancel.remote(lease.attempt_id)

    def leave(self, worker: Worker) -> None:
        """Tell the worker that its node is taken away: it gives back what it has in hand, what it made sealed."""
        worker.actor.leave.remote()

    def answers(self, timeout_s: float) -> list[tuple[Worker, str, Lease | None, Any]]:
        """Calls that came back, each once: wait up to `timeout_s` for the first, and take what else is there."""
        calls = list(self._calls)
        if not calls:
            time.sleep(timeout_s / 4)
            return []
        ready, _ = ray.wait(calls, num_returns=1, timeout=timeout_s, fetch_local=False)
        if ready and len(calls) > 2:
            pause_s = min(timeout_s, len(self.workers) * GATHER_S) if len(self.workers) >= MANY_WORKERS else 0
            ready, _ = ray.wait(calls, num_returns=len(calls), timeout=pause_s, fetch_local=False)
        return [(*self._calls.pop(call), call) for call in ready]

    def stop(self, worker: Worker, now: float) -> None:
        """Ask for last words; they come once what the worker has in hand has ended."""
        worker.stop_by = now + STOP_TIMEOUT_S
        self.expect(worker, "stop", worker.actor.stop.remote())

    def stop_loading(self, worker: Worker, now: float) -> None:
        """Ask a worker that still loads what its own meter says, as its last words."""
        worker.stop_by = now + LOADING_TIMEOUT_S
        self.expect(worker, "loading", worker.actor.read_while_loading.remote())

    def remove(self, worker: Worker, *, last_words: bool = False) -> None:
        """End the worker's process and forget it and its calls; of no effect on one that is forgotten."""
        if self.workers.pop(worker.worker_id, None) is None:
            return
        for call in [call for call, (of, *_) in self._calls.items() if of is worker]:
            del self._calls[call]
        ray.kill(worker.actor)
        if not last_words:
            self._gone(worker.worker_id)
