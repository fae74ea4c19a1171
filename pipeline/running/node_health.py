"""Which nodes can be worked with: faults make a node cool off, repeated ones put it out for this run. Pure state.

A fault is a node's own: it cannot load the model, write, see the output, or it fails on what other nodes draw. A death is
a worker's process that ended; it may be a row's fault, so many are forgiven before the node is. Whatever a node gets done
sets both right. Times are seconds on the caller's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from millijoule.workers.lease import Node

#: Faults in a row, each after a pause, before a node is out.
FAULTS_BEFORE_OUT = 3
#: Deaths in a row, without anything done on the node in between, before it is out: a search for the row that kills has
#: fewer, because each narrowed search counts as something done.
DEATHS_BEFORE_OUT = 12
#: Pause after a first fault; doubles with each further one of this run.
FAULT_PAUSE_FIRST_S = 1.0
FAULT_PAUSE_MOST_S = 60.0
#: Pause after a first death; doubles with each further one in a row.
DEATH_PAUSE_FIRST_S = 0.5
DEATH_PAUSE_MOST_S = 30.0
#: Reasons kept per node.
MAX_REASONS = 3


@dataclass
class NodeRecord:
    """What is known of one node: `faults` of this run, those and `deaths` in a row, and the latest reasons in words."""

    node_id: str
    host: str
    faults: int = 0
    faults_in_a_row: int = 0
    deaths_in_a_row: int = 0
    cool_until: float = 0.0
    out: bool = False
    reasons: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """What follows for the node, in words."""
        if self.out:
            return "the node is left out for this run"
        return f"fault {self.faults_in_a_row} in a row; after {FAULTS_BEFORE_OUT} the node is left out"

    def __str__(self) -> str:
        times = "once" if self.faults == 1 else f"{self.faults} times"
        state = "left out for this run" if self.out else f"could not work {times}"
        return f"node {self.host} ({self.node_id[:8]}): {state}: {'; '.join(self.reasons)}"


class NodeHealth:
    """Records by node id."""

    def __init__(self) -> None:
        self._nodes: dict[str, NodeRecord] = {}

    def fault(self, node: Node, reason: str, now: float) -> NodeRecord:
        """The node could not do what it was asked to. Faults while it cools off are of the same wave and count once."""
        record = self._record(node, reason)
        if now < record.cool_until:
            return record
        record.cool_until = now + min(FAULT_PAUSE_MOST_S, FAULT_PAUSE_FIRST_S * 2.0**record.faults)
        record.faults += 1
        record.faults_in_a_row += 1
        record.out |= record.faults_in_a_row >= FAULTS_BEFORE_OUT
        return record

    def death(self, node: Node, reason: str, now: float) -> NodeRecord:
        """A worker's process ended there, for whatever reason."""
        record = self._record(node, reason)
        pause = min(DEATH_PAUSE_MOST_S, DEATH_PAUSE_FIRST_S * 2.0**record.deaths_in_a_row)
        record.cool_until = max(record.cool_until, now + pause)
        record.deaths_in_a_row += 1
        record.out |= record.deaths_in_a_row >= DEATHS_BEFORE_OUT
        return record

    def worked(self, node_id: str) -> None:
        """Something was done on the node: what went wrong before did not last."""
        if record := self._nodes.get(node_id):
            record.faults_in_a_row = record.deaths_in_a_row = 0

    def shunned(self, now: float) -> set[str]:
        """Nodes that are to get no new worker now: out, or cooling off."""
        return {n.node_id for n in self._nodes.values() if n.out or now < n.cool_until}

    @property
    def out(self) -> list[NodeRecord]:
        """Nodes that are left out for this run."""
        return [n for n in self._nodes.values() if n.out]

    @property
    def faulty(self) -> list[NodeRecord]:
        """Nodes to be named at the end of the run: out, or with faults of their own."""
        faulty = [n for n in self._nodes.values() if n.out or n.faults]
        return sorted(faulty, key=lambda n: (n.host, n.node_id))

    def _record(self, node: Node, reason: str) -> NodeRecord:
        record = self._nodes.setdefault(node.node_id, NodeRecord(node.node_id, node.host))
        record.reasons = [reason, *(r for r in record.reasons if r != reason)][:MAX_REASONS]
        return record
