"""`python -m support.chaos.on_ray FOLDER [--seed N] [--runs N] [--images N]`: storms over a real Ray cluster and an S3 server.

The driver is the command that people run; head, raylets, workers and store are what they have; only boards and what is drawn on
them are stand-ins. First the job runs undisturbed in the same cluster: its hashes, seconds and joules are what the storm's job is
held against, by the oracles of the other storms. Prints a line of JSON per run; exit code 1 where there was a problem.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from s3_servers import CephGateway, FaultProxy, MotoServer
from support import boards
from support.chaos import in_ray, oracle
from support.chaos.ray_faults import MAY_HIDE_ENERGY, RayStorm, storm
from support.chaos.ray_world import MOST_S, RayWorld
from support.counter_judge import Verdict, judge

from millijoule.jobs.machine import describe_machine
from millijoule.workers.meters.meter import read_boot_id

#: What a run's folder may hold.
_OURS = {
    *("hosts", "armed", "ill", "injected", "names", "tmp", "prompts.txt", "driver.log"),
    *("fetched-out", "fetched-calm"),
}


class _History:
    """Of the boards, from now on."""

    def __init__(self, world: RayWorld) -> None:
        self.world = world
        self.began = {b.uuid: len(b.records()) - 1 for b in world.boards}
        for path in (world.folder / "names").iterdir():
            path.unlink()

    def records(self) -> dict[str, list[boards.Record]]:
        return {b.uuid: b.records()[self.began[b.uuid] :] for b in self.world.boards}

    def verdict(self, output: Path) -> Verdict:
        history = {uuid: ([read_boot_id()], records) for uuid, records in self.records().items()}
        return judge(output, history, in_ray.names(self.world.folder), self.world.lost_books)

    def spent_mj(self) -> int:
        return sum(
            after.value_mj - before.value_mj
            for records in self.records().values()
            for before, after in pairwise(records)
            if after.kind == boards.SPEND
        )


def calm(world: RayWorld) -> dict[str, Any]:
    """The job, undisturbed."""
    history, began = _History(world), time.monotonic()
    code = world.start_driver("calm").wait(MOST_S)
    seconds = time.monotonic() - began
    output = world.fetched("calm")
    verdict = history.verdict(output)
    problems = [*verdict.problems, *oracle.image_problems(output, world.prompts)]
    if code != 0 or verdict.outcome != "certified" or problems:
        raise SystemExit(f"an undisturbed run is not as it should be: {code} {verdict} {problems}")
    return {"done_s": seconds, "spent_mj": history.spent_mj(), "hashes": oracle.hashes(output)}


def judged(world: RayWorld, undisturbed: dict[str, Any]) -> dict[str, Any]:
    """The storm, and what it left."""
    world.drivers.clear()
    history, began = _History(world), time.monotonic()
    world.run()
    done_s = time.monotonic() - began
    codes = [driver.poll() for driver in world.drivers]
    world.wait_for_drivers()
    spent_mj = history.spent_mj()
    result: dict[str, Any] = {"codes": codes, "done_s": round(done_s, 1), "spent_mj": spent_mj}
    if not any(code in (0, 3) for code in codes):
        world.problems.append(f"unfinished: drivers ended with {codes}")
        return {**result, "outcome": "unfinished", "certified_mj": None}
    world.end()
    output = world.fetched("out")
    verdict = history.verdict(output)
    world.problems += verdict.problems
    world.problems += oracle.image_problems(output, world.prompts, undisturbed["hashes"])
    world.problems += world.check()
    struck = {line["kind"] for line in world.ground.written()}
    if verdict.outcome == "missing" and not struck & MAY_HIDE_ENERGY:
        world.problems.append(f"energy is missing though its counters could be read: {verdict.reasons}")
    world.damage_objects(output)
    world.problems += oracle.stray_files(world.folder, _OURS)
    return {
        **result,
        "outcome": verdict.outcome,
        "certified_mj": verdict.total_mj,
        "reasons": verdict.reasons,
    }


def run_one(one: RayStorm, folder: Path, server: CephGateway | MotoServer) -> dict[str, Any]:
    """One storm, judged; its folder stays where there were problems."""
    folder.mkdir(parents=True)
    began, proxy = time.monotonic(), FaultProxy(server.endpoint)
    proxy.start()
    os.environ.update(proxy.endpoint.env())  # for the job's driver and workers (`support.jobs`)
    world = RayWorld(one, folder, server, proxy)
    try:
        world.start_cluster()
        undisturbed = calm(world)
        found = judged(world, undisturbed)
    finally:
        for driver in world.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
        world.close()
        proxy.stop()
    result = {
        "run": one.seed,
        "commit": describe_machine()["commit"],
        "images": one.images,
        "store": type(server).__name__,
        "faults": [line["kind"] for line in world.ground.written()],
        **found,
        "calm_done_s": round(undisturbed["done_s"], 1),
        "calm_spent_mj": undisturbed["spent_mj"],
        "processes": len(in_ray.names(folder)) + len(world.drivers),
        "seconds": round(time.monotonic() - began, 1),
        "problems": world.problems,
    }
    if not world.problems and "MILLIJOULE_KEEP_RUNS" not in os.environ:
        shutil.rmtree(folder)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.chaos.on_ray")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument(
        "--images", type=int, help="fewer for a short one; what is left to strike then does not strike"
    )
    parser.add_argument("--kinds", help="these, and no others, with commas")
    parser.add_argument("--quick-store", action="store_true", help="moto, even where Ceph is installed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cluster is stopped, too
    ceph = CephGateway.missing() is None and not options.quick_store
    failed = False
    with CephGateway() if ceph else MotoServer() as server:
        for seed in range(options.seed, options.seed + options.runs):
            one = storm(seed, store_may_end=ceph)
            if options.images:
                one = replace(one, images=options.images)
            if options.kinds:
                one = replace(one, kinds=tuple(options.kinds.split(",")))
            folder = options.folder / str(seed)
            for i in range(1, 10**6):
                if not folder.exists():
                    break
                folder = options.folder / f"{seed}.{i}"
            result = run_one(one, folder, server)
            failed = failed or bool(result["problems"])
            print(json.dumps(result), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
