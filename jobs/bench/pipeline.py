"""`millijoule bench pipeline`: what Ray, leases and commits cost, as ratios taken in one run.

Compared are whole processes, start to end: a bare loop (the same generator, encoder and writer in as many processes,
no Ray, no plan, no commits) and `millijoule generate` on a running Ray cluster. Every raw row is in the result file.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.jobs.bench.ray_head import RayHead
from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment


@dataclass(frozen=True)
class BenchOptions:
    """Measure the pipeline and write the result file, raw rows included."""

    output: str = "benchmarks/pipeline"
    """Folder for the result file (JSON)."""

    images: int = 20_000
    """Images per run of the throughput comparison."""

    pairs: int = 3
    """Runs of each side, in turn."""

    processes: int = 2
    """Processes of the bare loop, and workers of the job."""

    plan_rows: int = 1_000_000
    """Rows of the large plan (the small one has 10,000)."""

    resume_shards: int = 100_000
    """Committed shards of the output that is resumed."""

    leases: int = 5_000
    """Leases of the lease-rate measurement."""


def run(options: BenchOptions) -> int:
    result: dict[str, Any] = {"what": "pipeline", "environment": environment(), "options": options.__dict__}
    for name, measure in (
        ("throughput", throughput),
        ("planning", planning),
        ("resume", resume),
        ("leases", leases),
    ):
        print(f"{name} ...", file=sys.stderr, flush=True)
        result[name] = measure(options)
        print(json.dumps({k: v for k, v in result[name].items() if k != "rows"}, indent=2), file=sys.stderr)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-{result['environment']['commit'][:7]}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)
    return COMPLETE


# -- throughput --------------------------------------------------------------------------------------------------


def throughput(options: BenchOptions) -> dict[str, Any]:
    """Whole-process seconds of job and bare loop for the same prompts, in turn on the same machine."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch:
        prompts = Path(scratch, "prompts.txt")
        _write_prompts(prompts, options.images)
        with RayHead(options.processes) as address:
            for pair in range(options.pairs):
                order = ("bare", "job") if pair % 2 == 0 else ("job", "bare")
                for side in order:
                    output = Path(scratch, f"{side}-{pair}")
                    command = (
                        _bare_command(prompts, output, options)
                        if side == "bare"
                        else _job_command(prompts, output, options, address)
                    )
                    rows.append({"side": side, "pair": pair, **_timed(command)})
                    if side == "job":
                        stats = json.loads((output / "stats.json").read_text())
                        rows[-1]["seconds_first_to_last_commit"] = stats["seconds_first_to_last_commit"]
    ratios = [_seconds(rows, "bare", p) / _seconds(rows, "job", p) for p in range(options.pairs)]
    return {
        "images": options.images,
        "throughput_of_bare_loop": statistics.median(ratios),
        "ratios": ratios,
        "goal": "at least 0.85",
        "goal_met": statistics.median(ratios) >= 0.85,
        "rows": rows,
    }


def _seconds(rows: list[dict[str, Any]], side: str, pair: int) -> float:
    return next(r["seconds"] for r in rows if r["side"] == side and r["pair"] == pair)


def _write_prompts(path: Path, n: int) -> None:
    from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, NOUNS

    with path.open("w") as file:
        for i in range(n):
            noun, colour = NOUNS[i % len(NOUNS)], COLOURS[i // len(NOUNS) % len(COLOURS)]
            ground = BACKGROUNDS[i // 7 % len(BACKGROUNDS)]
            file.write(f"a {colour} {noun} on a {ground} background\n")


def _bare_command(prompts: Path, output: Path, options: BenchOptions) -> list[str]:
    return [
        sys.executable,
        "-m",
        "millijoule.jobs.bench.bare_loop",
        str(prompts),
        str(output),
        str(options.processes),
    ]


def _job_command(prompts: Path, output: Path, options: BenchOptions, address: str) -> list[str]:
    return [
        *(sys.executable, "-m", "millijoule.jobs.generate", "--quiet", "--ray-address", address),
        *("--prompts", str(prompts), "--output", str(output), "--workers", str(options.processes)),
    ]


def _timed(command: list[str]) -> dict[str, Any]:
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return {
        "seconds": time.monotonic() - began,
        "child_cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    }


# -- planning, resume, leases: each in a process of its own, so that memory and time are its own ------------------


def planning(options: BenchOptions) -> dict[str, Any]:
    """Seconds to plan a large Parquet file, and the planner's peak memory for a small and a large one."""
    rows = [_probe("plan", n) for n in (10_000, options.plan_rows, 10_000, options.plan_rows)]
    small = min(r["peak_rss_mb"] for r in rows if r["rows"] == 10_000)
    large = max(r["peak_rss_mb"] for r in rows if r["rows"] == options.plan_rows)
    seconds = statistics.median(r["seconds"] for r in rows if r["rows"] == options.plan_rows)
    return {
        "seconds": seconds,
        "goal": "under 20 s for 1,000,000 rows",
        "goal_met": seconds < 20,
        "peak_rss_mb_small": small,
        "peak_rss_mb_large": large,
        "memory_ratio": large / small,
        "rows": rows,
    }


def resume(options: BenchOptions) -> dict[str, Any]:
    """Seconds from starting to resume an output with many committed shards to the first lease."""
    rows = [_probe("resume", options.resume_shards)]
    seconds = rows[0]["seconds"]
    return {"seconds": seconds, "goal": "under 5 s", "goal_met": seconds < 5, "rows": rows}


def leases(options: BenchOptions) -> dict[str, Any]:
    """Leases per second through Ray, with workers that return at once."""
    rows = [_probe("leases", options.leases)]
    rate = rows[0]["leases_per_second"]
    return {"leases_per_second": rate, "goal": "at least 1,000", "goal_met": rate >= 1000, "rows": rows}


def _probe(name: str, n: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "millijoule.jobs.bench.probes", name, str(n)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"probe {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> int:
    return run_command("bench pipeline", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
