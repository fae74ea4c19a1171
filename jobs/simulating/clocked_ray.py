"""What a driver uses of Ray, in one process and on a clock of its own, for thousands of actors.

`ClockedRay` stands where the driver's modules have `ray`, its `time` where they have `time`: time passes only where the
driver waits. Actors are plain objects; what a method returns is its answer, or `After` some seconds, or a `Promise` that
is kept later. Calls of an actor are begun at once: an actor that can do only one thing at a time keeps its own line.
Nodes have labels, and come as they are asked for (`Supply`). `cpu_s` is the processor time that the simulation itself took:
what a process used besides is the driver's.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, Protocol

from ray.exceptions import GetTimeoutError, RayActorError

#: Unix seconds at which the clock starts.
EPOCH_S = 1_700_000_000.0
#: A short call there and back within one region.
CALL_S = 2e-3
#: Answers that nobody looks at.
_UNHEARD = frozenset(("cancel",))


@dataclass(frozen=True, slots=True)
class After:
    """An answer that takes `seconds`; an exception is raised in the actor."""

    seconds: float
    answer: Any = None


class Promise:
    """An answer that the actor gives when it likes, with `keep`."""

    __slots__ = ("keep",)

    def __init__(self) -> None:
        self.keep: Callable[[Any], None] = lambda answer: None


class Supply(Protocol):
    """Where nodes come from.

    Methods:
        node_for: the node that an actor with these options gets, and seconds until it is there; None: none yet.
        released: an actor has left its node.
    """

    def node_for(self, options: Mapping[str, Any]) -> tuple[Any, float] | None: ...
    def released(self, node: Any) -> None: ...


@dataclass(eq=False)
class _Actor:
    actor_id: str
    options: dict[str, Any]
    args: tuple[Any, ...]
    node: Any = None
    instance: Any = None
    waiting: list[tuple[int, str, tuple[Any, ...]]] = field(default_factory=list)
    calls: set[int] = field(default_factory=set)  # without an answer
    is_dead: bool = False


def _metered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Its processor time is the simulation's, not the driver's."""

    @wraps(method)
    def call(self: ClockedRay, *args: Any, **options: Any) -> Any:
        began = time.thread_time()
        if self.driver_takes_time:
            self.now += began - self._left
        try:
            return method(self, *args, **options)
        finally:
            self._left = time.thread_time()
            self.cpu_s += self._left - began

    return call


class ActorId(str):
    __slots__ = ()

    def hex(self) -> str:
        return str(self)


class ActorHandle:
    """As Ray's: `handle.method.remote(...)`; `ray.call` takes the calls."""

    def __init__(self, ray: Any, actor_id: str) -> None:
        self._ray = ray
        self._actor_id = ActorId(actor_id)

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        ray, actor_id = self._ray, self._actor_id
        made = SimpleNamespace(remote=lambda *args: ray.call(actor_id, method, args))
        setattr(self, method, made)
        return made


class ActorClass:
    """As Ray's: `actor_class.options(...).remote(...)`; `ray.create` makes the actors."""

    def __init__(self, ray: Any, options: dict[str, Any] | None = None) -> None:
        self._ray = ray
        self._options = options or {}

    def options(self, **options: Any) -> ActorClass:
        return ActorClass(self._ray, options)

    def remote(self, *args: Any) -> ActorHandle:
        return self._ray.create(self._options, args)


