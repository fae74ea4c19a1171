"""Ray in one process and on a clock of its own: what a driver uses of Ray, for tests of every transition in milliseconds.

`RayStandIn` stands for the `ray` module wherever `install` (of `jobs.simulating.clocked_ray`, its simpler sister for fleets) puts
it, and its `time` for the `time` module: time passes only where the driver waits. Actors are plain objects made where their node is known; what a method returns is its answer, which
may be `After` some seconds, or never, or the actor `Dies` of the call. As in Ray, calls of one concurrency group are begun in
order, as many at once as it has threads, calls to an actor without a node wait, calls to a dead one fail with `RayActorError`. No process, no thread.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError

from millijoule.jobs.simulating.clocked_ray import EPOCH_S, ActorClass, ActorHandle, After
from millijoule.workers.lease import MAX_LEASES

#: Concurrency groups of a worker, and the threads of each: as `workers.actor` asks Ray for them.
GROUPS = {"work": MAX_LEASES, "status": 1}

#: A driver that waits longer, seconds of the clock, hangs.
PATIENCE_S = 3_000.0


@dataclass(frozen=True)
class Dies(After):
    """The actor's process ends in the call instead."""

    preempted: bool = False
    no_memory: bool = False


NEVER = After(float("inf"))


class Deferred:
    """An answer that the actor gives when it likes, with `settle`: what its method would have returned."""

    def __init__(self) -> None:
        self._answer: Any = None
        self._take: Callable[[Any], None] | None = None

    def settle(self, answer: Any) -> None:
        self._answer = answer
        if self._take is not None:
            self._take(answer)

    def then(self, take: Callable[[Any], None]) -> None:
        self._take = take
        if self._answer is not None:
            take(self._answer)


def shunned_nodes(options: dict[str, Any]) -> list[str]:
    """Ids of the nodes that an actor class's `options` keep away from."""
    (selector,) = (options.get("label_selector") or {}).values() or ("!in()",)
    return selector.removeprefix("!in(").removesuffix(")").split(",")


def task_error(error: Exception) -> Exception:
    """How Ray hands on what a method raised."""
    return RayTaskError("method", str(error), error, proctitle="actor", ip="?").as_instanceof_cause()


@dataclass(eq=False)
class StandInNode:
    node_id: str
    host: str
    resources: dict[str, float]
    alive: bool = True
    drained: float | None = None  # when it is due to end, on the clock
    preempted: bool = False
    used: dict[str, float] = field(default_factory=dict)

    def has_room(self, asked: dict[str, float]) -> bool:
        return all(self.used.get(n, 0) + a <= self.resources.get(n, 0) for n, a in asked.items() if a)

    def take(self, asked: dict[str, float], sign: int = 1) -> None:
        for name, amount in asked.items():
            self.used[name] = self.used.get(name, 0) + sign * amount


@dataclass(eq=False)
class _Actor:
    actor_id: str
    name: str
    options: dict[str, Any]
    args: tuple
    node: StandInNode | None = None
    instance: Any = None
    waiting: list[tuple[str, str, tuple]] = field(default_factory=list)  # call id, method, arguments
    busy: Counter[str] = field(default_factory=Counter)  # calls at work by concurrency group
    calls: set[str] = field(default_factory=set)  # without an answer
    death: RayActorError | OutOfMemoryError | None = None

    @property
    def asked(self) -> dict[str, float]:
        options = self.options
        return {
            "CPU": options.get("num_cpus") or 0.0,
            "GPU": options.get("num_gpus") or 0.0,
            **(options.get("resources") or {}),
        }


