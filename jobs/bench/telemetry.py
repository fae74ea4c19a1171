"""`millijoule bench telemetry`: what measuring energy costs, in throughput, CPU time and memory.

The same job runs with telemetry on (A) and with `--no-telemetry` (B), in quadruples ABBA and BAAB on one Ray cluster:
drift that is linear in time cancels within a quadruple. Two answers:

* **throughput** of A against B, images per second from first to last commit; every disturbance of the machine is in it;
* **parts**: CPU time of the calls and threads that are telemetry, noted as they run, what the same calls take in B
  subtracted; as a share of the job's CPU time. Work on a thread that draws costs at most that share of throughput.

An interval is over quadruples (the expanded percentile of `pipeline.comparison.statistics`). The goal is met only where
the whole interval is below it, and missed where it is above; everything else is "not resolved". Memory is measured under
stress: the workers of a node of eight boards for minutes, each second a look at every device, with rings filled to their
bound, and the driver's tables of the hours behind.

Counters that the machine does not have are stood in for (`stand_ins`); the result says which.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millijoule.jobs.bench.pipeline import write_prompts
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring import telemetry_probes as probes
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    answer_of,
    describe,
    run_alone,
    start_alone,
    write_result,
)
from millijoule.jobs.measuring.ray_head import ray_head
from millijoule.jobs.measuring.stand_ins import stand_in_powercap
from millijoule.pipeline.comparison.statistics import draw_indices, expanded_level
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.nvml import Gpus, installed_gpus, open_gpus

Row = Mapping[str, Any]

GOAL_SHARE = 0.005
GOAL_MB_PER_NODE = 30.0
CONFIDENCE = 0.95
RESAMPLES = 10_000

#: Calls that a job without telemetry needs too, though they take less there. The rest is telemetry's whole.
IN_BOTH = ("boundary reads", "commit JSON", "running totals")

ORDERS = ("ABBA", "BAAB")


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure what telemetry costs and write the result file, raw rows included."""

    quadruples: int = 6
    """Of four jobs each."""

    images: int = 8_000
    """Images per job."""

    workers: int = 1
    """Workers of each job: one per GPU, or fewer than cores."""

    stress_devices: int = 8
    """Boards, and workers, of the node that is stressed."""

    stress_seconds: int = 120
    """How long the stressed workers watch."""

    stress_hours: int = 24
    """Length of the job whose records the stressed driver keeps."""


def run(options: BenchOptions) -> int:
    own = counters_here()
    result: dict[str, Any] = {**describe("telemetry", options), "counters": own}
    # powercap files are not on a disk; neither is their stand-in, where there is a folder in memory
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="millijoule-bench-", dir=memory) as scratch,
        stand_in_powercap(Path(scratch, "powercap")) as stand_in,
    ):
        # Modules compiled before, as on every machine but the first time: compiling would be taken for telemetry's memory.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(scratch, "bytecode"))
        powercap = None if own["rapl"] == "real" else str(stand_in)
        result |= compare(options, Path(scratch), powercap)
        result["stress"] = stress(options, Path(scratch), powercap)
    write_result(result, options.result)
    return COMPLETE


def counters_here() -> dict[str, Any]:
    """Which counters the jobs read: "real" where this machine has readable ones, else "stand-in"; and its boards."""
    rapl = open_meter(None)
    rapl.close()
    boards = Gpus()
    if uuids := installed_gpus():
        boards = open_gpus(uuids)
        boards.close()
    return {
        "rapl": "real" if rapl.domains else "stand-in",
        "nvml": "real" if boards.uuids else "stand-in",
        "boards": boards.names,
        "driver_version": boards.driver_version,
    }


# -- jobs with and without ------------------------------------------------------------------------------------------


def compare(options: BenchOptions, scratch: Path, powercap: str | None) -> dict[str, Any]:
    """The jobs' rows, and the answers from them."""
    prompts = scratch / "prompts.txt"
    write_prompts(prompts, options.images)
    rows = []
    with ray_head(options.workers) as address:
        job("A", options, prompts, address, powercap)  # not counted: files and modules are read and compiled
        for quadruple in range(options.quadruples):
            for block, side in enumerate(ORDERS[quadruple % 2]):
                row = job(side, options, prompts, address, powercap)
                rows.append({"quadruple": quadruple, "block": block, "side": side, **row})
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {**answers(rows), "rows": rows}


