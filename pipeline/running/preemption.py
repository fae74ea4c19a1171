"""Nodes that are being taken away, as Ray knows it (a drain: of the node agent, of a raylet's SIGTERM, of the autoscaler), and how many
workers a job may lose otherwise. Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from millijoule.pipeline.running.cluster import draining_nodes, was_preempted
from millijoule.workers.errors import JobError

#: Between two looks at which nodes are draining: a spot notice can be as short as thirty seconds.
LOOK_PERIOD_S = 1.0
#: So long before its node ends a worker has to have said its last words: a read of its counters and an answer.
LAST_WORDS_S = 5.0
#: Workers that a job may lose in a row by faults, without a commit in between: so many, or this many for each worker it may have.
#: On a cluster that puts a new node in the place of each bad one nothing else would end it.
FAULTS_IN_A_ROW, FAULTS_PER_WORKER = 64, 8


def in_background(ask: Callable[[], None]) -> None:
    """Call `ask` in a thread that nothing waits for, not even the end of the process."""
    threading.Thread(target=ask, name="draining-nodes", daemon=True).start()


class DrainingNodes:
    """When each node that is, or was, draining ends. Ray forgets a node once it is gone; what is known here stays.

    Ray answers only when its head does, which may be away for minutes; workers go on meanwhile, and so must who asks here.
    """

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._next_look = 0.0
        self._asking = False
        self._answer: dict[str, int] | None = None
        #: Nodes that were draining when Ray last answered. Its schedulers hear of that later than who asks its head, and put
        #: actors there meanwhile, which end with the node.
        self.now: frozenset[str] = frozenset()

    def look(self, now: float) -> None:
        """Take what Ray answered, and ask it again, if it is time."""
        if now >= self._next_look and not self._asking:
            self._next_look = now + LOOK_PERIOD_S
            self._asking = True
            in_background(self._ask)
        answer, self._answer = self._answer, None
        if answer is None:
            return
        self.now = frozenset(answer)
        for node_id, deadline_ms in answer.items():
            self._ends[node_id] = now + deadline_ms / 1000 - time.time() if deadline_ms else float("inf")

    def _ask(self) -> None:
        self._answer = draining_nodes()
        self._asking = False

    def ends(self, node_id: str) -> float | None:
        """When the node is due to end, infinity where nobody said; None: it stays."""
        return self._ends.get(node_id)

    def takes(self, node_id: str) -> bool:
        """Whether what ends on this node now ends because the node is taken away."""
        return node_id in self._ends or was_preempted(node_id)


class DeathBudget:
    """Workers lost: any number because their nodes were taken away, a limited one otherwise."""

    def __init__(self, max_workers: int) -> None:
        self.limit = max(FAULTS_IN_A_ROW, FAULTS_PER_WORKER * max_workers)
        self.preempted = 0
        self.faults = 0
        self._in_a_row = 0
        self._progress = -1

    def preemption(self) -> None:
        """One was lost with its node."""
        self.preempted += 1

    def fault(self, reason: str, progress: int) -> None:
        """One was lost otherwise; `progress` grows with whatever the job gets done.

        Raises:
            JobError: too many in a row.
        """
        self.faults += 1
        self._in_a_row = 1 if progress > self._progress else self._in_a_row + 1
        self._progress = progress
        if self._in_a_row > self.limit:
            raise JobError(
                f"{self._in_a_row} workers were lost in a row and nothing was done in between; the last: {reason}. Nothing "
                "that was committed is lost: mend the cause and run the same command again"
            )

    def __str__(self) -> str:
        lost = {"with nodes that were taken away": self.preempted, "by faults": self.faults}
        said = [f"{n} {how}" for how, n in lost.items() if n]
        return f"workers lost: {', '.join(said)}" if said else ""
