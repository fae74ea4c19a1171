"""A Ray cluster of real processes, started the way an operator does, and stopped for certain.

Never `ray stop`: it ends every Ray on the machine. Each node is a `ray start --block` in a session of its own, and
what is left of that session is killed at the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

START_TIMEOUT_S = 90.0


def free_port() -> int:
    """A TCP port nobody listens on, outside the range Ray gives its workers."""
    while True:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        if not 10_002 <= port <= 19_999:
            return port


def shard_workers(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of `processes` that are actors which run leases."""
    found = []
    for process in processes:
        try:
            if "ray::ShardWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return found


class RayNode:
    """One `ray start --block` process and everything it started."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / "ray"),
                    "start",
                    "--block",
                    "--disable-usage-stats",
                    "--include-log-monitor=false",  # it brings drivers what workers print, and ours want none of it
                    *arguments,
                ],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start failed:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """Every live process of this node's session."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid:
                    found.append(process)
            except (ProcessLookupError, psutil.Error):
                pass
        return found

    def raylet(self) -> psutil.Process:
        return next(p for p in self.processes() if p.name() == "raylet")

    def head_service(self) -> psutil.Process:
        """The control service of a head."""
        return next(p for p in self.processes() if p.name() == "gcs_server")

    def workers(self) -> list[psutil.Process]:
        """The node's actor processes that run leases."""
        return shard_workers(self.processes())

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                pass
        for process in self.processes():
            try:
                process.kill()
            except psutil.Error:
                pass
        self.process.wait()


#: A Ray that sees within seconds that a node is gone.
QUICK = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "4",
}


class RayCluster:
    """A head and optional further nodes on loopback. Use as a context manager.

    `address` is what `--ray-address` takes, `dashboard` what `ray job submit --address` takes.
    """

    def __init__(self, *, head_cpus: int, env: dict[str, str] | None = None, dashboard: bool = False) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="mj-ray-")
        )  # short: Ray's socket paths have a length limit
        self.env = {
            **os.environ,
            **QUICK,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parents[1]),
            **(env or {}),
        }
        self.env.pop("RAY_ADDRESS", None)
        self.nodes: list[RayNode] = []
        self.port = free_port()
        self.dashboard_port = free_port()
        arguments = [
            "--head",
            "--node-ip-address=127.0.0.1",
            f"--port={self.port}",
            f"--num-cpus={head_cpus}",
            "--object-store-memory=80000000",
            f"--ray-client-server-port={free_port()}",
            f"--include-dashboard={'true' if dashboard else 'false'}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={self.dashboard_port}",
            f"--dashboard-agent-listen-port={free_port()}",
            f"--temp-dir={self.folder}",
        ]
        self.nodes.append(RayNode(arguments, self.env, self.folder / "head.log"))

    @property
    def address(self) -> str:
        for line in (self.folder / "head.log").read_text().splitlines():
            if "--address='" in line:
                return line.split("--address='")[1].split("'")[0]
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def add_node(
        self,
        cpus: int,
        gpus: int = 0,
        *,
        env: dict[str, str] | None = None,
        labels: dict[str, str] | None = None,
        **resources: float,
    ) -> RayNode:
        """A further node; `env` is what its processes have besides the cluster's, `labels` Ray's."""
        arguments = [
            f"--address={self.address}",
            f"--num-cpus={cpus}",
            f"--num-gpus={gpus}",
            f"--resources={json.dumps(resources)}",
            *([f"--labels={','.join(f'{n}={v}' for n, v in labels.items())}"] if labels else []),
            "--object-store-memory=80000000",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        node = RayNode(arguments, {**self.env, **(env or {})}, self.folder / f"node{len(self.nodes)}.log")
        node.wait()
        self.nodes.append(node)
        return node

    def __enter__(self) -> RayCluster:
        try:
            self.nodes[0].wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.stop()
