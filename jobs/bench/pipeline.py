"""`millijoule bench pipeline`: what Ray, leases and commits cost, as ratios taken in one run.

Compared are whole processes, start to end: a bare loop (the same generator, encoder and writer in as many processes,
no Ray, no plan, no commits) and `millijoule generate` on a running Ray cluster. Every raw row is in the result file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from millijoule.jobs.bench import bare_loop, probes
from millijoule.jobs.bench.measurement import (
    answer_of,
    describe,
    run_alone,
    start_alone,
    timed,
    write_result,
)
from millijoule.jobs.bench.ray_head import RayHead
from millijoule.jobs.entry import COMPLETE


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
    result = describe("pipeline", options)
    for measure in (throughput, planning, resume, leases):
        print(f"{measure.__name__} ...", file=sys.stderr, flush=True)
        result[measure.__name__] = measure(options)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y-%m-%d')}-{result['environment']['commit'][:7]}.json"
    write_result(result, path)
    print(path)
    return COMPLETE


def throughput(options: BenchOptions) -> dict[str, Any]:
    """Whole-process seconds of job and bare loop for the same prompts, in turn on the same machine."""
    rows: list[dict[str, Any]] = []
    n = options.processes
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch, RayHead(n) as address:
        prompts = Path(scratch, "prompts.txt")
        write_prompts(prompts, options.images)

        def bare(output: Path) -> None:
            parts = [start_alone(bare_loop.draw_part, i, n, str(prompts), str(output)) for i in range(n)]
            for part in parts:
                answer_of(part)

        def job(output: Path) -> None:
            command = [sys.executable, "-m", "millijoule.jobs.generate", "--quiet", "--ray-address", address]
            command += ["--prompts", str(prompts), "--output", str(output), "--workers", str(n)]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)

        for pair in range(options.pairs):
            for side in (bare, job) if pair % 2 == 0 else (job, bare):
                output = Path(scratch, f"{side.__name__}-{pair}")
                rows.append({"side": side.__name__, "pair": pair, **timed(partial(side, output))})
                if side is job:
                    stats = json.loads((output / "stats.json").read_text())
                    rows[-1]["seconds_first_to_last_commit"] = stats["seconds_first_to_last_commit"]
    seconds = {(row["side"], row["pair"]): row["seconds"] for row in rows}
    ratios = [seconds["bare", pair] / seconds["job", pair] for pair in range(options.pairs)]
    return {
        "images": options.images,
        "throughput_of_bare_loop": statistics.median(ratios),
        "ratios": ratios,
        "goal": "at least 0.85",
        "goal_met": statistics.median(ratios) >= 0.85,
        "rows": rows,
    }


def write_prompts(path: Path, n: int) -> None:
    """`n` prompts of one icon each, one a line."""
    from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, NOUNS

    with path.open("w") as file:
        for i in range(n):
            noun, colour = NOUNS[i % len(NOUNS)], COLOURS[i // len(NOUNS) % len(COLOURS)]
            ground = BACKGROUNDS[i // 7 % len(BACKGROUNDS)]
            file.write(f"a {colour} {noun} on a {ground} background\n")


def planning(options: BenchOptions) -> dict[str, Any]:
    """Seconds to plan a large Parquet file, and the planner's peak memory for a small and a large one."""
    rows = [run_alone(probes.plan, n) for n in (10_000, options.plan_rows, 10_000, options.plan_rows)]
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
    row = run_alone(probes.resume, options.resume_shards)
    return {
        "seconds": row["seconds"],
        "goal": "under 5 s",
        "goal_met": row["seconds"] < 5,
        "rows": [row],
    }


def leases(options: BenchOptions) -> dict[str, Any]:
    """Leases per second through Ray, with workers that return at once."""
    row = run_alone(probes.leases, options.leases)
    rate = row["leases_per_second"]
    return {"leases_per_second": rate, "goal": "at least 1,000", "goal_met": rate >= 1000, "rows": [row]}
