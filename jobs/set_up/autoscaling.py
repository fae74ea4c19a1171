"""Whether a node that holds a worker may come: what a Ray cluster that scales says of itself.

Three sources, none of them promised by Ray: the node groups some clusters report (Ray Data and Ray Train read the
same record); an actor that asks for the worker's resources, and what the autoscaler (version 2) makes of it; for version 1 only
that it is there. Whatever is missing or says something else than expected becomes "cannot be told", never a guess.
The question in the second form starts the node it asks about: ask only where work waits for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray

from millijoule.pipeline.fleet.room import how_many
from millijoule.pipeline.running.cluster import words

log = logging.getLogger(__name__)

#: Autoscalers look around every five seconds; one that starts many nodes at once may take longer.
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.25
RPC_TIMEOUT_S = 5.0
#: Ray names the node types of a cluster without an autoscaler (version 1) after its nodes.
_READ_ONLY_TYPE = "node_"


@dataclass(frozen=True)
class Prospect:
    """Whether nodes that hold a worker may come; `may_come` None: it cannot be told.

    `why` finishes the sentence "because ...". `most` workers fit the nodes that may come, None: not known.
    """

    may_come: bool | None
    why: str
    most: int | None = None


def prospect(resources: Mapping[str, float]) -> Prospect:
    """Ask the cluster this process is connected to for a node with `resources` (by Ray's names).

    May start such a node, and takes up to `ANSWER_TIMEOUT_S`.
    """
    resources = {name: amount for name, amount in resources.items() if amount}
    try:
        from ray import _raylet
        from ray._private.state import state

        reported = state.get_cluster_config()
        compiled: Any = _raylet  # without types
        gcs = compiled.GcsClient(ray.get_runtime_context().gcs_address)
        version_2 = gcs.internal_kv_get(b"__autoscaler_v2_enabled", b"__autoscaler", timeout=RPC_TIMEOUT_S)
        status = gcs.internal_kv_get(b"__autoscaling_status", None, timeout=RPC_TIMEOUT_S)
    except Exception as error:  # a private name is gone, or the driver connected in another way
        log.debug("no word of the cluster's autoscaler", exc_info=True)
        return Prospect(None, f"the cluster does not say which nodes may come ({type(error).__name__})")
    if reported is not None and reported.node_group_configs:
        return from_node_groups(reported, resources)
    if version_2 == b"1":
        return _ask(gcs, resources)
    if scales_by_version_1(status):
        return Prospect(None, "the cluster's autoscaler (version 1) does not say which nodes may come")
    return Prospect(False, "the cluster has no autoscaler that could start one")


def from_node_groups(config: Any, resources: Mapping[str, float]) -> Prospect:
    """What `config`, an autoscaler `ClusterConfig` message, allows: -1 nodes of a group means any number."""
    names, most = [], 0
    limited = True
    for group in config.node_group_configs:
        fits = how_many(group.resources, resources)
        if fits and group.max_count:
            names.append(f"node type {group.name} with {words(group.resources, resources)} may come")
            most += fits * max(0, group.max_count)
            limited = limited and group.max_count > 0
    if not names:
        return Prospect(False, f"no node type of the cluster has {words(resources)}")
    for name, limit in config.max_resources.items():
        if amount := resources.get(name):
            most = min(most, int(limit / amount)) if limited else int(limit / amount)
            limited = True
    return Prospect(True, "; ".join(names), max(1, most) if limited else None)


def scales_by_version_1(status: bytes | None) -> bool:
    """Whether the status that version 1 leaves is of an autoscaler with node types, and not of a mere onlooker."""
    try:
        types = json.loads(status or b"{}")["autoscaler_report"]["active_nodes"]
        return any(not name.startswith(_READ_ONLY_TYPE) for name in types)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


class _Asks:
    """Asks for a worker's resources by being there."""

    def here(self) -> None: ...


def _ask(gcs: Any, resources: Mapping[str, float]) -> Prospect:
    """Let an actor wait for `resources` until the autoscaler has taken note, then take it back."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    asks: Any = ray.remote(_Asks)
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    actor = asks.options(num_cpus=cpus, num_gpus=gpus, resources=custom or None).remote()
    try:
        placed = actor.here.remote()

        def status() -> Any:
            from ray.core.generated import autoscaler_pb2

            messages: Any = autoscaler_pb2  # generated, without types
            reply = messages.GetClusterStatusReply()
            reply.ParseFromString(gcs.get_cluster_status(timeout_s=RPC_TIMEOUT_S))
            return reply

        return answer(status, resources, lambda: bool(ray.wait([placed], timeout=0)[0]))
    except Exception as error:
        log.debug("the autoscaler could not be asked", exc_info=True)
        why = f"the cluster's autoscaler could not be asked ({type(error).__name__}: {error})"
        return Prospect(None, why)
    finally:
        ray.kill(actor)


def answer(status: Callable[[], Any], resources: Mapping[str, float], placed: Callable[[], bool]) -> Prospect:
    """What the autoscaler makes of the request for `resources` that is out.

    A request is pending in one version of the cluster's state; once the autoscaler has seen that version or a later
    one, it has either listed the request as infeasible or asked for a node.

    Args:
        status: a `GetClusterStatusReply` of now.
        placed: whether the request has found its place meanwhile.
    """
    asked = dict(resources)
    before = _nodes_coming(status())
    pending_since: int | None = None
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        if placed():
            return Prospect(True, f"a node with {words(asked)} is there")
        now = status()
        cluster, scaler = now.cluster_resource_state, now.autoscaling_state
        requests = [dict(p.request.resources_bundle) for p in cluster.pending_resource_requests]
        if pending_since is None and asked in requests:
            pending_since = cluster.cluster_resource_state_version
        if pending_since is not None and scaler.last_seen_cluster_resource_state_version >= pending_since:
            if asked in [dict(r.resources_bundle) for r in scaler.infeasible_resource_requests]:
                return Prospect(False, f"the cluster's autoscaler cannot start a node with {words(asked)}")
            new = list(_nodes_coming(now) - before)
            which = f"node type {', '.join(new)}" if new else "a node type of the cluster's autoscaler"
            return Prospect(True, f"{which} with room for {words(asked)} may come")
        time.sleep(POLL_S)
    return Prospect(None, f"the cluster's autoscaler gave no answer in {ANSWER_TIMEOUT_S:.0f} s")


def _nodes_coming(status: Any) -> Counter[str]:
    """How many nodes of each type are on their way."""
    scaler = status.autoscaling_state
    asked = Counter({r.ray_node_type_name: r.count for r in scaler.pending_instance_requests})
    return asked + Counter(i.ray_node_type_name for i in scaler.pending_instances)
