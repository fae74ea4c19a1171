"""The agent of one machine: hears a notice, drains the machine's Ray nodes, and says when they have ended.

Threads: one per source, which does nothing but ask; the caller's, which alone talks to Ray. What the sources hear goes through
one queue, and so does a SIGTERM.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from millijoule.workers.errors import MillijouleError, NodeError
from millijoule.workers.notices.notice import Notice, NoticeSource
from millijoule.workers.notices.ray_nodes import RayNode

#: While a notice stands: between two looks at the nodes, and two tries to drain them.
TICK_S = 1.0
#: The same complaint about a source is repeated this often.
COMPLAINT_PERIOD_S = 300.0
#: What a notice is worth whose time is past or has no time left to be counted.
LEAST_NOTICE_S = 1.0

log = logging.getLogger(__name__)


class Nodes(Protocol):
    """What the agent needs of `RayNodes`."""

    def alive(self) -> list[RayNode]: ...
    def drain(self, node_id: str, reason: str, deadline_ms: int) -> None: ...


class NodeAgent:
    """Watches `sources` for the nodes that `here` picks of all that are alive.

    Args:
        notice_s: how soon the end is taken to come where a notice does not say.
        heeds_advice: drain on what may never come to it, too.
        period_s: between two looks at a source.
    """

    def __init__(
        self,
        sources: Sequence[NoticeSource],
        nodes: Nodes,
        here: Callable[[Sequence[RayNode]], list[RayNode]],
        *,
        notice_s: float = 120.0,
        heeds_advice: bool = False,
        period_s: float = 5.0,
    ) -> None:
        self.sources = sources
        self.nodes = nodes
        self.here = here
        self.notice_s = notice_s
        self.heeds_advice = heeds_advice
        self.period_s = period_s
        self._heard: SimpleQueue[tuple[NoticeSource | None, Notice | None]] = SimpleQueue()
        self._stop = threading.Event()
        self._leaves = False  # it ends alone
        self._reason, self._deadline = "", 0.0  # of the earliest notice that stands
        self._drained: dict[str, float] = {}  # deadlines by id of the nodes that are draining
        self._ended: set[str] = set()
        self._to_acknowledge: list[tuple[NoticeSource, Notice]] = []

    def terminate(self, grace_s: float | None) -> None:
        """This process was asked to end: in `grace_s` it will be killed, and the machine's nodes with it. Safe in a signal handler.

        None: it alone ends, the nodes stay.
        """
        self._leaves = grace_s is None
        self._stop.set()
        notice = None if grace_s is None else Notice("SIGTERM of the node agent", time.time() + grace_s)
        self._heard.put((None, notice))

    def run(self) -> bool:
        """Watch until `terminate`, then see the drain through. False: nodes that were to be drained could not be."""
        watchers = [
            threading.Thread(target=self._watch, args=(s,), name=s.name, daemon=True) for s in self.sources
        ]
        for watcher in watchers:
            watcher.start()
        while not self._stop.is_set() or not self._heard.empty():
            self._take(self._heard_within(TICK_S if self._reason else None))
        if self._leaves:
            return True
        while self._reason and self._look_after_nodes() and time.time() < self._deadline:
            time.sleep(min(TICK_S, max(0.0, self._deadline - time.time())))
        return not self._reason or self._has_drained_all()

    def once(self) -> bool | None:
        """Look at every source once. True: a notice stands and the nodes are draining; None: no notice.

        Raises:
            MetadataError: a source does not answer.
            NodeError: a node cannot be drained.
        """
        for source in self.sources:
            self._take((source, source.look(0.0)), and_look=False)
        if not self._reason:
            return None
        for node in self.here(self.nodes.alive()):
            self._drain(node)
        return True

    # -- sources -------------------------------------------------------------------------------------------------

    def _watch(self, source: NoticeSource) -> None:
        """In a thread of its own: what `source` says, whenever that changes."""
        last: Notice | None = None
        complained = -COMPLAINT_PERIOD_S
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                notice = source.look(self.period_s)
            except MillijouleError as error:
                if began - complained >= COMPLAINT_PERIOD_S:
                    complained = began
                    log.warning("%s: %s; asking again", source.name, error)
            else:
                if notice != last:
                    last = notice
                    self._heard.put((source, notice))
            self._stop.wait(max(0.0, self.period_s - (time.monotonic() - began)))

    def _heard_within(self, seconds: float | None) -> tuple[NoticeSource | None, Notice | None] | None:
        try:
            return self._heard.get(timeout=seconds)
        except Empty:
            return None

    def _take(
        self, heard: tuple[NoticeSource | None, Notice | None] | None, *, and_look: bool = True
    ) -> None:
        if heard is not None:
            source, notice = heard
            if notice is not None:
                self._note(source, notice)
            elif source is not None:
                log.warning(
                    "%s: the notice was withdrawn; Ray does not undo a drain, the node has to be started anew",
                    source.name,
                )
        if and_look and self._reason:
            self._look_after_nodes()

    def _note(self, source: NoticeSource | None, notice: Notice) -> None:
        if notice.is_advice and not self.heeds_advice:
            log.info("notice: %s; an advice, nothing is drained", notice.reason)
            return
        now = time.time()
        deadline = notice.deadline
        if deadline is None:
            deadline = now + (self.notice_s if notice.within_s is None else notice.within_s)
        deadline = max(deadline, now + LEAST_NOTICE_S)
        log.warning("notice: %s; the end is due in %.0f s", notice.reason, deadline - now)
        if not self._reason or deadline < self._deadline:
            self._reason, self._deadline = notice.reason, deadline
        if source is not None and notice.event_id:
            self._to_acknowledge.append((source, notice))

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _look_after_nodes(self) -> bool:
        """Drain what is here and not draining by the deadline, note what has ended. False: all of it has."""
        try:
            alive = {node.node_id: node for node in self.here(self.nodes.alive())}
            for node in alive.values():
                self._drain(node)
        except NodeError as error:
            log.warning("%s; trying again", error)
            return True
        for node_id in [n for n in self._drained if n not in alive and n not in self._ended]:
            self._ended.add(node_id)
            log.info(
                "node %s has ended, %.0f s before it is due",
                node_id[:8],
                self._drained[node_id] - time.time(),
            )
        if not alive and self._drained:
            self._acknowledge()
        return bool(alive)

    def _drain(self, node: RayNode) -> None:
        if self._drained.get(node.node_id, float("inf")) <= self._deadline:
            return
        self.nodes.drain(node.node_id, self._reason, int(self._deadline * 1000))
        self._drained[node.node_id] = self._deadline
        log.warning(
            "draining node %s at %s: %s, %.0f s left",
            *(node.node_id[:8], node.address, self._reason, self._deadline - time.time()),
        )

    def _acknowledge(self) -> None:
        waiting, self._to_acknowledge = self._to_acknowledge, []
        for source, notice in waiting:
            try:
                source.acknowledge(notice)
                log.info("acknowledged: %s %s", notice.reason, notice.event_id)
            except MillijouleError as error:
                self._to_acknowledge.append((source, notice))
                log.warning("%s: not acknowledged: %s", source.name, error)

    def _has_drained_all(self) -> bool:
        """Whether every node that is here was told; a head that does not answer any more has told nobody."""
        try:
            return all(node.node_id in self._drained for node in self.here(self.nodes.alive()))
        except NodeError:
            return bool(self._drained)
