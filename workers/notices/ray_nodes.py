"""Ray nodes of this machine, and their drain.

`ray drain-node` (hidden), Ray Data and Ray Train use the same calls. A drain keeps new actors and tasks away and, once nothing
is at work, ends the node; its deadline is a hint and ends nobody.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from millijoule.workers.errors import NodeError

#: The head answers in milliseconds, or not at all.
TIMEOUT_S = 5.0
#: `DRAIN_NODE_REASON_PREEMPTION` of Ray's `autoscaler.proto`: a drain that a node cannot refuse.
PREEMPTION = 2


@dataclass(frozen=True)
class RayNode:
    """A living node: Ray's id (hex), its address and its labels."""

    node_id: str
    address: str
    labels: Mapping[str, str] = field(default_factory=dict)


class RayNodes:
    """The nodes of one cluster, by its head's address.

    Args:
        address: `host:port` of the head; "auto": from `RAY_ADDRESS`, or the Ray that runs on this machine.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._client: Any = None

    def alive(self) -> list[RayNode]:
        """Raises NodeError: the head does not answer."""
        found = self._call(lambda client: client.get_all_node_info(timeout=TIMEOUT_S))
        return [
            RayNode(node_id.hex(), info.node_manager_address, dict(info.labels))
            for node_id, info in found.items()
            if info.state == 0
        ]

    def drain(self, node_id: str, reason: str, deadline_ms: int) -> None:
        """Drain a node because it is taken away. Raises NodeError: it was not taken note of."""
        accepted, why_not = self._call(
            lambda client: client.drain_node(node_id, PREEMPTION, reason, deadline_ms, timeout=TIMEOUT_S)
        )
        if not accepted:
            raise NodeError(f"node {node_id[:8]}: Ray refuses to drain it: {why_not}")

    def _call(self, ask: Any) -> Any:
        from ray._private.services import canonicalize_bootstrap_address
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            if self._client is None:
                found = canonicalize_bootstrap_address(self.address)
                if found is None:
                    raise NodeError("no Ray runs here; name its head with --ray-address HOST:PORT")
                self._client = GcsClient(address=found)
            return ask(self._client)
        except NodeError:
            raise
        except Exception as error:  # RpcError and what else a client of a head that is away raises
            self._client = None
            raise NodeError(f"the head of Ray at {self.address} does not answer: {error}") from error


def is_own_address(address: str) -> bool:
    """Whether it is one of this machine's, or this pod's: only such can be bound to."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def nodes_here(
    nodes: Collection[RayNode], addresses: Collection[str] = (), labels: Mapping[str, str] | None = None
) -> list[RayNode]:
    """Of `nodes` those of this machine: by all of `labels`, or else at one of `addresses`, or else at its own."""
    if labels:
        return [n for n in nodes if all(n.labels.get(name) == value for name, value in labels.items())]
    if addresses:
        return [n for n in nodes if n.address in addresses]
    return [n for n in nodes if is_own_address(n.address)]
