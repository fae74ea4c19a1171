"""`python -m support.chaos.on_ray FOLDER [--seed N] [--runs N] [--record FILE]`: storms over a real Ray cluster and an S3 server.

The driver is the command that people run; head, raylets, workers and store are what they have. Faults come one after another
for as long as the job is not done. Images are judged as in other storms (`support.chaos.oracle`); there are no counters here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from s3_servers import CephGateway, FaultProxy, MotoServer
from support.chaos import oracle
from support.cluster import RayCluster, RayNode
from support.jobs import start, write_prompts

from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result

PROMPTS, SHARD_SIZE = 600, 4
#: A job that needs longer hangs.
MOST_S = 420.0

#: Kinds of requests that fail on the way, and how many of them.
STORE = {
    "503 storm": ("status", 40),
    "connections reset": ("reset", 6),
    "acknowledgements lost": ("ack_lost", 4),
    "answers truncated": ("truncate", 4),
    "requests cut": ("cut", 4),
    "store slow": ("latency", 20),
}
#: However many requests there are meanwhile.
STORE_MOST_S = 10.0
PROCESSES = (
    *(
        "worker killed",
        "worker stopped for a while",
        "worker terminated",
        "raylet killed",
        "raylet terminated",
    ),
    *("raylet stopped for a while", "head killed", "head stopped for a while"),
    *("store killed", "store stopped for a while"),
    *("driver killed", "driver terminated", "driver stopped for a while", "second driver"),
)
KINDS = (*STORE, *PROCESSES)


class RayStorm:
    """One job in its cluster, and what strikes it."""

    def __init__(self, seed: int, folder: Path, server: CephGateway | MotoServer, proxy: FaultProxy) -> None:
        self.rng = random.Random(seed)
        self.folder, self.server, self.store, self.proxy = folder, server, server.endpoint, proxy
        self.bucket = self.store.make_bucket("storm")
        self.prompts = write_prompts(folder / "prompts.txt", PROMPTS)
        self.drivers: list[subprocess.Popen[str]] = []
        self.injected: list[str] = []
        self._later: list[tuple[float, Callable[[], None]]] = []
        self._has_head = False

    def start_cluster(self) -> None:
        """A head and two nodes; those of one whose head was killed are ended."""
        self.close()
        self.cluster = RayCluster(head_cpus=0)
        self.cluster.__enter__()
        self._has_head = True
        for _ in range(2):
            self.cluster.add_node(cpus=1)

    def close(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.__exit__()

    def start_driver(self) -> None:
        driver = start(
            self.folder,
            *("--prompts", self.prompts, "--output", f"s3://{self.bucket}/out", "--shard-size", SHARD_SIZE),
            *("--model", "python:support.models:slow", "--lease-seconds", 5, "--workers", "1:2"),
            ray=self.cluster.address,
        )
        self.drivers.append(driver)

    def run(self) -> list[int | None]:
        """Until a driver has finished the job; the drivers' exit codes."""
        kinds = [k for k in KINDS if k != "store killed" or isinstance(self.server, CephGateway)]
        self.rng.shuffle(kinds)
        self.start_cluster()
        self.start_driver()
        deadline, strike_at = time.monotonic() + MOST_S, None
        while not any(d.poll() in (0, 3) for d in self.drivers) and time.monotonic() < deadline:
            time.sleep(0.1)
            now = time.monotonic()
            for due, act in [one for one in self._later if one[0] <= now]:
                self._later.remove((due, act))
                act()
            if all(d.poll() not in (None, 0, 3) for d in self.drivers):
                if not self._has_head:
                    self.start_cluster()
                self.start_driver()
            if strike_at is None and any("PUT" in r and "/commits/" in r for r in self.proxy.requests):
                strike_at = now
            if strike_at is not None and now >= strike_at and kinds and self._has_head:
                if self.strike(kinds[0]):
                    self.injected.append(kinds.pop(0))
                else:
                    kinds.append(kinds.pop(0))
                strike_at = now + self.rng.uniform(0.3, 1.5)
        for _, act in self._later:
            act()
        self.proxy.clear()
        for driver in self.drivers:
            try:
                driver.wait(60)
            except subprocess.TimeoutExpired:
                driver.kill()
                driver.wait()
        return [d.returncode for d in self.drivers]

    def strike(self, kind: str) -> bool:
        """False where there is nobody to strike."""
        if kind in STORE:
            mode, times = STORE[kind]
            fault = self.proxy.inject(mode, "/out/", times=times, seconds=0.3)  # type: ignore[arg-type]
            self._later.append((time.monotonic() + STORE_MOST_S, lambda: setattr(fault, "times", 0)))
            return True
        if kind == "second driver":
            self.start_driver()
            return True
        if kind == "store killed":
            assert isinstance(self.server, CephGateway)
            self.server.restart_gateway()
            return True
        found = self._process(kind.partition(" ")[0])
        if found is None:
            return False
        try:
            if kind.endswith("stopped for a while"):
                found.suspend()
                self._later.append((time.monotonic() + self.rng.uniform(0.5, 3.0), lambda: self._wake(found)))
            elif kind.endswith("terminated"):
                found.terminate()
            else:
                found.kill()
        except psutil.Error:
            return False
        if kind in ("raylet killed", "raylet terminated"):
            self.cluster.add_node(cpus=1)
        if kind == "head killed":
            self._has_head = False  # the drivers notice, and end
        return True

    @staticmethod
    def _wake(process: psutil.Process) -> None:
        try:
            process.resume()
        except psutil.Error:
            pass

    def _process(self, what: str) -> psutil.Process | None:
        nodes: list[RayNode] = self.cluster.nodes[1:]
        if what == "worker":
            some = [w for n in nodes for w in n.workers()]
        elif what == "raylet":
            some = [p for n in nodes for p in n.processes() if p.name() == "raylet"]
        elif what == "head":
            some = [self.cluster.nodes[0].head_service()]
        elif what == "driver":
            some = [psutil.Process(d.pid) for d in self.drivers if d.poll() is None]
        else:
            port = int(self.store.url.rpartition(":")[2])
            some = [psutil.Process(pid) for pid in _listeners(port)]
        return self.rng.choice(some) if some else None

    def fetched(self) -> Path:
        """The output as the store has it, by a client of its own."""
        client, folder = self.store.client(), self.folder / "fetched"
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket):
            for item in page.get("Contents", ()):
                path = folder / item["Key"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.get_object(Bucket=self.bucket, Key=item["Key"])["Body"].read())
                if not item["Key"].startswith("out/"):
                    raise AssertionError(f"{item['Key']} is outside the output")
        return folder / "out"


