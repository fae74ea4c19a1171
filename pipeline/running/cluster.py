"""What a driver asks its Ray cluster: which nodes there are, what they hold, where an actor is; and Ray's words in short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private import state as ray_state
from ray.exceptions import RayActorError

from millijoule.pipeline.fleet.room import NodeNow, choice_of, how_many
from millijoule.workers.lease import Node

#: `AUTOSCALER_DRAIN_PREEMPTED` of Ray's `NodeDeathInfo`: it was drained because it was taken away.
DEATH_BY_PREEMPTION = 3


def living_nodes() -> list[dict[str, Any]]:
    """The nodes there are, as `ray.nodes()` describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def nodes_for(asked: Mapping[str, float], selectors: Sequence[Mapping[str, str]] = ()) -> list[Node]:
    """The nodes that could hold a worker that asks for `asked`, by Ray's names of resources, were they empty.

    Args:
        selectors: labels that a node has to have, those of one of these.
    """
    return [
        Node(node["NodeID"], node["NodeManagerHostname"])
        for node in living_nodes()
        if how_many(node["Resources"], asked) and choice_of(node.get("Labels") or {}, selectors) is not None
    ]


def nodes_now() -> tuple[NodeNow, ...]:
    """The nodes there are, what each has and its labels."""
    return tuple(NodeNow(n["NodeID"], n["Resources"], n.get("Labels") or {}) for n in living_nodes())


def words(have: Mapping[str, float], named: Mapping[str, float] | None = None) -> str:
    """`1 CPU and 2 GPU`, of the resources `named`."""
    said = [f"{have[name]:g} {name}" for name in (named or have) if have.get(name)]
    return " and ".join(said) or "nothing"


def is_alive(node_id: str) -> bool:
    """Whether the cluster still has this node; a node that is not known yet counts."""
    return all(node["Alive"] for node in ray.nodes() if node["NodeID"] == node_id)


def draining_nodes() -> dict[str, int]:
    """Nodes that are being drained: Unix ms at which each is due to end (0: nobody said), by id.

    Not a public interface, though Ray Data and Ray Train use it, too: empty where it does not answer.
    """
    try:
        return dict(ray_state.state.get_draining_nodes())
    except Exception:  # nothing may depend on it
        return {}


def was_preempted(node_id: str) -> bool:
    """Whether Ray says of a node that is gone that it was taken away."""
    return any(
        not node["Alive"] and node.get("DeathReason") == DEATH_BY_PREEMPTION
        for node in ray.nodes()
        if node["NodeID"] == node_id
    )


def node_of(actor: Any) -> Node:
    """Where Ray says that an actor is, or was; `Node("", "?")` where it does not know."""
    try:
        node_id = ray_state.actors(actor._actor_id.hex())["Address"]["NodeID"]
        host = next(node["NodeManagerHostname"] for node in ray.nodes() if node["NodeID"] == node_id)
    except Exception:  # not a public interface: nothing may depend on its answer
        return Node("", "?")
    return Node(node_id, host)


def first_line(error: BaseException) -> str:
    """The part of an error a log line has room for: Ray's multi-line texts say the cause in the first lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if isinstance(error, RayActorError) else 1])[:300]
