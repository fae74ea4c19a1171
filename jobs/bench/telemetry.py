"""`millijoule bench telemetry`: what measuring energy costs, in throughput, CPU time and memory.

The same job runs with telemetry on (A) and with `--no-telemetry` (B), in quadruples ABBA and BAAB on one Ray cluster:
drift that is linear in time cancels within a quadruple. Three answers, from least to most robust on a shared machine:

* **throughput** of A against B, images per second from first to last commit; every disturbance of the machine is in it;
* **CPU time** of A's processes against B's, per image; waiting is not in it, but caches and clock frequency are;
* **parts**: CPU time of the calls and threads that are telemetry, noted as they run, what the same calls take in B
  subtracted; as a share of the job's CPU time. Work on a thread that draws costs at most that share of throughput.

An interval is over quadruples (the expanded percentile of `pipeline.comparison.statistics`). The goal is met only where
the whole interval is below it, and missed where it is above; everything else is "not resolved". Memory is measured in the
jobs, and stressed: the workers of a node of eight boards for minutes, each second a look at every device, with rings
filled to their bound, and the driver's tables of the hours behind.

Counters that the machine does not have are stood in for (`bench_stand_ins`); the result says which.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from millijoule.jobs.bench.pipeline import _timed, _write_prompts
from millijoule.jobs.bench.ray_head import RayHead
from millijoule.jobs.bench.stand_ins import StandInPowercap
from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment
from millijoule.pipeline.comparison.statistics import draw_indices, expanded_level
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.nvml import Gpus, installed_gpus, open_gpus

GOAL_SHARE = 0.005
GOAL_MB_PER_NODE = 30.0
CONFIDENCE = 0.95
RESAMPLES = 10_000

#: Calls that a job without telemetry needs too, though they take less there. The rest is telemetry's whole, also the
#: tables of a job without it, which say that everything is missing.
IN_BOTH = ("boundary reads", "commit JSON", "running totals")

#: What the driver does when no image is made any more; `bench finish` has it for many shards.
AT_THE_END = ("ledger at the end", "tables at the end")

SIDES = {"A": "on", "B": "off"}
ORDERS = ("ABBA", "BAAB")


@dataclass(frozen=True)
class BenchOptions:
    """Measure what telemetry costs and write the result file, raw rows included."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

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
    result: dict[str, Any] = {
        "what": "telemetry",
        "options": asdict(options),
        "environment": environment(),
        "counters": own,
    }
    with (
        tempfile.TemporaryDirectory(prefix="millijoule-bench-", dir=_memory_folder()) as scratch,
        StandInPowercap(Path(scratch, "powercap")) as stand_in,
    ):
        # Modules compiled before, as on every machine but the first time: compiling would be taken for telemetry's memory.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(Path(scratch, "bytecode"))
        powercap = None if own["rapl"] == "real" else str(stand_in)
        result |= compare(options, Path(scratch), powercap)
        result["stress"] = stress(options, Path(scratch), powercap)
    text = json.dumps(result, indent=2) + "\n"
    if options.result is not None:
        Path(options.result).write_text(text)
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=2))
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


def _memory_folder() -> str | None:
    """Powercap files are not on a disk; neither is their stand-in, where there is a folder in memory."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# -- jobs with and without ------------------------------------------------------------------------------------------


def compare(options: BenchOptions, scratch: Path, powercap: str | None) -> dict[str, Any]:
    """The jobs' rows, and the three answers from them."""
    prompts = scratch / "prompts.txt"
    _write_prompts(prompts, options.images)
    rows = []
    with RayHead(options.workers) as address:
        job(
            "on", options, prompts, address, powercap
        )  # files in the page cache, modules compiled; not counted
        for quadruple in range(options.quadruples):
            for block, side in enumerate(ORDERS[quadruple % 2]):
                rows.append(
                    {
                        "quadruple": quadruple,
                        "block": block,
                        "side": side,
                        **job(SIDES[side], options, prompts, address, powercap),
                    }
                )
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return {**answers(rows), "rows": rows}


def job(
    side: str, options: BenchOptions, prompts: Path, address: str, powercap: str | None
) -> dict[str, Any]:
    """One job in processes of its own: seconds, CPU seconds and memory."""
    with tempfile.TemporaryDirectory(dir=prompts.parent) as folder:
        output, notes = Path(folder, "out"), Path(folder, "notes")
        notes.mkdir()
        command = [sys.executable, "-m", "millijoule.jobs.bench.telemetry_job", side]
        command += [str(prompts), str(output), address, str(options.workers), str(notes)]
        took = _timed(command + ([powercap] if powercap else []))
        stats = json.loads((output / "stats.json").read_text())
        noted = [json.loads(p.read_text()) for p in sorted(notes.glob("*.json"))]
    workers = [n for n in noted if n["role"] == "worker"]
    (driver,) = (n for n in noted if n["role"] == "driver")
    if len(workers) != options.workers:
        raise RuntimeError(f"{len(workers)} of {options.workers} workers left a note")
    seconds = stats["seconds_first_to_last_commit"]
    return {
        "images": stats["images_ok"],
        "seconds_first_to_last_commit": seconds,
        "images_per_second": stats["images_ok"] / seconds,
        "seconds_whole_job": took["seconds"],
        "domains": sorted({d.split(":")[0] for w in workers for d in w["domains"]}),
        "worker_seconds": sum(w["seconds_since_ready"] for w in workers),
        "worker_cpu_s": sum(w["cpu_s_since_ready"] for w in workers),
        "driver_cpu_s": driver["cpu_s"],
        "job_cpu_s": sum(w["cpu_s"] for w in workers) + driver["cpu_s"],
        "worker_parts_cpu_s": _added(w["telemetry_cpu_s"] for w in workers),
        "driver_parts_cpu_s": driver["telemetry_cpu_s"],
        "worker_calls": _added(w["calls"] for w in workers),
        "driver_calls": driver["calls"],
        "worker_pss_mb": sum(w["memory_mb"]["pss"] for w in workers),
        "driver_pss_mb": driver["memory_mb"]["pss"],
        "driver_peak_mb": driver["peak_mb"],
    }


