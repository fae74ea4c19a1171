"""A cluster of forked processes in Ray's place, for thousands of real kills a minute: the part of Ray that a job uses.

`Cluster` is head and raylets in one process without threads: it forks drivers and actors, carries calls and answers between
them as bytes, gives boards and CPUs, notices who is gone and tells the driver a moment later, and ends the actors of a
driver that is gone. `ForkedRay` is what a driver has for `ray`, `ActorContext` what an actor has. Like Ray's, a request
to kill returns before the process has ended, calls of one concurrency group are begun in order, and a call to a dead actor
fails with `RayActorError`. What a process does at its end is up to the kernel: no process is told.
"""

from __future__ import annotations

import heapq
import os
import pickle
import queue
import random
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError
from support.ray_stand_in import GROUPS, shunned_nodes, task_error

from millijoule.jobs.simulating.clocked_ray import ActorClass, ActorHandle

#: A worker's process has ended, and its driver knows; an actor has a place, and a process: not at the same moment.
NOTICE_MOST_S = 0.05
SPAWN_MOST_S = 0.03


@dataclass(eq=False)
class Node:
    """`folder` is its host's, see `support.boards`; a host that is started anew is a new node with another `boot_id`."""

    host: str
    folder: Path
    boot_id: str
    boards: tuple[str, ...]
    cpus: float
    node_id: str = field(default_factory=lambda: os.urandom(28).hex())
    alive: bool = True
    draining: bool = False
    preempted: bool = False
    due_ms: int | None = None  # when a draining one is to end, on the wall clock
    used_gpus: dict[str, float] = field(default_factory=dict)
    used_cpus: float = 0.0


@dataclass(eq=False)
class Actor:
    actor_id: str
    name: str  # its first argument
    driver: Driver
    options: dict[str, Any]
    arguments: bytes
    node: Node | None = None
    board: str | None = None
    pid: int = 0
    conn: Connection | None = None
    waiting: list[tuple] = field(default_factory=list)  # calls before it has a place
    gone: bool = False

    @property
    def share(self) -> float:
        return self.options.get("num_gpus") or 0.0


@dataclass(eq=False)
class Driver:
    pid: int
    conn: Connection
    returncode: int | None = None


