"""Why workers that were asked for do not come: what the cluster says of nodes that could hold one.

For a line of the log, once in a while, while nobody works. What Ray promises nobody (its autoscaler's state) is asked for and done
without where it is not there.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import ray

from millijoule.pipeline.fleet.room import how_many
from millijoule.pipeline.running.cluster import living_nodes, words
from millijoule.pipeline.running.demand import PoolOptions

log = logging.getLogger(__name__)

RPC_TIMEOUT_S = 3.0


def why_waiting(options: PoolOptions) -> str:
    """Why a worker that asks for what `options` say has no place, as the end of a sentence; "" where it cannot be told."""
    if not ray.is_initialized():
        return ""
    try:
        from ray import _raylet

        compiled: Any = _raylet  # without types
        gcs = compiled.GcsClient(ray.get_runtime_context().gcs_address)
        reply = gcs.get_cluster_status(timeout_s=RPC_TIMEOUT_S)
        from ray.core.generated import autoscaler_pb2

        messages: Any = autoscaler_pb2  # generated, without types
        status = messages.GetClusterStatusReply()
        status.ParseFromString(reply)
        return reason(options, living_nodes(), status.autoscaling_state)
    except Exception:  # a private name is gone, or the cluster does not answer: then the line goes without
        log.debug("no word of why workers wait", exc_info=True)
        return ""


def reason(options: PoolOptions, nodes: list[dict[str, Any]], scaler: Any) -> str:
    """The same, of `nodes` as `ray.nodes()` has them and the autoscaler's own `AutoscalingState`."""
    asked = {name: amount for name, amount in options.asked.items() if amount}
    what = words(asked)
    selectors = options.selectors or ({},)
    if any(selectors):
        what += " and " + " or ".join(",".join(f"{k}={v}" for k, v in s.items()) for s in selectors)
    coming = Counter({r.ray_node_type_name: r.count for r in scaler.pending_instance_requests})
    coming += Counter(i.ray_node_type_name for i in scaler.pending_instances)
    if coming:
        return f"nodes on their way: {', '.join(f'{n} {name}' for name, n in sorted(coming.items()))}"
    failed = sorted(scaler.failed_instance_requests, key=lambda r: r.failed_ts)
    if failed:
        last = failed[-1]
        return f"the cluster's autoscaler could not start {last.ray_node_type_name} ({last.reason})"
    if asked in [dict(r.resources_bundle) for r in scaler.infeasible_resource_requests]:
        return f"the cluster's autoscaler has no node type with {what}"
    fitting = [
        node
        for node in nodes
        if how_many(node["Resources"], asked) and any(_has(node.get("Labels", {}), s) for s in selectors)
    ]
    if fitting:
        return f"all nodes with {what} are taken: {len(fitting)}"
    return f"no node has {what}, and none is on its way"


def _has(labels: dict[str, str], selector: dict[str, str]) -> bool:
    """Whether a node's `labels` are those of `selector`; what a selector excludes is not looked at."""
    return all(value.startswith("!") or labels.get(name) == value for name, value in selector.items())