class RayStandIn:
    """One cluster and its clock.

    Args:
        make: `(node, *arguments) -> actor`, called once the actor has a node.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.now = 0.0
        self.time = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: EPOCH_S + self.now, sleep=self.advance
        )
        self.hears_late = (
            False  # actors are put on draining nodes, too: their schedulers have not heard of it
        )
        self.actor_class = ActorClass(self)
        self.asked_for: list[str] = []  # names of all actors there ever were
        self._nodes: list[StandInNode] = []
        self._actors: dict[str, _Actor] = {}
        self._answers: dict[str, tuple[bool, Any]] = {}
        self._owner: dict[str, _Actor] = {}  # by call id
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0

    # -- for tests -----------------------------------------------------------------------------------------------

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        self._counter += 1
        heapq.heappush(self._events, (self.now + delay_s, self._counter, act))

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self._step(until):
            pass

    def add_node(self, host: str, **resources: float) -> StandInNode:
        node = StandInNode(f"{len(self._nodes) + 1:056x}", host, resources or {"CPU": 1.0})
        self._nodes.append(node)
        self._place()
        return node

    def drain_node(self, node: StandInNode, within_s: float) -> None:
        """The node gets no more actors, and is gone after `within_s`, or when it has none: as of a preemption."""
        node.drained = self.now + within_s
        self.at(within_s, lambda: self.lose_node(node, preempted=True))

    def get_draining_nodes(self) -> dict[str, int]:
        """As `ray._private.state.state.get_draining_nodes`."""
        return {
            n.node_id: int(1000 * (EPOCH_S + n.drained))
            for n in self._nodes
            if n.alive and n.drained is not None
        }

    @property
    def state(self) -> RayStandIn:
        """`ray._private.state` has an object of this name."""
        return self

    def lose_node(self, node: StandInNode, *, preempted: bool = False) -> None:
        """The node and all actors on it are gone."""
        node.alive = False
        node.preempted = preempted
        for actor in [a for a in self._actors.values() if a.node is node]:
            self._end(actor, "The node of the actor is gone", preempted=preempted)

    def die(self, name: str) -> None:
        """The process of an actor ends."""
        self._end(next(a for a in self._actors.values() if a.name == name), "The worker process has died")

    @property
    def running(self) -> list[str]:
        """Names of the actors that have a node."""
        return [a.name for a in self._actors.values() if a.node is not None]

    @property
    def requests(self) -> list[str]:
        """Names of the actors that wait for a node, which is what an autoscaler sees."""
        return [a.name for a in self._actors.values() if a.node is None]

    # -- Ray's own -----------------------------------------------------------------------------------------------

    def create(self, options: dict[str, Any], args: tuple) -> ActorHandle:
        self._counter += 1
        actor = _Actor(f"{self._counter:032x}", str(args[0]), options, args)
        self._actors[actor.actor_id] = actor
        self.asked_for.append(actor.name)
        self._place()
        return ActorHandle(self, actor.actor_id)

    def call(self, actor_id: str, method: str, args: tuple) -> str:
        self._counter += 1
        call_id = f"call-{self._counter}"
        actor = self._actors.get(str(actor_id))
        if actor is None:
            self._answers[call_id] = False, RayActorError(str(actor_id), "it is dead")
            return call_id
        self._owner[call_id] = actor
        actor.calls.add(call_id)
        actor.waiting.append((call_id, method, args))
        self._serve(actor)
        return call_id

    def wait(
        self,
        refs: Sequence[str],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
        fetch_local: bool = True,
    ) -> tuple[list[str], list[str]]:
        assert len(set(refs)) == len(refs) >= num_returns > 0, "as Ray demands"
        until = self.now + (timeout if timeout is not None else PATIENCE_S)
        while sum(r in self._answers for r in refs) < num_returns and self._step(until):
            pass
        ready = [r for r in refs if r in self._answers][:num_returns]
        return ready, [r for r in refs if r not in ready]

    def get(self, ref: str, *, timeout: float | None = None) -> Any:
        if not self.wait([ref], timeout=timeout)[0]:
            raise GetTimeoutError(f"not there after {timeout} s")
        ok, answer = self._answers[ref]
        if not ok:
            raise answer
        return answer

    def kill(self, handle: ActorHandle) -> None:
        if actor := self._actors.get(str(handle._actor_id)):
            self._end(actor, "it was killed")

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": n.node_id,
                "Alive": n.alive,
                "NodeManagerHostname": n.host,
                "NodeManagerAddress": n.host,
                "Resources": dict(n.resources),
                "DeathReason": 3 if n.preempted else 0,
            }
            for n in self._nodes
        ]

    def actors(self, actor_id: str) -> dict[str, Any]:
        """As `ray._private.state.actors`: of living actors, and raises for others."""
        node = self._actors[actor_id].node
        assert node is not None
        return {"Address": {"NodeID": node.node_id}}

    def cluster_resources(self) -> dict[str, float]:
        alive = [n.resources for n in self._nodes if n.alive]
        return {name: sum(r.get(name, 0.0) for r in alive) for r in alive for name in r}

    def is_initialized(self) -> bool:
        return True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="127.0.0.1:1")

    # -- inside --------------------------------------------------------------------------------------------------

    def _step(self, until: float) -> bool:
        """Do what comes next, if it comes up to `until`; else the time is then `until`."""
        if self._events and self._events[0][0] <= until:
            at, _, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            act()
            return True
        self.now = max(self.now, until)
        assert self.now < PATIENCE_S, "the driver hangs"
        return False

    def _place(self) -> None:
        for actor in [a for a in self._actors.values() if a.node is None]:
            strategy, shunned = actor.options.get("scheduling_strategy"), shunned_nodes(actor.options)
            for node in self._nodes:
                pinned = strategy is None or strategy.node_id == node.node_id
                if (
                    pinned
                    and node.alive
                    and (node.drained is None or self.hears_late)
                    and node.node_id not in shunned
                    and node.has_room(actor.asked)
                ):
                    node.take(actor.asked)
                    actor.node, actor.instance = node, self.make(node, *actor.args)
                    self._serve(actor)
                    break

    def _serve(self, actor: _Actor) -> None:
        if actor.instance is None:
            return
        for call in list(actor.waiting):
            call_id, method, args = call
            group = getattr(getattr(actor.instance, method), "__ray_concurrency_group__", "work")
            if actor.busy[group] >= GROUPS[group] or call not in actor.waiting:
                continue
            actor.waiting.remove(call)
            actor.busy[group] += 1
            try:
                answer = getattr(actor.instance, method)(*args)
            except Exception as error:
                answer = After(0.0, error)
            if isinstance(answer, Deferred):
                answer.then(lambda a, c=call_id, g=group: self._answer(actor, c, g, a))
            else:
                self._answer(actor, call_id, group, answer)

    def _answer(self, actor: _Actor, call_id: str, group: str, answer: Any) -> None:
        if not isinstance(answer, After):
            answer = After(0.0, answer)
        if answer.seconds <= 0:
            self._finish(actor, call_id, group, answer)
        elif answer is not NEVER:
            self.at(answer.seconds, lambda: self._finish(actor, call_id, group, answer))

    def _finish(self, actor: _Actor, call_id: str, group: str, answer: After) -> None:
        if actor.death is not None:
            return
        if isinstance(answer, Dies):
            self._end(
                actor, "The worker process has died", preempted=answer.preempted, no_memory=answer.no_memory
            )
            return
        failed = isinstance(answer.answer, Exception)
        self._answers[call_id] = (False, task_error(answer.answer)) if failed else (True, answer.answer)
        actor.calls.discard(call_id)
        actor.busy[group] -= 1
        self._serve(actor)

    def _end(self, actor: _Actor, reason: str, *, preempted: bool = False, no_memory: bool = False) -> None:
        if actor.death is not None:
            return
        words = f"{reason}: {actor.actor_id[:8]}"
        actor.death = (
            OutOfMemoryError(f"{words}, the node was running low on memory")
            if no_memory
            else RayActorError(actor.actor_id, words, preempted=preempted)
        )
        del self._actors[actor.actor_id]
        if actor.node is not None:
            actor.node.take(actor.asked, -1)
        for call_id in actor.calls:
            self._answers[call_id] = False, actor.death
        self._place()