class Cluster:
    """One cluster and its clock. `actor_main` is called in an actor's process: it makes the actor.

    Args:
        rng: of all delays.
        actor_main: `(context, arguments) -> actor`.
        owner_most_s: the actors of a driver that is gone live on for up to so long.
        kill_most_s: so does an actor that is to be killed.
    """

    def __init__(
        self,
        rng: random.Random,
        actor_main: Callable[[ActorContext, tuple], Any],
        owner_most_s: float,
        kill_most_s: float,
    ) -> None:
        self.rng = rng
        self.actor_main = actor_main
        self.owner_most_s = owner_most_s
        self.kill_most_s = kill_most_s
        self.nodes: list[Node] = []
        self.actors: dict[str, Actor] = {}
        self.drivers: list[Driver] = []
        self.names: dict[int, str] = {}  # of every actor there ever was, by pid
        self._hosts: dict[int, Path] = {}
        self._taken_for_memory: set[int] = set()
        self._lost: list[Connection | None] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0

    # -- for tests -----------------------------------------------------------------------------------------------

    def at(self, delay_s: float, act: Callable[[], None]) -> None:
        """Do something later."""
        self._counter += 1
        heapq.heappush(self._events, (time.monotonic() + delay_s, self._counter, act))

    def add_node(self, node: Node) -> Node:
        self.nodes.append(node)
        self._tell_nodes()
        return node

    def lose_node(self, node: Node, linger_s: float = 0.0) -> None:
        """The node is gone for the cluster; its processes live on for `linger_s`, as those of a dead raylet do."""
        if not node.alive:
            return
        node.alive = False
        self._tell_nodes()
        for actor in [a for a in self.actors.values() if a.node is node]:
            self._lost.append(actor.conn)  # open, so that its process does not notice
            actor.conn = None
            self._forget(actor, "The node of the actor is gone", preempted=node.preempted)
            self.at(linger_s, lambda pid=actor.pid: _kill(pid))

    def drain(self, node: Node, seconds: float) -> None:
        """The node is to be taken away, its driver hears of it, and so it is."""
        node.draining = node.preempted = True
        node.due_ms = round((time.time() + seconds) * 1000)
        self._tell_nodes()
        self.at(seconds, lambda: self.lose_node(node))

    def take_for_memory(self, pid: int) -> None:
        """As Ray's memory monitor ends a worker where a node's memory is full."""
        self._taken_for_memory.add(pid)
        _kill(pid)

    def end_processes(self, folder: Path) -> None:
        """Nothing on the host of `folder` runs any more."""
        for pid in [pid for pid, on in self._hosts.items() if on == folder]:
            try:
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    _kill(pid)
                    os.waitpid(pid, 0)
            except ChildProcessError:
                pass  # it had ended before

    def kill_worker(self, node: Node | None = None) -> None:
        """SIGKILL to any worker's process."""
        pids = [a.pid for a in self.actors.values() if a.pid and a.name[0] == "w" and node in (None, a.node)]
        if pids:
            _kill(self.rng.choice(sorted(pids)))

    def start_driver(self, main: Callable[[ForkedRay], int]) -> Driver:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ours.close()
                code = main(ForkedRay(theirs))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        theirs.close()
        driver = Driver(pid, ours)
        self.drivers.append(driver)
        self._send(ours, ("nodes", self._node_table()))
        return driver

    def run(self, driver: Driver, timeout_s: float) -> bool:
        """Until `driver` has ended; False: it had to be killed."""
        deadline = time.monotonic() + timeout_s
        while driver.returncode is None:
            if time.monotonic() > deadline:
                os.kill(driver.pid, signal.SIGKILL)
                self._driver_ended(
                    driver
                )  # its workers end, too: whoever waits for that need not wait for ever
                return False
            self.turn()
        return True

    def turn(self) -> None:
        """Carry what there is to carry, and look at the clock."""
        now = time.monotonic()
        while self._events and self._events[0][0] <= now:
            heapq.heappop(self._events)[2]()
        self._place()
        conns: dict[Connection, Driver | Actor] = {d.conn: d for d in self.drivers if d.returncode is None}
        conns |= {a.conn: a for a in self.actors.values() if a.conn is not None}
        until = self._events[0][0] - now if self._events else 0.05
        for conn in wait(list(conns), min(0.05, max(0.0, until))):
            self._receive(conns[conn])

    def close(self) -> None:
        """End every process that was started here, also one whose end was still to come, and take leave of it."""
        for pid in [*self.names, *(d.pid for d in self.drivers)]:
            try:
                if (
                    os.waitpid(pid, os.WNOHANG)[0] == 0
                ):  # ours, and not ended: no other process can have its id
                    _kill(pid)
            except ChildProcessError:
                pass
        try:
            while True:
                os.waitpid(-1, 0)
        except ChildProcessError:
            pass

    # -- inside --------------------------------------------------------------------------------------------------

    def _receive(self, peer: Driver | Actor) -> None:
        assert peer.conn is not None
        try:
            message = peer.conn.recv()
        except (EOFError, OSError):
            if isinstance(peer, Driver):
                self._driver_ended(peer)
            else:
                self._actor_ended(peer)
            return
        if isinstance(peer, Actor):
            self._send(peer.driver.conn, message)
        elif message[0] == "create":
            _, actor_id, name, options, arguments = message
            actor = Actor(actor_id, name, peer, options, arguments)
            self.actors[actor_id] = actor
            actor.waiting = []
        elif message[0] == "call":
            actor = self.actors.get(message[1])
            if actor is None:
                self._send(peer.conn, ("died", message[1], "it is dead", False, False))
            elif actor.conn is None:
                actor.waiting.append(message[2:])
            else:
                self._send(actor.conn, message[2:])
        else:  # kill
            actor = self.actors.get(message[1])
            if actor is not None:
                if actor.pid:
                    self.at(self.rng.uniform(0, self.kill_most_s), lambda: _kill(actor.pid))
                else:
                    del self.actors[actor.actor_id]

    def _driver_ended(self, driver: Driver) -> None:
        _, status = os.waitpid(driver.pid, 0)
        driver.returncode = os.waitstatus_to_exitcode(status)
        driver.conn.close()
        for actor in [a for a in self.actors.values() if a.driver is driver]:
            if actor.pid:
                self.at(self.rng.uniform(0.5, 1.0) * self.owner_most_s, lambda pid=actor.pid: _kill(pid))
            else:
                del self.actors[actor.actor_id]

    def _actor_ended(self, actor: Actor) -> None:
        self._forget(actor, "The worker process has died", preempted=False)

    def _forget(self, actor: Actor, reason: str, *, preempted: bool) -> None:
        if actor.gone:
            return
        actor.gone = True
        if actor.conn is not None:
            actor.conn.close()
        self.actors.pop(actor.actor_id, None)
        node = actor.node
        if node is not None:
            node.used_cpus -= actor.options.get("num_cpus") or 0.0
            if actor.board is not None:
                node.used_gpus[actor.board] -= actor.share
        message = ("died", actor.actor_id, reason, preempted, actor.pid in self._taken_for_memory)
        self.at(self.rng.uniform(0, NOTICE_MOST_S), lambda: self._send(actor.driver.conn, message))
        self._reap()

    def _reap(self) -> None:
        drivers = {d.pid for d in self.drivers if d.returncode is None}
        for pid in self.names.keys() - drivers:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass

    def _place(self) -> None:
        for actor in list(self.actors.values()):
            if actor.node is None and actor.driver.returncode is None:
                self._place_one(actor)

    def _place_one(self, actor: Actor) -> None:
        options = actor.options
        pinned = options.get("node_id")
        if pinned and not any(n.alive and n.node_id == pinned for n in self.nodes):
            self._forget(actor, "The node it was to be on is gone", preempted=False)
            return
        nodes = [n for n in self.nodes if n.alive and pinned in (None, n.node_id)]
        nodes = [n for n in nodes if n.node_id not in options["shunned"] and (pinned or not n.draining)]
        self.rng.shuffle(nodes)
        cpus = options.get("num_cpus") or 0.0
        for node in nodes:
            if node.used_cpus + cpus > node.cpus:
                continue
            board = None
            if actor.share:
                free = [b for b in node.boards if node.used_gpus.get(b, 0.0) + actor.share <= 1.0]
                if not free:
                    continue
                board = self.rng.choice(free)
                node.used_gpus[board] = node.used_gpus.get(board, 0.0) + actor.share
            node.used_cpus += cpus
            actor.node, actor.board = node, board
            self._send(actor.driver.conn, ("placed", actor.actor_id, node.node_id))
            self.at(self.rng.uniform(0, SPAWN_MOST_S), lambda: self._spawn(actor))
            return

    def _spawn(self, actor: Actor) -> None:
        if actor.gone or actor.actor_id not in self.actors or actor.driver.returncode is not None:
            self._forget(actor, "It was not needed any more", preempted=False)
            return
        assert actor.node is not None
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                _serve(self.actor_main, ActorContext(actor.node, actor.board), actor.arguments, theirs)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        actor.pid, actor.conn = pid, ours
        self.names[pid] = actor.name
        self._hosts[pid] = actor.node.folder
        for call in actor.waiting:
            self._send(ours, call)
        actor.waiting = []

    def _node_table(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": n.node_id,
                "Alive": n.alive,
                "NodeManagerHostname": n.host,
                "NodeManagerAddress": n.host,
                "Resources": {"CPU": n.cpus, "GPU": float(len(n.boards))},
                "DueMs": n.due_ms,
            }
            for n in self.nodes
        ]

    def _tell_nodes(self) -> None:
        for driver in self.drivers:
            if driver.returncode is None:
                self._send(driver.conn, ("nodes", self._node_table()))

    def _send(self, conn: Connection, message: tuple) -> None:
        try:
            conn.send(message)
        except OSError:  # the other end is gone: that is noticed when it is read
            pass


