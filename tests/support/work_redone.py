"""How much is drawn again after a worker's death, or after its node is taken away, at random moments of real jobs on a real Ray.

`python -m support.work_redone WORKERS RECORD [kill] [notice]` (in `tests/`): until so many workers were killed (kill -9 of the process),
and as many have left (SIGTERM to their node's `ray start`). What the record has already is kept and counts. The model notes each image as it begins it, so an image that was drawn twice
stands there twice; nothing that the job itself counts is believed. Shards are long and parts short: the ratio is what counts.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.cluster import RayCluster, RayNode
from support.jobs import assert_exactly_once, start, write_prompts
from support.models import Plain

from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result

PART_S, IMAGE_S, SHARD_IMAGES, SHARDS, WORKERS = 1.0, 0.01, 300, 110, 4
DRAIN_S = 40
KINDS = ("kill", "notice")


class _Notes(Plain):
    def __init__(self, device: str) -> None:
        super().__init__(device, IMAGE_S)
        path = Path(os.environ["MILLIJOULE_TEST_DIR"], "drawn")
        self.notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def draw(self, request: Any) -> Any:
        if request.prompt_id != "warm-up":
            os.write(self.notes, f"{os.getpid()} {time.monotonic():.6f} {request.prompt_id}\n".encode())
        return super().draw(request)


def notes(device: str) -> Plain:
    """The model."""
    return _Notes(device)


@dataclass
class Drawn:
    """What was drawn so far: by process, when it began which image; by image, who began it when."""

    by_pid: dict[int, list[tuple[float, str]]] = field(default_factory=lambda: defaultdict(list))
    of_image: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def read(cls, folder: Path) -> Drawn:
        drawn, path = cls(), folder / "drawn"
        for line in path.read_text().splitlines() if path.exists() else ():
            pid, began, image = line.split()
            drawn.by_pid[int(pid)].append((float(began), image))
            drawn.of_image[image].append((float(began), int(pid)))
        return drawn

    def at_work(self) -> list[int]:
        """Processes that began an image within the last second."""
        return [pid for pid, ours in self.by_pid.items() if ours[-1][0] > time.monotonic() - 1.0]

    def redone(self, pid: int, ended: float) -> tuple[int, float]:
        """Images of a process, and the seconds it was at them, that others began later."""
        ours = self.by_pid[pid]
        until = [*(began for began, _ in ours[1:]), ended]
        again = [
            min(end - began, 1.0)
            for (began, image), end in zip(ours, until, strict=True)
            if any(other != pid and at > began for at, other in self.of_image[image])
        ]
        return len(again), sum(again)


def run_job(kind: str, most: int, dice: random.Random) -> list[dict[str, Any]]:
    """One job, to which `kind` happens at most so often; a row for each worker that it lost."""
    lost: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="mj-redone-") as name:
        folder = Path(name)
        env, cpus = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)}, WORKERS if kind == "kill" else 0
        with RayCluster(head_cpus=cpus, env=env) as cluster:
            nodes = [_add_node(cluster) for _ in range(2 if kind == "notice" else 0)]
            images = SHARDS * SHARD_IMAGES
            prompts, out = write_prompts(folder / "prompts.txt", images), folder / "out"
            what = ("--prompts", prompts, "--output", out, "--shard-size", SHARD_IMAGES, "--no-speculate")
            model = ("--model", "python:support.work_redone:notes", "--workers", WORKERS)
            driver = start(folder, *what, *model, "--part-seconds", PART_S, ray=cluster.address)
            for _ in _moments(folder, out, driver, most if kind == "kill" else most // (WORKERS // 2), dice):
                if not (pids := Drawn.read(folder).at_work()):
                    continue
                if kind == "kill":
                    lost[pid := dice.choice(pids)] = time.monotonic()
                    os.kill(pid, signal.SIGKILL)
                else:
                    nodes.append(_take_away(nodes.pop(0), cluster, pids, lost))
            code, log = driver.wait(600), (folder / "driver.log").read_text()
        assert code == 0, log
        assert_exactly_once(out, images)
        drawn = Drawn.read(folder)
    rows = []
    for pid, ended in lost.items():
        n, seconds = drawn.redone(pid, min(ended, drawn.by_pid[pid][-1][0] + 1.0))
        rows.append(
            {
                "kind": kind,
                "images_of_worker": len(drawn.by_pid[pid]),
                "images_redone": n,
                "seconds_redone": round(seconds, 4),
                "parts_redone": round(seconds / PART_S, 4),
                "load_average": os.getloadavg()[0],
            }
        )
    twice = sum(len(by) - 1 for by in drawn.of_image.values())
    by_others = twice - sum(row["images_redone"] for row in rows)
    print(
        json.dumps({"kind": kind, "lost": len(rows), "drawn twice for another reason": by_others}), flush=True
    )
    if by_others:
        print(log, flush=True)
    return [{**row, "job_images_redone_otherwise": by_others} for row in rows]


def _moments(folder: Path, out: Path, driver: Any, most: int, dice: random.Random) -> Iterator[None]:
    """Random moments at which all workers are at work, and what the one before met is committed; not near the job's end."""
    hit = 0  # shards from here on were in nobody's hands at the moment before: a second death there would begin a search
    for _ in range(most):
        while True:
            there = {int(path.stem) for path in out.glob("_job/commits/*/*.json")}
            if len(there) > SHARDS - 4 * WORKERS or driver.poll() is not None:
                return
            drawn = Drawn.read(folder)
            if len(drawn.at_work()) >= WORKERS and set(range(hit)) <= there:
                break
            time.sleep(0.2)
        time.sleep(dice.uniform(0.0, SHARD_IMAGES * IMAGE_S))
        drawn = Drawn.read(folder)
        if drawn.at_work():
            at_work = [int(drawn.by_pid[pid][-1][1][:8]) // SHARD_IMAGES for pid in drawn.at_work()]
            hit = max(at_work) + WORKERS + 1
            yield


def _add_node(cluster: RayCluster) -> RayNode:
    """A node for half of the workers. On a very busy machine Ray gives one up after half a minute."""
    while True:
        try:
            return cluster.add_node(WORKERS // 2)
        except RuntimeError as error:
            print(f"another try: {str(error)[-100:]}", flush=True)


def _take_away(node: RayNode, cluster: RayCluster, pids: list[int], lost: dict[int, float]) -> RayNode:
    """SIGTERM to a node, on which some of the workers `pids` are; returns the one that takes its place."""
    ours = {process.pid for process in node.workers()} & set(pids)
    node.process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    another: list[RayNode] = []
    thread = threading.Thread(target=lambda: another.append(_add_node(cluster)))
    thread.start()
    there = [process for process in psutil.process_iter() if process.pid in ours]
    psutil.wait_procs(there, timeout=DRAIN_S)
    lost.update(dict.fromkeys(ours, max(time.monotonic(), sent)))
    thread.join()
    return another[0]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = sorted(row["parts_redone"] for row in rows)
    return {
        "workers_lost": len(parts),
        "parts_redone_mean": sum(parts) / len(parts),
        "parts_redone_median": parts[len(parts) // 2],
        "parts_redone_most": parts[-1],
        "more_than_one_part": sum(p > 1 for p in parts),
    }


def main(workers: str, record: str, *kinds: str) -> None:
    dice = random.Random(time.time_ns())
    rows = json.loads(Path(record).read_text())["rows"] if Path(record).exists() else []
    for kind in kinds or KINDS:
        while (n := sum(row["kind"] == kind for row in rows)) < int(workers):
            rows += run_job(kind, int(workers) - n, dice)
            write_result(
                {
                    "what": "work drawn again after workers were killed (kill -9), or left a node that got SIGTERM, at random moments",
                    "setting": {
                        "part_seconds": PART_S,
                        "seconds_per_image": IMAGE_S,
                        "images_per_shard": SHARD_IMAGES,
                        "workers": WORKERS,
                        "seconds_of_notice": DRAIN_S,
                    },
                    "goal": {"parts_redone_most": 1},
                    **{
                        k: summary(ours) for k in KINDS if (ours := [row for row in rows if row["kind"] == k])
                    },
                    "rows": rows,
                    "environment": describe_machine(),
                },
                record,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
