"""A recorder of the node's own meter on every node where workers run, for as long as they do.

The driver's loop calls `tick` with the nodes that have workers: it starts a recorder on each that has a meter, takes
what the recorders read, and ends those whose node has no worker any more, so that an autoscaler can have it.
Nothing here waits, and nothing that fails here reaches the job: what cannot be read is missing, with a reason that is
said once and stands in the table.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from millijoule.pipeline.energy.node_readings import MeteredNode
from millijoule.pipeline.running.cluster import first_line, living_nodes
from millijoule.workers.lease import Node
from millijoule.workers.node_meters.actor import NodeRecorderReady, remote_node_recorder
from millijoule.workers.node_meters.config import NodeMeterConfig, find_node_meter
from millijoule.workers.node_meters.meter import MAX_MISSED_PERIODS, NodeFailure, NodeReading

log = logging.getLogger(__name__)

#: Between two looks at workers and recorders.
TICK_S = 0.5
#: How often a recorder is asked for what it read: well within a flush interval.
TAKE_PERIOD_S = 5.0
#: A node without a worker keeps its recorder this long: the next worker may be on its way.
RELEASE_AFTER_S = 30.0
#: A recorder that dies is started this often on one node.
MAX_STARTS = 3
#: `look_once` waits this long for all nodes: two slow answers of a controller, and the start of the actors.
LOOK_TIMEOUT_S = 40.0
#: Why nothing is read on a node.
NO_METER = "no meter is named for this node"
#: At the end the recorders have this long for a last reading.
STOP_TIMEOUT_S = 5.0


@dataclass(eq=False)
class _Recorder:
    """A node's recorder. Without `actor` nothing is read there: no meter is named, or another reads it."""

    node: Node
    starts: int = 0
    config: NodeMeterConfig | None = None
    actor: Any = None
    metered: MeteredNode | None = None  # known once it is ready
    calls: int = 0  # that are out
    next_take: float = 0.0
    unneeded_since: float | None = None
    same_machine: str | None = None  # boot id, where another node of the cluster reads this machine's meter