class ClockedRay:
    """One cluster and its clock.

    Args:
        make: `(node, *arguments) -> actor`, called once the actor has a node.
        supply: where nodes come from.
        most_s: seconds of the clock after which a driver counts as hanging.
        driver_takes_time: the driver's own processor time passes on the clock, so that answers gather while it works, as
            they would; a run then does not repeat itself to the last event.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        supply: Supply,
        *,
        most_s: float = float("inf"),
        driver_takes_time: bool = False,
    ) -> None:
        self.make = make
        self.supply = supply
        self.most_s = most_s
        self.now = 0.0
        self.cpu_s = 0.0
        self.driver_takes_time = driver_takes_time
        self._left = time.thread_time()
        self._random = random.Random(0)
        self.n_calls: dict[str, int] = defaultdict(int)
        self.time = SimpleNamespace(
            monotonic=lambda: self.now, time=lambda: EPOCH_S + self.now, sleep=self.advance
        )
        self.actor_class = ActorClass(self)
        self._actors: dict[str, _Actor] = {}
        self._unplaced: dict[str, _Actor] = {}
        self._answers: dict[int, tuple[bool, Any]] = {}
        self._fresh: list[int] = []  # answered in this step
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count(1)

    def call_s(self) -> float:
        """Seconds of a short call there and back: no two answers arrive at the same time."""
        return CALL_S * (0.5 + self._random.random())

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._number), act))

    @_metered
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        until = self.now + seconds
        while self._step(until):
            self._fresh.clear()

    def lose_node(self, node: Any, *, preempted: bool) -> None:
        """The node and all actors on it are gone."""
        for actor in [a for a in self._actors.values() if a.node is node]:
            self._end(actor, "The node of the actor is gone", preempted=preempted)

    def end_worker(self, instance: Any) -> None:
        """The process of an actor ends."""
        actor = next((a for a in self._actors.values() if a.instance is instance), None)
        if actor is not None:
            self._end(actor, "The worker process has died")

    @property
    def has_requests(self) -> bool:
        """Whether actors wait for a node."""
        return bool(self._unplaced)

    def place(self) -> None:
        """Nodes may have come: give them to actors that wait."""
        for actor in list(self._unplaced.values()):
            self._place(actor)

    # -- Ray's own -----------------------------------------------------------------------------------------------

    @_metered
    def create(self, options: dict[str, Any], args: tuple[Any, ...]) -> ActorHandle:
        actor = _Actor(f"{next(self._number):032x}", options, args)
        self._actors[actor.actor_id] = self._unplaced[actor.actor_id] = actor
        self._place(actor)
        return ActorHandle(self, actor.actor_id)

    @_metered
    def call(self, actor_id: str, method: str, args: tuple[Any, ...]) -> int:
        ref = next(self._number)
        self.n_calls[method] += 1
        actor = self._actors.get(actor_id)
        if actor is None:
            self._answers[ref] = False, RayActorError(actor_id, "it is dead")
        elif actor.instance is None:
            actor.calls.add(ref)
            actor.waiting.append((ref, method, args))
        else:
            actor.calls.add(ref)
            self._begin(actor, ref, method, args)
        return ref

    @_metered
    def wait(
        self,
        refs: Sequence[int],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
        fetch_local: bool = True,
    ) -> tuple[list[int], list[int]]:
        answers = self._answers
        n_ready = sum(ref in answers for ref in refs)
        if n_ready < num_returns and timeout != 0:
            wanted, until = set(refs), self.now + (self.most_s if timeout is None else timeout)
            self._fresh.clear()
            while n_ready < num_returns and self._step(until):
                n_ready += sum(ref in wanted for ref in self._fresh)
                self._fresh.clear()
        ready = [ref for ref in refs if ref in answers][:num_returns]
        return ready, []  # the driver never asks which are not

    @_metered
    def get(self, ref: int, *, timeout: float | None = None) -> Any:
        if ref not in self._answers:
            until = self.now + (self.most_s if timeout is None else timeout)
            while ref not in self._answers and self._step(until):
                pass
            if ref not in self._answers:
                raise GetTimeoutError(f"not there after {timeout} s")
        ok, answer = self._answers.pop(ref)
        if not ok:
            raise answer
        return answer

    @_metered
    def kill(self, handle: ActorHandle) -> None:
        if (actor := self._actors.get(handle._actor_id)) is not None:
            self._end(actor, "it was killed")

    @_metered
    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"NodeID": n.node_id, "Alive": n.alive, "NodeManagerHostname": n.host, "Resources": n.resources}
            for n in self.supply.nodes  # type: ignore[attr-defined]
        ]

    @property
    def state(self) -> ClockedRay:
        """`ray._private.state` has an object of this name."""
        return self

    def get_draining_nodes(self) -> dict[str, int]:
        """As `ray._private.state.state`'s: simulated nodes go without notice."""
        return {}

    def actors(self, actor_id: str) -> dict[str, Any]:
        """As `ray._private.state.actors`: of actors that have a node, and raises for others."""
        return {"Address": {"NodeID": self._actors[actor_id].node.node_id}}

    # -- inside --------------------------------------------------------------------------------------------------

    def _step(self, until: float) -> bool:
        """Do what comes next, if it comes up to `until`; else the time is then `until`."""
        if self._events and self._events[0][0] <= until:
            at, _, act = heapq.heappop(self._events)
            self.now = max(self.now, at)
            act()
            return True
        self.now = max(self.now, until)
        if self.now > self.most_s:
            raise TimeoutError(f"the driver is not done after {self.most_s:g} s of the simulated clock")
        return False

    def _place(self, actor: _Actor) -> None:
        found = self.supply.node_for(actor.options)
        if found is None:
            return
        node, delay_s = found
        del self._unplaced[actor.actor_id]

        def arrive() -> None:
            if actor.is_dead:
                self.supply.released(node)
                return
            actor.node, actor.instance = node, self.make(node, *actor.args)
            for ref, method, args in actor.waiting:
                self._begin(actor, ref, method, args)
            actor.waiting.clear()

        if delay_s > 0:
            self.at(delay_s, arrive)
        else:
            arrive()

    def _begin(self, actor: _Actor, ref: int, method: str, args: tuple[Any, ...]) -> None:
        if actor.is_dead:
            return
        answer = getattr(actor.instance, method)(*args)
        if method in _UNHEARD:
            actor.calls.discard(ref)
        elif isinstance(answer, Promise):
            answer.keep = lambda kept: self._finish(actor, ref, kept)
        elif isinstance(answer, After):
            self.at(answer.seconds, lambda: self._finish(actor, ref, answer.answer))
        else:
            self._finish(actor, ref, answer)

    def _finish(self, actor: _Actor, ref: int, answer: Any) -> None:
        if actor.is_dead or ref not in actor.calls:
            return
        actor.calls.discard(ref)
        self._answers[ref] = not isinstance(answer, Exception), answer
        self._fresh.append(ref)

    def _end(self, actor: _Actor, reason: str, *, preempted: bool = False) -> None:
        actor.is_dead = True
        del self._actors[actor.actor_id]
        self._unplaced.pop(actor.actor_id, None)
        error = RayActorError(actor.actor_id, f"{reason}: {actor.actor_id[-8:]}", preempted=preempted)
        for ref in actor.calls:
            self._answers[ref] = False, error
            self._fresh.append(ref)
        if actor.instance is not None:
            actor.instance.ended()
            self.supply.released(actor.node)


def install(put: Callable[[Any, str, Any], None], ray: Any, time: Any = None) -> None:
    """Let the driver's modules use `ray`, and `time` if given: `put` is `setattr`, or a monkeypatch's."""
    from millijoule.pipeline.running import (
        accounts,
        cluster,
        crew,
        node_recorders,
        outcomes,
        pool,
        preemption,
        run,
    )

    for module in (accounts, cluster, crew, node_recorders, outcomes, pool, preemption, run):
        for name, stand_in in (("ray", ray), ("ray_state", ray), ("time", time)):
            if hasattr(module, name) and stand_in is not None:
                put(module, name, stand_in)
    put(preemption, "in_background", lambda ask: ask())  # a stand-in answers at once


@contextmanager
def installed(ray: ClockedRay, record_writer: Any) -> Iterator[None]:
    """The driver's modules use `ray`, its clock, and `record_writer` in the place of `RecordWriter`, within the block."""
    from millijoule.pipeline.running import run

    before: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, stand_in: Any) -> None:
        before.append((module, name, getattr(module, name)))
        setattr(module, name, stand_in)

    put(run, "RecordWriter", record_writer)
    install(put, ray, ray.time)
    try:
        yield
    finally:
        for module, name, own in before:
            setattr(module, name, own)
