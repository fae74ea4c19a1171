"""`millijoule bench scaling`: what a second worker adds, beside what a second process adds where there is no Ray.

A job with two workers against one with one, on as many CPUs, by its rate between start and finish: from the first draw to the
last commit. Everything of a run, Ray and driver included, is bound to its one or two CPUs: a worker draws, encodes and stores in
threads beside each other, and one alone would take the second CPU, too. What two processes of this machine can do at all, of one
physical core's two hardware threads or beside other work, says the control: the bare loop of `bench pipeline`, in two processes
against one, bound alike. All four run in turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.jobs.bench.pipeline import draw_part, first_to_last, write_prompts
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    describe,
    start_alone,
    write_result,
)
from millijoule.jobs.measuring.process import TreeCpu
from millijoule.jobs.measuring.ray_head import ray_head
from millijoule.workers.errors import InputError

GOAL = "two workers at least 1.85 times as fast as one"


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure two workers against one, and two plain processes against one."""

    images: int = 400_000
    """Images per run of the light model, `default`."""

    heavy_images: int = 32
    """Images per run of the heavy model, `baseline`; 0: none."""

    pairs: int = 3
    """Times that all four sides of a model are run, in turn."""


def run(options: BenchOptions) -> int:
    models = {"default": options.images, "baseline": options.heavy_images}
    measured = {model: scaling(model, n, options.pairs) for model, n in models.items() if n}
    load = {
        "cpus": os.cpu_count(),
        "load_average_at_the_end": os.getloadavg()[0],
        "threads_per_core": threads_per_core(),
    }
    result = {
        **describe("two workers against one", options),
        "goal": GOAL,
        "machine": load,
        "models": measured,
    }
    write_result(result, options.result)
    return COMPLETE


def scaling(model: str, images: int, pairs: int) -> dict[str, Any]:
    """Rates of jobs of one and two workers, and of the bare loop in one and two processes, each with its raw row."""
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="millijoule-bench-"))
        addresses = {}
        for n in (1, 2):
            with bound_to_cpus(n):
                addresses[n] = stack.enter_context(ray_head(n))
        prompts = Path(scratch, "prompts.txt")
        write_prompts(prompts, images)

        def bare(n: int, output: Path) -> float:
            parts = [start_alone(draw_part, i, n, str(prompts), str(output), model) for i in range(n)]
            return first_to_last(parts)

        def job(n: int, output: Path) -> float:
            command = [sys.executable, "-m", "millijoule.jobs.generate", "--quiet"]
            command += ["--ray-address", addresses[n], "--workers", str(n), "--model", model]
            command += ["--prompts", str(prompts), "--output", str(output)]
            command += ["--shard-size", str(max(1, min(images // 16, 4096)))]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            return float(json.loads((output / "stats.json").read_text())["seconds_first_to_last_commit"])

        sides = [(bare, 1), (bare, 2), (job, 1), (job, 2)]
        for pair in range(pairs):
            for side, n in sides if pair % 2 == 0 else reversed(sides):
                output = Path(scratch, f"{side.__name__}-{n}-{pair}")
                with TreeCpu() as cpu, bound_to_cpus(n):
                    began = time.monotonic()
                    working = side(n, output)
                    seconds = time.monotonic() - began
                rows.append(
                    {
                        "side": side.__name__,
                        "processes": n,
                        "pair": pair,
                        "images_per_second": images / working,
                        "seconds_between_start_and_finish": working,
                        "seconds": seconds,
                        "cpu_seconds": cpu.seconds,
                    }
                )
    return {"images": images, **summary(rows), "rows": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast two are as one, of each side and pair; and a job's of that of the bare loop in the same pair."""
    rates = {(row["side"], row["processes"], row["pair"]): row["images_per_second"] for row in rows}
    pairs = sorted({row["pair"] for row in rows})
    two_of_one = {
        side: [rates[side, 2, pair] / rates[side, 1, pair] for pair in pairs] for side in ("job", "bare")
    }
    of_control = [job / bare for job, bare in zip(two_of_one["job"], two_of_one["bare"], strict=True)]
    return {
        "two_workers_of_one": {"median": statistics.median(two_of_one["job"]), "ratios": two_of_one["job"]},
        "two_processes_of_one": {
            "median": statistics.median(two_of_one["bare"]),
            "ratios": two_of_one["bare"],
        },
        "workers_of_processes": {"median": statistics.median(of_control), "ratios": of_control},
    }


@contextmanager
def bound_to_cpus(n: int) -> Iterator[None]:
    """Whatever is started meanwhile runs on the first `n` CPUs that this process may use.

    Raises:
        InputError: there are fewer, or the system binds no processes.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("bench scaling needs a system that binds processes to CPUs, such as Linux")
    mine = os.sched_getaffinity(0)
    if len(mine) < n:
        raise InputError(f"bench scaling needs {n} CPUs; here {len(mine)} may be used")
    os.sched_setaffinity(0, sorted(mine)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def threads_per_core() -> int | None:
    """Hardware threads that share the core of CPU 0, as the kernel knows it; None: it does not say. A virtual machine's may be told less."""
    try:
        shared = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list").read_text()
    except OSError:
        return None
    return len([cpu for part in shared.split(",") for cpu in range(*_span(part))])


def _span(text: str) -> tuple[int, int]:
    first, _, last = text.strip().partition("-")
    return int(first), int(last or first) + 1