def _listeners(port: int) -> set[int]:
    """The processes of ours that listen on a port."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if any(
                c.status == psutil.CONN_LISTEN and c.laddr.port == port
                for c in process.net_connections("tcp")
            ):
                found.add(process.pid)
        except psutil.Error:
            pass
    return found


def run_one(seed: int, folder: Path, server: CephGateway | MotoServer) -> dict[str, Any]:
    """One storm, judged."""
    folder.mkdir(parents=True)
    began, proxy = time.monotonic(), FaultProxy(server.endpoint)
    proxy.start()
    os.environ.update(proxy.endpoint.env())  # for the job's driver and workers (`support.jobs`)
    storm = None
    try:
        storm = RayStorm(seed, folder, server, proxy)
        codes = storm.run()
    finally:
        for driver in storm.drivers if storm else ():
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        if storm:
            storm.close()
        proxy.stop()
    problems = []
    if not any(code in (0, 3) for code in codes):
        problems.append(f"unfinished: drivers ended with {codes}")
    else:
        problems += oracle.image_problems(storm.fetched(), storm.prompts.read_text().splitlines())
    problems += [p for d in storm.drivers for p in oracle.orphans(d.pid)]
    seconds = round(time.monotonic() - began, 1)
    return {"run": seed, "faults": storm.injected, "codes": codes, "seconds": seconds, "problems": problems}


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.chaos.on_ray")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cluster is stopped, too
    environment, results = describe_machine(), []
    with CephGateway() if CephGateway.missing() is None else MotoServer() as server:
        for seed in range(options.seed, options.seed + options.runs):
            results.append(run_one(seed, options.folder / str(seed), server))
            print(json.dumps(results[-1]), flush=True)
    if options.record is not None:
        faults = {k: sum(r["faults"].count(k) for r in results) for k in KINDS}
        counts = {"faults_injected": sum(faults.values()), "kinds": faults, "runs": results}
        write_result(
            {"what": "storms on Ray", **counts, "store": type(server).__name__, "environment": environment},
            str(options.record),
        )
    return int(any(r["problems"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