def _kill(pid: int) -> None:
    try:
        if pid:
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


# -- in an actor's process --------------------------------------------------------------------------------------------


@dataclass
class ActorContext:
    """What stands for `ray` in an actor: its node, and the board it was given."""

    node: Node
    board: str | None

    def get_runtime_context(self) -> ActorContext:
        return self

    def get_node_id(self) -> str:
        return self.node.node_id

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": [self.board] if self.board is not None else []}


def _serve(
    main: Callable[[ActorContext, tuple], Any], context: ActorContext, arguments: bytes, conn: Connection
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = context.board or ""
    actor = main(context, pickle.loads(arguments))
    lock = threading.Lock()
    queues: dict[str, queue.SimpleQueue] = {group: queue.SimpleQueue() for group in GROUPS}

    def work(calls: queue.SimpleQueue) -> None:
        while True:
            call_id, method, payload = calls.get()
            ok = True
            try:
                answer = getattr(actor, method)(*pickle.loads(payload))
            except Exception as error:
                ok, answer = False, error
            with lock:
                conn.send(("result", call_id, ok, pickle.dumps(answer)))

    for group, threads in GROUPS.items():
        for _ in range(threads):
            threading.Thread(target=work, args=(queues[group],), daemon=True).start()
    while True:
        call = conn.recv()
        group = getattr(getattr(type(actor), call[1]), "__ray_concurrency_group__", "work")
        queues[group].put(call)


# -- in a driver's process --------------------------------------------------------------------------------------------


class ForkedRay:
    """What stands for the `ray` module in a driver; belongs to the thread that runs the job's loop."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._nodes: list[dict[str, Any]] = []
        self._placed: dict[str, str] = {}
        self._died: dict[str, RayError] = {}
        self._results: dict[str, tuple[bool, bytes]] = {}
        self._calls: dict[str, str] = {}  # actor id by call id
        self.actor_class = ActorClass(self)

    def create(self, options: dict[str, Any], args: tuple) -> ActorHandle:
        actor_id = uuid.uuid4().hex
        strategy = options.get("scheduling_strategy")
        asked = {
            "num_cpus": options.get("num_cpus"),
            "num_gpus": options.get("num_gpus"),
            "node_id": strategy.node_id if strategy is not None else None,
            "shunned": shunned_nodes(options),
        }
        self._conn.send(("create", actor_id, str(args[0]), asked, pickle.dumps(args)))
        return ActorHandle(self, actor_id)

    def call(self, actor_id: str, method: str, args: tuple) -> str:
        call_id = uuid.uuid4().hex
        self._calls[call_id] = str(actor_id)
        if str(actor_id) not in self._died:
            self._conn.send(("call", str(actor_id), call_id, method, pickle.dumps(args)))
        return call_id

    def wait(
        self,
        refs: Sequence[str],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
        fetch_local: bool = True,
    ):
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._pump()
            ready = [r for r in refs if self._is_ready(r)]
            left = None if deadline is None else deadline - time.monotonic()
            if len(ready) >= num_returns or (left is not None and left <= 0):
                ready = ready[:num_returns]
                return ready, [r for r in refs if r not in ready]
            self._conn.poll(left)

    def get(self, ref: str, *, timeout: float | None = None) -> Any:
        if not self.wait([ref], timeout=timeout)[0]:
            raise GetTimeoutError(f"not there after {timeout} s")
        if ref not in self._results:
            raise self._died[self._calls[ref]]
        ok, payload = self._results[ref]
        value = pickle.loads(payload)
        if ok:
            return value
        raise task_error(value)

    def kill(self, actor: ActorHandle) -> None:
        self._conn.send(("kill", str(actor._actor_id)))

    def nodes(self) -> list[dict[str, Any]]:
        self._pump()
        return self._nodes

    def actors(self, actor_id: str) -> dict[str, Any]:
        """As `ray._private.state.actors`."""
        self._pump()
        return {"Address": {"NodeID": self._placed[actor_id]}}

    @property
    def state(self) -> ForkedRay:
        """As `ray._private.state.state`."""
        return self

    def get_draining_nodes(self) -> dict[str, int]:
        self._pump()
        return {n["NodeID"]: n["DueMs"] for n in self._nodes if n["Alive"] and n["DueMs"] is not None}

    def _is_ready(self, ref: str) -> bool:
        return ref in self._results or self._calls.get(ref) in self._died

    def _pump(self) -> None:
        while self._conn.poll(0):
            message = self._conn.recv()
            if message[0] == "result":
                self._results[message[1]] = message[2:]
            elif message[0] == "placed":
                self._placed[message[1]] = message[2]
            elif message[0] == "nodes":
                self._nodes = message[1]
            else:
                _, actor_id, reason, preempted, no_memory = message
                words = f"{reason}: {actor_id[:8]}"
                error = (
                    OutOfMemoryError(words)
                    if no_memory
                    else RayActorError(actor_id, words, preempted=preempted)
                )
                self._died.setdefault(actor_id, error)