@dataclass
class NodeRecorders:
    """All recorders of one driver.

    Args:
        configs: the nodes' meters; without any, nothing is started.
        record: takes rows of the `node_reading` table.
    """

    configs: Sequence[NodeMeterConfig]
    record: Callable[[Iterable[tuple]], None]
    clock: Callable[[], float] = time.monotonic

    _recorders: dict[str, _Recorder] = field(default_factory=dict)  # by node id
    _calls: dict[Any, tuple[_Recorder, str]] = field(default_factory=dict)  # with the method
    _said: set[tuple[str, str]] = field(default_factory=set)
    _next_tick: float = 0.0

    def start(self, nodes: Iterable[Node]) -> None:
        """Start on `nodes`, where workers are expected, ahead of them; a node that gets none is released."""
        if not self.configs:
            return
        try:
            for node in nodes:
                self._start(self._recorders.setdefault(node.node_id, _Recorder(node)))
        except RayError as error:
            self._say("the cluster", f"recorders do not start: {first_line(error)}")

    def tick(self, nodes: Iterable[Node]) -> None:
        """One turn; `nodes` are the nodes that have workers now, once for each worker."""
        now = self.clock()
        if not self.configs or now < self._next_tick:
            return
        self._next_tick = now + TICK_S
        try:
            self._settle(0.0)
            wanted = {node.node_id: node for node in nodes}
            for node_id, node in wanted.items():
                recorder = self._recorders.setdefault(node_id, _Recorder(node))
                recorder.unneeded_since = None
                if recorder.starts == 0:
                    self._start(recorder)
            self._release([r for node_id, r in self._recorders.items() if node_id not in wanted], now)
            for recorder in self._recorders.values():
                if recorder.metered is not None and not recorder.calls and now >= recorder.next_take:
                    recorder.next_take = now + TAKE_PERIOD_S
                    self._call(recorder, "take")
        except RayError as error:
            self._say("the cluster", f"node meters are not looked after: {first_line(error)}")

    def close(self, *, wait: bool = True) -> None:
        """Take the last readings, those after the workers' last counter reads, and end all recorders.

        With `wait` False there is no last reading: what the recorders have is taken if it comes at once.
        """
        reading = [r for r in self._recorders.values() if r.metered is not None]
        try:
            for recorder in reading:
                self._call(recorder, "take")  # a last reading may hang; what there is already does not
                if wait:
                    self._call(recorder, "stop")
            if reading:
                self._settle(STOP_TIMEOUT_S if wait else TICK_S)
            for recorder in self._recorders.values():
                self._kill(recorder)
        except RayError as error:
            log.warning("last readings of node meters were lost: %s", first_line(error))
        self._recorders.clear()
        self._calls.clear()

    def _release(self, unneeded: list[_Recorder], now: float) -> None:
        for recorder in unneeded:
            recorder.unneeded_since = recorder.unneeded_since or now
            if now - recorder.unneeded_since >= RELEASE_AFTER_S and not recorder.calls:
                if recorder.metered is not None:
                    self._call(recorder, "stop")
                else:
                    self._remove(recorder)

    def _start(self, recorder: _Recorder) -> None:
        recorder.starts += 1
        node = recorder.node
        address = next((n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node.node_id), "")
        recorder.config = find_node_meter(self.configs, node.host, address)
        if recorder.config is None:
            self._say(node.host, NO_METER)
            return
        recorder.actor = remote_node_recorder(node.node_id, recorder.config)
        self._call(recorder, "start")

    # -- calls ---------------------------------------------------------------------------------------------------

    def _call(self, recorder: _Recorder, method: str) -> None:
        recorder.calls += 1
        self._calls[getattr(recorder.actor, method).remote()] = recorder, method

    def _settle(self, timeout_s: float) -> None:
        if not self._calls:
            return
        ready, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=timeout_s)
        for future in ready:
            if future not in self._calls:
                continue  # its recorder was ended by an answer before
            recorder, method = self._calls.pop(future)
            recorder.calls -= 1
            try:
                value = ray.get(future)
            except RayError as error:
                self._died(recorder, first_line(error))
                continue
            if method == "start":
                self._ready(recorder, value)
            else:
                self._take(recorder, value)
            if method == "stop":
                self._remove(recorder)

    def _ready(self, recorder: _Recorder, ready: NodeRecorderReady) -> None:
        config, node = recorder.config, recorder.node
        assert config is not None
        meter = config.name_on(node.host)
        others = [r.metered for r in self._recorders.values() if r.metered is not None]
        if any(other.boot_id == ready.boot_id for other in others):
            recorder.same_machine = ready.boot_id  # two nodes of the cluster, one machine, one meter
            self._kill(recorder)
            return
        max_gap_ns = round(config.period_s * MAX_MISSED_PERIODS * 1e9)
        recorder.metered = MeteredNode(
            *(node.host, meter, max_gap_ns, config.accuracy_share, config.rest, node.node_id),
            boot_id=ready.boot_id,
            domains=ready.domains,
        )
        failure = ready.failure
        if twin := next((n for n in others if n.meter == meter and config.meter != "ipmi"), None):
            failure = f"{meter} is also the meter of {twin.host}: one chassis cannot be two nodes"
        if failure:
            self._take(recorder, (NodeFailure(time.time_ns(), failure),))
            self._kill(recorder)

    def _take(self, recorder: _Recorder, taken: Sequence[NodeReading | NodeFailure]) -> None:
        assert recorder.metered is not None
        for said in taken:
            if isinstance(said, NodeFailure):
                self._say(recorder.metered.host, f"{recorder.metered.meter}: {said.reason}")
        self.record(recorder.metered.row(said) for said in taken)

    def _died(self, recorder: _Recorder, reason: str) -> None:
        if recorder.metered is not None:
            self._take(recorder, (NodeFailure(time.time_ns(), f"its recorder ended: {reason}"),))
        else:
            self._say(recorder.node.host, f"the recorder of its meter did not start: {reason}")
        self._kill(recorder)
        if recorder.starts < MAX_STARTS and recorder.unneeded_since is None:
            self._start(recorder)

    def _remove(self, recorder: _Recorder) -> None:
        """End a recorder; a node of the same machine, if there is one, gets its own."""
        metered = recorder.metered
        self._kill(recorder)
        del self._recorders[recorder.node.node_id]
        for node_id, other in list(self._recorders.items()):
            if metered is not None and other.same_machine == metered.boot_id:
                del self._recorders[node_id]

    def _kill(self, recorder: _Recorder) -> None:
        for future in [f for f, (r, _) in self._calls.items() if r is recorder]:
            del self._calls[future]
        recorder.calls, recorder.metered = 0, None
        if recorder.actor is not None:
            ray.kill(recorder.actor)
            recorder.actor = None

    def _say(self, host: str, reason: str) -> None:
        if (host, reason) not in self._said:
            self._said.add((host, reason))
            log.warning("node %s: %s; its energy is missing", host, reason)


@dataclass(frozen=True)
class NodeLook:
    """What the meter of one node said when it was asked once; `failure` says why it said nothing."""

    host: str
    meter: str
    readings: tuple[NodeReading, ...]
    failure: str


def look_once(configs: Sequence[NodeMeterConfig]) -> list[NodeLook]:
    """Read the meter of each node of the cluster as it is now, once: is it there, and what does it say?"""
    looks = []
    asked: dict[Any, tuple[str, str, Any, Any]] = {}
    for node in living_nodes():
        host = node["NodeManagerHostname"]
        config = find_node_meter(configs, host, node["NodeManagerAddress"])
        if config is None:
            looks.append(NodeLook(host, "", (), NO_METER))
            continue
        actor = remote_node_recorder(node["NodeID"], config)
        start = actor.start.remote()
        asked[actor.stop.remote()] = host, config.name_on(host), actor, start
    ready = ray.wait(list(asked), num_returns=len(asked), timeout=LOOK_TIMEOUT_S)[0] if asked else []
    for call, (host, meter, actor, start) in asked.items():
        taken: tuple[NodeReading | NodeFailure, ...] = ()
        failure = "did not answer in time"
        if call in ready:
            try:
                failure, taken = ray.get(start).failure, ray.get(call)
            except RayError as error:
                failure = first_line(error)
        ray.kill(actor)
        readings = tuple(t for t in taken if isinstance(t, NodeReading)) if not failure else ()
        failures = ["said nothing", *(t.reason for t in taken if isinstance(t, NodeFailure))]
        looks.append(NodeLook(host, meter, readings, "" if readings else failure or failures[-1]))
    return sorted(looks, key=lambda look: look.host)
