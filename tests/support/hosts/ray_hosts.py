"""A Ray cluster on hosts of its own, with an S3 server on another, and counters on each that run as history says.

    with RayHosts(w1=1, w2=1) as hosts:                # and "head", "store", "client"
        driver = hosts.start("head", log, "--prompts", ...)
        hosts.cut("w1", "head")

The hosts see the machine's files, but what tells hosts apart they have for themselves: address, name, processes, shared memory,
boot. The head has no CPU for Ray. All ends with the `with` block, or with the process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from s3_servers import MotoServer, S3Endpoint
from support.cluster import QUICK
from support.hosts.counters import HostCounters
from support.hosts.network import Hosts
from support.nodes import SITE, TESTS

BIN = Path(sys.executable).parent
GCS_PORT, DASHBOARD_PORT, REDIS_PORT = 6379, 8265, 6380
START_TIMEOUT_S = 180.0
_COUNT_NODES = """
import sys
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
nodes = GcsClient(sys.argv[1]).get_all_node_info().values()
print(sum(node.state == GcsNodeInfo.ALIVE for node in nodes))
"""
#: What keeps the head's state while it is away: nothing, a folder on its disk, or a server on the store's host.
HeadState = Literal["memory", "rocksdb", "redis"]


class RayHosts(Hosts):
    """Hosts "head", those of `worker_cpus`, "store" and "client"; Ray on the first, moto on the store, nothing on the client.

    Args:
        head_state: with other than "memory" a head that comes back goes on.
        away_s: for how long drivers and nodes wait for a head that is away.
        dashboard: whether the head takes jobs by `ray job submit`.
        worker_cpus: by the name of a host, the CPUs that Ray has there.
    """

    def __init__(
        self,
        *,
        head_state: HeadState = "memory",
        away_s: float | None = None,
        dashboard: bool = False,
        **worker_cpus: int,
    ) -> None:
        super().__init__("head", *worker_cpus, "store", "client")
        self.worker_cpus = worker_cpus
        self.head_state = head_state
        self.dashboard = dashboard
        self.counters = HostCounters()
        self._server: MotoServer | None = None
        self._redis: subprocess.Popen[bytes] | None = None
        waits = {} if away_s is None else {"RAY_gcs_rpc_server_reconnect_timeout_s": f"{away_s:g}"}
        self._env = {
            **QUICK,
            # on a machine that is busy with something else
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_agent_register_timeout_ms": "120000",
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": f"{SITE}:{TESTS}",
            "MILLIJOULE_TEST_DIR": str(self.folder / "harm"),
            **waits,
        }

    @property
    def endpoint(self) -> S3Endpoint:
        assert self._server is not None
        return self._server.endpoint

    @property
    def address(self) -> str:
        """For `--ray-address`."""
        return f"{self['head'].address}:{GCS_PORT}"

    def env(self, name: str) -> dict[str, str]:
        """Of a process on host `name`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "RAY_"))}
        folder = self[name].folder
        own = {"MILLIJOULE_TEST_POWERCAP": str(folder / "powercap"), "TMPDIR": str(folder / "tmp")}
        return {**kept, **self._env, **self.endpoint.env(), **own}

    # -- Ray -------------------------------------------------------------------------------------------------------

    def start_head(self) -> None:
        """Start Ray's head on its host, which may have been killed before."""
        address, state = self["head"].address, {}
        if self.head_state == "rocksdb":
            state = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self.folder / "gcs")}
        elif self.head_state == "redis":
            redis = f"{self['store'].address}:{REDIS_PORT}"
            state = {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "hosts"}
        dashboard = f"--include-dashboard={'true' if self.dashboard else 'false'}"
        where = [f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}", f"--port={GCS_PORT}"]
        self._start_ray("head", ["--head", "--num-cpus=0", dashboard, *where], state)

    def start_worker(self, name: str) -> None:
        """Start Ray on host `name` and keep it there, as a service does: should it end, it is started again."""
        self._start_ray(name, [f"--address={self.address}", f"--num-cpus={self.worker_cpus[name]}"], {})

    def _start_ray(self, name: str, arguments: list[str], more: dict[str, str]) -> None:
        host = self[name]
        temporary = host.folder / f"r{host.boots}"
        self.counters.boot(host.boot_id, host.folder / "powercap", watts=30 + host.number)
        words = [
            *(BIN / "ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000"),
            *(f"--node-ip-address={host.address}", f"--temp-dir={temporary}", *arguments),
        ]
        again = 'while true; do "$@"; sleep 1; done' if name != "head" else 'exec "$@"'
        log = host.folder / f"ray{host.boots}.log"
        host.spawn(["bash", "-c", again, "ray", *words], log, {**self.env(name), **more})
        wait_for(lambda: "Ray runtime started" in log.read_text(), f"Ray on {name}", log)

    def nodes_alive(self) -> int:
        """Nodes that the head takes for alive, asked of it anew."""
        done = self["head"].run([sys.executable, "-c", _COUNT_NODES, self.address], self.env("head"))
        return int(done.stdout) if done.returncode == 0 else 0

    # -- jobs ------------------------------------------------------------------------------------------------------

    def start(self, name: str, log: Path, *arguments: object, **env: str) -> subprocess.Popen[bytes]:
        """Start `millijoule generate` on host `name`, which must have Ray; what it says goes to `log`."""
        command = [
            sys.executable,
            "-m",
            "millijoule.jobs.generate",
            *arguments,
            "--ray-address",
            self.address,
        ]
        return self[name].spawn(command, log, {**self.env(name), **env})

    def kill_drivers(self, name: str) -> None:
        """SIGKILL to every driver on host `name`."""
        for process in self[name].processes("generate --prompts"):
            process.kill()

    def bucket(self, prefix: str = "job") -> str:
        """The URL of a new bucket."""
        with self["store"].inside():
            return f"s3://{self.endpoint.make_bucket(prefix)}"

    def put(self, url: str, body: bytes) -> None:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        with self["store"].inside():
            self.endpoint.client().put_object(Bucket=bucket, Key=key, Body=body)

    def keys(self, url: str, prefix: str = "") -> list[str]:
        """Of the objects below `url` now, relative to it, asked of the server itself."""
        bucket, _, root = url.removeprefix("s3://").partition("/")
        with self["store"].inside():
            pages = self.endpoint.client().get_paginator("list_objects_v2")
            found = pages.paginate(Bucket=bucket, Prefix=f"{root}/{prefix}")
            return [o["Key"].removeprefix(f"{root}/") for page in found for o in page.get("Contents", ())]

    def objects(self, url: str, prefix: str = "") -> dict[str, bytes]:
        """What is in them, by key."""
        bucket, _, root = url.removeprefix("s3://").partition("/")
        client, found = self.endpoint.client(), {}
        for key in self.keys(url, prefix):
            with self["store"].inside():
                found[key] = client.get_object(Bucket=bucket, Key=f"{root}/{key}")["Body"].read()
        return found

    def download(self, url: str, folder: Path) -> Path:
        """A copy of all objects below `url`, as files of `folder`."""
        for key, body in self.objects(url).items():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        return folder

    def worker_logs(self, name: str) -> str:
        """What the workers of host `name` said since it was started."""
        host = self[name]
        logs = (host.folder / f"r{host.boots}").glob("session_*/logs/worker-*.err")
        return "".join(log.read_text(errors="replace") for log in logs)

    # -- the end ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> RayHosts:
        super().__enter__()
        try:
            (self.folder / "harm").mkdir()
            self.counters.start()
            self.start_store()
            self.start_head()
            for name in self.worker_cpus:
                self.start_worker(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start_store(self) -> None:
        store = self["store"]
        with store.inside():
            self._server = MotoServer(store.address, store.entry)
            self._server.start()
        if self.head_state == "redis":
            where = [
                "--bind",
                store.address,
                "--port",
                REDIS_PORT,
                "--dir",
                store.folder,
                "--protected-mode",
                "no",
            ]
            log = store.folder / "redis.log"
            self._redis = store.spawn(["redis-server", *where, "--appendonly", "yes"], log)
            wait_for(lambda: "eady to accept connections" in log.read_text(), "redis", log)

    def __exit__(self, *_: object) -> None:
        self.counters.stop()
        if self._server is not None:
            self._server.stop()
        super().__exit__()


def wait_for(
    done: Callable[[], object], what: str, log: Path | None = None, timeout_s: float = START_TIMEOUT_S
) -> None:
    """Until `done()`; fails with the end of `log`."""
    deadline = time.monotonic() + timeout_s
    while not done():
        said = log.read_text()[-3000:] if log is not None and log.exists() else ""
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{said}"
        time.sleep(0.1)