def job(
    side: str, options: BenchOptions, prompts: Path, address: str, powercap: str | None
) -> dict[str, Any]:
    """One job in processes of its own: seconds, CPU seconds and memory."""
    with tempfile.TemporaryDirectory(dir=prompts.parent) as folder:
        output = Path(folder, "out")
        where = (str(prompts), str(output), address)
        driver = run_alone(probes.job, side == "A", *where, options.workers, powercap)
        stats = json.loads((output / "stats.json").read_text())
    workers, seconds = driver["workers"], stats["seconds_first_to_last_commit"]
    worker_parts: Counter[str] = Counter()
    for worker in workers:
        worker_parts.update(worker["telemetry_cpu_s"])
    return {
        "images": stats["images_ok"],
        "seconds_first_to_last_commit": seconds,
        "images_per_second": stats["images_ok"] / seconds,
        "domains": sorted({d.split(":")[0] for w in workers for d in w["domains"]}),
        "worker_cpu_s": sum(w["cpu_s_since_ready"] for w in workers),
        "job_cpu_s": sum(w["cpu_s"] for w in workers) + driver["cpu_s"],
        "worker_parts_cpu_s": worker_parts,
        "driver_parts_cpu_s": driver["telemetry_cpu_s"],
    }


def answers(rows: Sequence[Row]) -> dict[str, Any]:
    """Costs from the rows of the jobs; a share is what telemetry adds to, or takes off, the job without it."""

    def parts_s(row: Row, who: str) -> float:
        parts = row[f"{who}_parts_cpu_s"]
        return math.fsum(s for name, s in parts.items() if row["side"] == "A" or name in IN_BOTH)

    def share(value: Callable[[Row], float]) -> dict[str, Any]:
        found = interval(effects(rows, value))
        return {"share": found, **judged(found, GOAL_SHARE)}

    job_s, worker_s = (
        statistics.fmean(r[name] for r in rows if r["side"] == "B") for name in ("job_cpu_s", "worker_cpu_s")
    )
    return {
        "throughput_lost": share(lambda r: -math.log(r["images_per_second"])),
        "parts_of_worker_cpu": share(lambda r: parts_s(r, "worker") / worker_s),
        "parts_of_job_cpu_while_it_runs": share(
            lambda r: (parts_s(r, "worker") + parts_s(r, "driver")) / job_s
        ),
    }


def effects(rows: Sequence[Row], value: Callable[[Row], float]) -> list[float]:
    """Per quadruple the mean of `value` with telemetry minus without."""
    by_number: dict[int, dict[str, list[float]]] = {}
    for row in rows:
        by_number.setdefault(row["quadruple"], {"A": [], "B": []})[row["side"]].append(value(row))
    return [statistics.fmean(v["A"]) - statistics.fmean(v["B"]) for _, v in sorted(by_number.items())]


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of `values` and its bootstrap interval; `low` and `high` are None for less than three values."""
    mean = statistics.fmean(values)
    if len(values) < 3:
        return {"mean": mean, "low": None, "high": None}
    samples = np.array(values)[draw_indices(0, RESAMPLES, len(values))].mean(1)
    level = expanded_level(len(values), CONFIDENCE)
    low, high = np.quantile(samples, (level, 1 - level))
    return {"mean": mean, "low": float(low), "high": float(high)}


def judged(found: dict[str, float | None], goal: float) -> dict[str, Any]:
    """Whether the goal "under `goal`" is met; None: the interval contains it, the measurement does not tell."""
    low, high = found["low"], found["high"]
    met = None if low is None or high is None or low < goal <= high else high < goal
    return {"goal": f"under {goal:.1%}", "goal_met": met, "resolved": met is not None}


# -- stress ---------------------------------------------------------------------------------------------------------


def stress(options: BenchOptions, scratch: Path, powercap: str | None) -> dict[str, Any]:
    """Memory and CPU time of a node's telemetry where there is much of it."""
    book, real = scratch / "book", installed_gpus()
    book.mkdir()
    boards = [real[n % len(real)] if real else n for n in range(options.stress_devices)]
    watching = [
        start_alone(probes.stressed_worker, board, options.stress_seconds, str(book), powercap)
        for board in boards
    ]
    workers = [answer_of(process) for process in watching]
    driver = run_alone(probes.stressed_driver, options.stress_devices, options.stress_hours)
    node_mb = sum(workers)
    total_mb = node_mb + driver["peak_added_mb"]
    return {
        "workers_private_added_mb": node_mb,
        "driver_peak_added_mb": driver["peak_added_mb"],
        "node_with_driver_mb": total_mb,
        "goal": f"under {GOAL_MB_PER_NODE:g} MB per node",
        "goal_met": total_mb < GOAL_MB_PER_NODE,
        "workers_mb": workers,
        "driver": driver,
    }