def _added(parts: Any) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def answers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Costs from the rows of the jobs; a share is what telemetry adds to, or takes off, the job without it."""

    def parts_s(row: dict[str, Any], who: str, at_the_end: bool = False) -> float:
        return math.fsum(
            seconds
            for name, seconds in row[f"{who}_parts_cpu_s"].items()
            if (name in AT_THE_END) == at_the_end and (row["side"] == "A" or name in IN_BOTH)
        )

    def part_means(who: str, side: str) -> dict[str, float]:
        chosen = [r[f"{who}_parts_cpu_s"] for r in rows if r["side"] == side]
        return {
            k: statistics.fmean(c.get(k, 0.0) for c in chosen) for k in sorted({k for c in chosen for k in c})
        }

    off = [r for r in rows if r["side"] == "B"]
    job_s, worker_s = (statistics.fmean(r[k] for r in off) for k in ("job_cpu_s", "worker_cpu_s"))
    loss = interval(effects(rows, lambda r: -math.log(r["images_per_second"])))
    return {
        "throughput_lost": {"share": loss, **judged(loss, GOAL_SHARE)},
        "worker_cpu_added": _judged_share(rows, lambda r: math.log(r["worker_cpu_s"] / r["images"])),
        "job_cpu_added": _judged_share(rows, lambda r: math.log(r["job_cpu_s"] / r["images"])),
        "parts_of_worker_cpu": _judged_share(rows, lambda r: parts_s(r, "worker") / worker_s),
        "parts_of_job_cpu_while_it_runs": _judged_share(
            rows, lambda r: (parts_s(r, "worker") + parts_s(r, "driver")) / job_s
        ),
        "parts_cpu_s_at_the_end": interval(effects(rows, lambda r: parts_s(r, "driver", at_the_end=True))),
        "parts_cpu_s": {
            f"{who} {SIDES[side]}": part_means(who, side) for who in ("worker", "driver") for side in "AB"
        },
        "memory_added_mb": {
            "worker_pss": interval(effects(rows, lambda r: r["worker_pss_mb"])),
            "driver_pss": interval(effects(rows, lambda r: r["driver_pss_mb"])),
            "driver_peak": interval(effects(rows, lambda r: r["driver_peak_mb"])),
        },
    }


def _judged_share(rows: Sequence[dict[str, Any]], value: Any) -> dict[str, Any]:
    found = interval(effects(rows, value))
    return {"share": found, **judged(found, GOAL_SHARE)}


def effects(rows: Sequence[dict[str, Any]], value: Any) -> list[float]:
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
    probe = [sys.executable, "-m", "millijoule.jobs.bench.telemetry_stress"]
    seconds, book, real = str(options.stress_seconds), scratch / "book", installed_gpus()
    book.mkdir()
    watching = []
    for number in range(options.stress_devices):
        board = ("real", real[number % len(real)]) if real else ("stand-in", str(number))
        command = [*probe, "worker", *board, seconds, str(book), *([powercap] if powercap else [])]
        watching.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    workers = [json.loads(_output_of(process)) for process in watching]
    command = [*probe, "driver", str(options.stress_devices), str(options.stress_hours)]
    driver = json.loads(_output_of(subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
    node_mb = sum(w["private_added_mb"] for w in workers)
    total_mb = node_mb + driver["peak_added_mb"]
    return {
        "workers_private_added_mb": node_mb,
        "driver_peak_added_mb": driver["peak_added_mb"],
        "node_with_driver_mb": total_mb,
        "goal": f"under {GOAL_MB_PER_NODE:g} MB per node",
        "goal_met": total_mb < GOAL_MB_PER_NODE,
        "worker_share_of_a_core": statistics.fmean(w["cpu_s"] / w["seconds"] for w in workers),
        "driver_share_of_a_core": driver["cpu_s"] / (3600 * options.stress_hours),
        "workers": workers,
        "driver": driver,
    }


def _output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} failed")
    return output.splitlines()[-1]


def main(argv: list[str] | None = None) -> int:
    return run_command("bench telemetry", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
