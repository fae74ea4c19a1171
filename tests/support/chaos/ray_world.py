"""One job on a real Ray cluster, an S3 server and stand-in boards, and the hand that strikes them.

The cluster is a head without room and two nodes of a board each, all on this host: their workers share its counter book and
signs of life, and a reader on one node reads the boards of the other. What ends of it is started again, as systemd would.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from s3_servers import CephGateway, FaultProxy, MotoServer
from support import boards
from support.chaos import inside
from support.chaos.damage import SPOILED, flipped, spoil
from support.chaos.faults import INSIDE
from support.chaos.ray_faults import NETWORK, RayStorm
from support.cluster import RayCluster, RayNode, shard_workers
from support.jobs import start

from millijoule.pipeline.closing.check import check_output
from millijoule.workers.meters.meter import read_boot_id
from millijoule.workers.storage.open import open_store

NODES, SHARD_SIZE = 2, 8
#: A job that needs longer hangs.
MOST_S = 900.0
#: A cluster is started so often before the run fails.
STARTS_MOST = 3
#: A fault on the way ends after so long, however many requests there were meanwhile.
NETWORK_MOST_S = 10.0
#: Between two strikes.
PAUSE_S = (0.3, 1.5)
#: In the environment of every process of a run.
TOKEN = "MILLIJOULE_TEST_RUN"


class RayWorld:
    """A cluster and its boards; `problems` are what must not come of a storm."""

    def __init__(
        self, storm: RayStorm, folder: Path, server: CephGateway | MotoServer, proxy: FaultProxy
    ) -> None:
        self.storm, self.folder, self.server, self.proxy = storm, folder, server, proxy
        self.rng = random.Random(storm.seed)
        self.host = folder / "hosts" / "0"
        self.boards = boards.make_boards(self.host, NODES)
        self.ground = inside.Ground(folder)
        for name in ("armed", "ill", "names", "tmp"):
            (folder / name).mkdir()
        self.prompts = [f"image {i} mj=1000 ms=50" for i in range(storm.images)]
        (folder / "prompts.txt").write_text("".join(f"{p}\n" for p in self.prompts))
        self.bucket = server.endpoint.make_bucket("storm")
        self.token = f"{os.getpid()}-{storm.seed}-{time.monotonic_ns()}"
        self.drivers: list[subprocess.Popen[str]] = []
        self.lost_books: list[tuple[str, int]] = []
        self.problems: list[str] = []
        self.cluster: RayCluster | None = None
        self.nodes: list[RayNode | None] = [None] * NODES  # of each board
        self._later: list[tuple[float, Callable[[], object]]] = []

    # -- what runs -------------------------------------------------------------------------------------------------

    def start_cluster(self) -> None:
        """A head and its nodes; those of one that has ended are ended."""
        for left in reversed(range(STARTS_MOST)):
            self.close()
            try:
                self._start_cluster()
            except RuntimeError:  # Ray gives up after half a minute, which a busy machine may need
                if not left:
                    raise
            else:
                return

    def _start_cluster(self) -> None:
        env = {TOKEN: self.token, "MILLIJOULE_TEST_BOARDS": str(self.host)}  # readers may be on the head
        self.cluster = RayCluster(head_cpus=0, env=env)
        self.cluster.__enter__()
        for i in range(NODES):
            self._join(i)

    def _join(self, i: int) -> None:
        assert self.cluster is not None
        env = {"CUDA_VISIBLE_DEVICES": self.boards[i].uuid}
        self.nodes[i] = None
        self.nodes[i] = self.cluster.add_node(cpus=1, gpus=1, env=env)

    def look_after_nodes(self) -> None:
        """One that has ended is started again, where there is a head."""
        for i, node in enumerate(self.nodes):
            if self.has_head() and (node is None or node.process.poll() is not None):
                try:
                    self._join(i)
                except RuntimeError:
                    pass  # the head went meanwhile, or is stopped; later

    def has_head(self) -> bool:
        return self.cluster is not None and any(
            p.name() == "gcs_server" and p.status() != psutil.STATUS_ZOMBIE
            for p in self.cluster.nodes[0].processes()
        )

    def start_driver(self, name: str = "out") -> subprocess.Popen[str]:
        assert self.cluster is not None
        driver = start(
            self.folder,
            *("--prompts", self.folder / "prompts.txt", "--output", f"s3://{self.bucket}/{name}"),
            *("--model", "python:support.spending_model:load", "--gpus-per-worker", 1, "--workers", "1:2"),
            *("--shard-size", SHARD_SIZE, "--lease-seconds", 5),
            ray=self.cluster.address,
            PYTHONPATH=f"{boards.SITE}:{boards.TESTS}",
            MILLIJOULE_TEST_CHAOS=str(self.folder),
            TMPDIR=str(self.folder / "tmp"),
            RAY_gcs_rpc_server_reconnect_timeout_s="15",  # so long a driver that begins as the head goes waits
            **{TOKEN: self.token},
        )
        self.drivers.append(driver)
        return driver

    def processes(self) -> list[psutil.Process]:
        """All of this run that are there, whoever started them, but this one's own."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get(TOKEN) == self.token and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                pass
        return found

    def workers(self) -> list[psutil.Process]:
        return shard_workers(self.processes())

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.__exit__()
        self.cluster = None

    # -- the storm -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until a driver has finished the job, whatever is left to strike then; drivers that end are followed by others."""
        kinds = list(self.storm.kinds)
        self.start_driver()
        deadline, strike_at = time.monotonic() + MOST_S, None
        while not any(d.poll() in (0, 3) for d in self.drivers) and time.monotonic() < deadline:
            time.sleep(0.1)
            now = time.monotonic()
            for due, act in [one for one in self._later if one[0] <= now]:
                self._later.remove((due, act))
                act()
            if all(d.poll() not in (None, 0, 3) for d in self.drivers):
                if not self.has_head():
                    self.start_cluster()
                self.start_driver()
            self.look_after_nodes()
            if strike_at is None and any(
                "PUT" in r and "/out/_job/commits/" in r for r in self.proxy.requests
            ):
                strike_at = now
            if strike_at is not None and now >= strike_at and kinds and self.has_head():
                kind = kinds.pop(0)
                if not self.strike(kind):
                    kinds.append(kind)
                elif kind not in INSIDE:  # who meets one of those writes it down
                    self.ground.write(kind)
                strike_at = time.monotonic() + self.rng.uniform(*PAUSE_S)
        for _, act in self._later:
            act()
        self._later.clear()
        self.proxy.clear()
        for name in os.listdir(self.ground.armed):
            (self.ground.armed / name).unlink()

    def wait_for_drivers(self) -> None:
        for driver in self.drivers:
            try:
                driver.wait(60)
            except subprocess.TimeoutExpired:
                self.problems.append(f"driver {driver.pid} outlived the job")
                driver.kill()
                driver.wait()

    def end(self) -> None:
        """Once more, undisturbed: of several drivers one that ended may have left accounts open. Then nobody may be left."""
        if not self.has_head():
            self.start_cluster()
        self.look_after_nodes()
        if self.start_driver().wait(MOST_S) not in (0, 3):
            self.problems.append("the same command again does not end well")
        self.none_is_left(self.workers, "outlived its job", 30.0)
        self.close()
        self.none_is_left(self.processes, "outlived its cluster", 15.0)

    def none_is_left(self, who: Callable[[], list[psutil.Process]], words: str, most_s: float) -> None:
        until = time.monotonic() + most_s
        while (left := who()) and time.monotonic() < until:
            time.sleep(0.5)
        for process in left:
            try:
                self.problems.append(f"process {process.pid} {words}: {' '.join(process.cmdline())[:100]}")
                process.kill()
            except psutil.Error:
                pass

    def strike(self, kind: str) -> bool:
        """False where there is nobody to strike."""
        what, _, how = kind.partition(" ")
        if kind in INSIDE:
            self.ground.arm(kind)
        elif kind in NETWORK:
            mode, times = NETWORK[kind]
            fault = self.proxy.inject(mode, "/out/", times=times, seconds=0.3)  # type: ignore[arg-type]
            self._later.append((time.monotonic() + NETWORK_MOST_S, lambda: setattr(fault, "times", 0)))
        elif kind == "second driver":
            self.start_driver()
        elif kind == "counter reset":
            self.rng.choice(self.boards).reset()
        elif kind in SPOILED:
            if spoil(kind, self.folder, self.rng) is None:
                return False
            if kind.startswith("counter book"):
                self.lost_books.append((read_boot_id(), time.monotonic_ns()))
        elif what == "store" and how != "stopped for a while":
            assert isinstance(self.server, CephGateway)
            self.server.restart_gateway(signal.SIGKILL if how == "killed" else signal.SIGTERM)
        else:
            return self._signal(what, how)
        return True

    def _signal(self, what: str, how: str) -> bool:
        found = self._process(what)
        if found is None:
            return False
        signum = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM, "interrupted": signal.SIGINT}.get(
            how, signal.SIGSTOP
        )
        try:
            found.send_signal(signum)
        except psutil.Error:
            return False
        if signum == signal.SIGSTOP:
            self._later.append((time.monotonic() + self.rng.uniform(0.5, 3.0), lambda: _wake(found)))
        elif what == "head":
            _gone(found)  # the drivers notice, and end
        return True

    def _process(self, what: str) -> psutil.Process | None:
        """One of them, if there is one."""
        assert self.cluster is not None
        nodes = [n for n in self.nodes if n is not None]
        match what:
            case "worker":
                some = [w for n in nodes for w in n.workers()]
            case "raylet":
                some = [p for n in nodes for p in n.processes() if p.name() == "raylet"]
            case "head":
                some = [self.cluster.nodes[0].head_service()]
            case "driver":
                some = [psutil.Process(d.pid) for d in self.drivers if d.poll() is None]
            case _:
                some = _listeners(int(self.server.endpoint.url.rpartition(":")[2]))
        return self.rng.choice(some) if some else None

    # -- what it left ----------------------------------------------------------------------------------------------

    def fetched(self, name: str) -> Path:
        """The output as the store has it, by a client of its own."""
        client, folder = self.server.endpoint.client(), self.folder / f"fetched-{name}"
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for item in page.get("Contents", ()):
                key = item["Key"]
                if key.startswith(f"{name}/"):
                    path = folder / key
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(client.get_object(Bucket=self.bucket, Key=key)["Body"].read())
                elif not key.startswith(("out/", "calm/")):
                    self.problems.append(f"{key} is outside the output")
        return folder / name

    def check(self) -> list[str]:
        return list(check_output(open_store(f"s3://{self.bucket}/out")))

    def damage_objects(self, output: Path) -> None:
        """What `check` says of data that was damaged or lost when the job was done."""
        client = self.server.endpoint.client()
        for kind in self.storm.after:
            path = self.rng.choice(sorted((output / "data").iterdir()))
            at = {"Bucket": self.bucket, "Key": f"out/data/{path.name}"}
            if kind == "object missing":
                client.delete_object(**at)
            else:
                client.put_object(**at, Body=flipped(path.read_bytes(), 3))
            self.ground.write(kind)
            if not any(path.name in problem for problem in self.check()):
                self.problems.append(f"{kind}: check does not name {path.name}")
            client.put_object(**at, Body=path.read_bytes())


def _gone(process: psutil.Process) -> None:
    """A head that is terminated lets go of its port at once, and may not end: then it is killed, as by whoever started it."""
    try:
        process.wait(10)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait()


def _wake(process: psutil.Process) -> None:
    try:
        process.resume()
    except psutil.Error:
        pass


def _listeners(port: int) -> list[psutil.Process]:
    """The processes of ours that listen on a port."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(
                c.status == psutil.CONN_LISTEN and c.laddr.port == port
                for c in process.net_connections("tcp")
            ):
                found.append(process)
        except psutil.Error:
            pass
    return found
