"""The agent of one machine: hears a notice, drains the machine's Ray nodes, and says when they have ended.

Threads: one per source, which does nothing but ask, and one that looks for sources while none is known; the caller's, which alone
talks to Ray. What the sources hear goes through one queue, and so does a SIGTERM.
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
#: Between two looks for a cloud while none answers: a machine's, or a pod's, network may come after the agent.
FIND_PERIOD_S = 30.0
#: What a notice is worth whose time is past or has no time left to be counted.
LEAST_NOTICE_S = 1.0

#: Of nodes that are not this machine's.
SHOWN_ADDRESSES = 5

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
        find_sources: asked now and then for sources to watch as well, until there are some.
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
        find_sources: Callable[[], Sequence[NoticeSource]] | None = None,
    ) -> None:
        self.sources = sources
        self.nodes = nodes
        self.here = here
        self.notice_s = notice_s
        self.heeds_advice = heeds_advice
        self.period_s = period_s
        self.find_sources = find_sources
        self._heard: SimpleQueue[tuple[NoticeSource | None, Notice | None]] = SimpleQueue()
        self._stop = threading.Event()
        self._leaves = False  # it ends alone
        self._standing: dict[str, tuple[float, str]] = {}  # deadline and reason, by the source's name
        self._reason, self._deadline = "", 0.0  # of the earliest that stands
        self._drained: dict[str, float] = {}  # deadlines by id of the nodes that are draining
        self._ended: set[str] = set()
        self._has_warned = False  # that no node is here
        self._to_acknowledge: list[tuple[NoticeSource, Notice]] = []
        self._acknowledged: set[str] = set()  # names of sources that were told that the machine may end

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
        self._begin_to_watch(self.sources)
        if self.find_sources is not None:
            threading.Thread(target=self._find, args=(self.find_sources,), name="find", daemon=True).start()
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
            NodeError: a node cannot be drained, or none that is alive is this machine's.
        """
        for source in self.sources:
            self._take((source, source.look(0.0)), and_look=False)
        if not self._reason:
            return None
        alive = self.nodes.alive()
        here = self.here(alive)
        if not here:
            raise NodeError(f"{self._reason}: {_none_here(alive)}")
        for node in here:
            self._drain(node)
        return True

    # -- sources -------------------------------------------------------------------------------------------------

    def _begin_to_watch(self, sources: Sequence[NoticeSource]) -> None:
        for source in sources:
            threading.Thread(target=self._watch, args=(source,), name=source.name, daemon=True).start()

    def _find(self, find_sources: Callable[[], Sequence[NoticeSource]]) -> None:
        """In a thread of its own."""
        while not self._stop.wait(FIND_PERIOD_S):
            if found := find_sources():
                log.info("watching %s, too", ", ".join(source.name for source in found))
                self._begin_to_watch(found)
                return

    def _watch(self, source: NoticeSource) -> None:
        """In a thread of its own: what `source` says, whenever that changes."""
        last: Notice | None = None
        complained = -COMPLAINT_PERIOD_S
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                notice = source.look(self.period_s)
            except Exception as error:  # whatever it was: a thread that ended would hear nothing any more
                if began - complained >= COMPLAINT_PERIOD_S:
                    complained = began
                    what = "" if isinstance(error, MillijouleError) else f"{type(error).__name__}: "
                    log.warning("%s: %s%s; asking again", source.name, what, error)
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
                self._withdraw(source)
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
        self._stands("" if source is None else source.name, (deadline, notice.reason))
        if source is not None and notice.event_id:
            self._to_acknowledge.append((source, notice))

    def _withdraw(self, source: NoticeSource) -> None:
        """What `source` said stands there no more: nodes that are started from now on stay."""
        if source.name in self._acknowledged or source.name not in self._standing:
            return  # it is gone because the end has begun; or it was an advice
        self._to_acknowledge = [waiting for waiting in self._to_acknowledge if waiting[0] is not source]
        self._stands(source.name, None)
        log.warning(
            "%s: the notice was withdrawn; Ray does not undo a drain, the node has to be started anew",
            source.name,
        )

    def _stands(self, source_name: str, notice: tuple[float, str] | None) -> None:
        self._standing.pop(source_name, None)
        if notice is not None:
            self._standing[source_name] = notice
        self._deadline, self._reason = min(self._standing.values(), default=(0.0, ""))

    # -- nodes ---------------------------------------------------------------------------------------------------

    def _look_after_nodes(self) -> bool:
        """Drain what is here and not draining by the deadline, note what has ended. False: all of it has."""
        try:
            everywhere = self.nodes.alive()
            alive = {node.node_id: node for node in self.here(everywhere)}
            for node in alive.values():
                self._drain(node)
            if not alive and not self._drained and not self._has_warned:
                self._has_warned = True
                log.warning("%s; looking again", _none_here(everywhere))
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
                self._acknowledged.add(source.name)
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


def _none_here(alive: Sequence[RayNode]) -> str:
    """Why nothing is drained: most often the agent looks for other addresses or labels than its nodes have."""
    addresses = sorted({node.address for node in alive})
    shown = ", ".join(addresses[:SHOWN_ADDRESSES]) + (" ..." if len(addresses) > SHOWN_ADDRESSES else "")
    return (
        f"no Ray node of the {len(alive)} that are alive ({shown}) is this machine's, so none is drained; where one is, say which with "
        "--node-address or --node-label"
    )
