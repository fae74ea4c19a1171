"""A Ray cluster whose own autoscaler (version 2) starts and ends fake GPU nodes: real raylets on this machine.

Ray's `AutoscalingCluster` calls `ray stop --force`, which ends every Ray of the machine; this one starts a head as
`RayCluster` does, and kills at its end whatever has its folder's name on the command line. What nodes there were is
watched by a process of its own (`NodeWatch`), which asks the cluster and nobody who works on it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import psutil
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.util import get_node_ip_address
from support.cluster import RayNode, free_port, shard_workers

NODE_TYPE = {"node_config": {}, "min_workers": 0}
OBJECT_STORE_BYTES = 80 * 2**20


class ScalingCluster:
    """A head without CPUs, and `node_types` (name to `(resources, max_workers)`) its autoscaler may start nodes of.

    Use as a context manager. A node that holds nothing for `idle_s` is taken down. `labels` are those of a type's nodes.
    """

    def __init__(
        self,
        node_types: dict[str, tuple[dict[str, float], int]],
        *,
        idle_s: float = 4.0,
        labels: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self.labels = labels or {}
        self.folder = Path(tempfile.mkdtemp(prefix="mj-scale-"))
        self.port = free_port()
        self.address = f"{get_node_ip_address()}:{self.port}"
        config = self.folder / "autoscaling.json"
        config.write_text(json.dumps(self._config(node_types, idle_s)))
        env = {
            **os.environ,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "RAY_TMPDIR": str(self.folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        env.pop("RAY_ADDRESS", None)
        self.head = RayNode(
            [
                "--head",
                f"--port={self.port}",
                "--num-cpus=0",
                f"--autoscaling-config={config}",
                "--include-dashboard=false",
                f"--object-store-memory={OBJECT_STORE_BYTES}",
                f"--temp-dir={self.folder}",
                "--min-worker-port=0",
                "--max-worker-port=0",
                f"--ray-client-server-port={free_port()}",
                f"--dashboard-agent-listen-port={free_port()}",
            ],
            env,
            self.folder / "head.log",
        )

    def _config(self, node_types: dict[str, tuple[dict[str, float], int]], idle_s: float) -> dict:
        types = {FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
        for name, (resources, most) in node_types.items():
            resources = {**resources, "object_store_memory": OBJECT_STORE_BYTES}
            types[name] = {**NODE_TYPE, "resources": resources, "max_workers": most}
            types[name] |= {"labels": self.labels[name]} if name in self.labels else {}
        commands = (
            "initialization",
            "setup",
            "head_setup",
            "worker_setup",
            "head_start_ray",
            "worker_start_ray",
        )
        return {
            "cluster_name": "fake",
            "max_workers": sum(most for _, most in node_types.values()),
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": self.address,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "available_node_types": types,
            "head_node_type": FAKE_HEAD_NODE_TYPE,
            "upscaling_speed": 100.0,
            "idle_timeout_minutes": idle_s / 60,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{name}_commands": [] for name in commands},
        }

    def processes(self) -> list[psutil.Process]:
        """Every live process of this cluster: the head's session, and the nodes it started."""
        found = {p.pid: p for p in self.head.processes()}
        for process in psutil.process_iter():
            try:
                if any(str(self.folder) in word for word in process.cmdline()):
                    found[process.pid] = process
            except psutil.Error:
                pass
        return list(found.values())

    def workers(self) -> list[psutil.Process]:
        """Actor processes that run leases, on any node."""
        return shard_workers(self.processes())

    def __enter__(self) -> ScalingCluster:
        try:
            self.head.wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        mine = self.processes()
        self.head.stop()
        for process in {p.pid: p for p in (*mine, *self.processes())}.values():
            try:
                process.kill()  # psutil refuses where the pid now belongs to another process
            except psutil.Error:
                pass
