"""Watches a cluster from a process of its own: which nodes it has, and what waits for a node, over time.

    with NodeWatch(address, log) as watch:
        ...
    watch.samples

Asks the cluster's head alone, never the program that works there. `python node_watch.py ADDRESS OUTPUT` writes a line of
JSON a few times per second; how many shards an output has committed at that moment is counted in its folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.3


@dataclass(frozen=True)
class Sample:
    """One look: ids of the live GPU nodes, nodes bought and not there yet, GPU requests that wait, commits there were.

    `unix` is the wall clock's time; `types` are the node types of the nodes.
    """

    seconds: float
    unix: float
    nodes: frozenset[str]
    types: dict[str, str]
    coming: int
    waiting: int
    commits: int


class NodeWatch:
    """Samples a cluster at `address` while the `with` block lasts; commits are those in the folder `output`."""

    def __init__(self, address: str, output: Path, log: Path) -> None:
        self.log = log
        env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        command = [sys.executable, __file__, address, str(output)]
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdout=out, env=env, stdin=subprocess.DEVNULL)

    @property
    def samples(self) -> list[Sample]:
        lines = self.log.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [Sample(**{**r, "nodes": frozenset(r["nodes"])}) for r in rows]

    def wait_for_none(self, timeout_s: float = 120.0) -> None:
        """Until the cluster has no GPU node, and none that was bought is still to come."""
        deadline = time.monotonic() + timeout_s
        while not (samples := self.samples) or samples[-1].nodes or samples[-1].coming or samples[-1].waiting:
            assert time.monotonic() < deadline, f"not without nodes; the last: {samples[-1:]}"
            time.sleep(PERIOD_S)

    def __enter__(self) -> NodeWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


def main(address: str, output: str) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import IDLE, RUNNING, GetClusterStatusReply

    gcs = GcsClient(address)
    began = time.monotonic()
    while True:
        reply = GetClusterStatusReply()
        reply.ParseFromString(gcs.get_cluster_status(timeout_s=10))
        state = reply.cluster_resource_state
        nodes = {
            node.node_id.hex(): node.ray_node_type_name
            for node in state.node_states
            if node.status in (RUNNING, IDLE) and node.total_resources.get("GPU")
        }
        waiting = sum(
            r.count for r in state.pending_resource_requests if r.request.resources_bundle.get("GPU")
        )
        scaler = reply.autoscaling_state
        coming = sum(r.count for r in scaler.pending_instance_requests) + len(scaler.pending_instances)
        commits = len(list(Path(output).glob("_job/commits/*/*.json")))
        row = {
            "seconds": time.monotonic() - began,
            "unix": time.time(),
            "nodes": list(nodes),
            "types": nodes,
            "coming": coming,
            "waiting": waiting,
            "commits": commits,
        }
        print(json.dumps(row), flush=True)
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
