"""`millijoule bench finish [RESULT.json]`: seconds and memory of closing the books of a job of many shards, and of `check`.

The job is made up to have as little as possible per shard but its records: one image, two segments with five counters,
a commit and a row table; on a local disk, of sixteen workers on two nodes. `finish_job` is the product's own: ledger,
manifest, nine energy tables, closure checks, `stats.json`. `check` compares the output with its commits afterwards, without
images, because there are none. Each run is in a process of its own; `peak_mb` is what it held at
most, `peak_added_mb` that above what it held before.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, run_alone, write_result
from millijoule.jobs.measuring.process import peak_mb

NODES, WORKERS, SHARD_S, IDLE_S = 2, 16, 30, 1
#: Row tables that differ; the commits take turns, because a hundred thousand files would only measure the disk.
ROW_TABLES = 256
#: Stands beside a job once all of it is made.
MADE = "made"


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure how a job of many shards ends."""

    shards: int = 100_000

    repeats: int = 3
    """Of the whole, and of a job of a tenth of the shards."""

    check: bool = True
    """Measure `check` as well, once per size."""

    folder: str | None = None
    """Where the jobs are made and stay, to be measured again; default: a temporary folder."""


def run(options: BenchOptions) -> int:
    rows, checks = [], []
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch:
        for shards in (options.shards // 10, options.shards):
            folder = Path(options.folder or scratch, str(shards))
            if not (folder / MADE).exists():
                folder.mkdir(parents=True)
                run_alone(make, str(folder), shards)
            for _ in range(options.repeats):
                rows.append(run_alone(finish, str(folder), shards))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if options.check:
                checks.append(run_alone(check, str(folder), shards))
                print(json.dumps(checks[-1]), file=sys.stderr, flush=True)
    small, large = rows[: options.repeats], rows[options.repeats :]
    peaks = [min(r["peak_added_mb"] for r in part) for part in (small, large)]
    result = {
        **describe("finish", options),
        "shards": options.shards,
        "seconds": sorted(r["seconds"] for r in large)[len(large) // 2],
        "cpu_seconds": sorted(r["cpu_seconds"] for r in large)[len(large) // 2],
        "peak_added_mb": peaks[1],
        "mb_per_100_000_shards": (peaks[1] - peaks[0]) / (options.shards - options.shards // 10) * 100_000,
        "rows": rows,
        "check": checks,
    }
    write_result(result, options.result)
    return COMPLETE


def make(folder: str, n: int) -> None:
    """Plan a job of `n` one-image shards in `folder` and commit all of them; each worker makes every sixteenth."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from millijoule.jobs.measuring.made_up import made_up_commit
    from millijoule.pipeline.output.commits import CommitCompactor
    from millijoule.pipeline.output.job import JobSpec, publish_job
    from millijoule.pipeline.planning.make_plan import plan_job
    from millijoule.pipeline.planning.plan_options import PlanOptions
    from millijoule.workers.images.writers import row_table_options
    from millijoule.workers.layout import commit_key
    from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, ImageRequest, ImageRow
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    prompts, output = Path(folder, "prompts.txt"), Path(folder, "out")
    prompts.write_text("".join(f"prompt {i}\n" for i in range(n)))
    store = open_store(str(output))
    made = plan_job(expand_inputs([str(prompts)]), PlanOptions(shard_size=1), store, {})
    spec = JobSpec(
        *(made.fingerprint, "none", "none", "0" * 64, 0, 1, "parquet", 1, "error", (str(prompts),)),
        *(made.n_rows, made.n_images, made.n_shards, 0, 0.0, "bench"),
    )
    publish_job(store, spec)
    rows = [
        ImageRow(
            ImageRequest(f"p{i}", 0, f"prompt {i}", i), "ok", 64, 64, 10, f"data/{i}.png", f"{i:064x}", 1
        )
        for i in range(ROW_TABLES)
    ]
    (output / "data").mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        table = pa.Table.from_pylist([row.as_record()], schema=IMAGE_ROW_SCHEMA)
        path = output / f"data/{i}.rows.parquet"
        with pq.ParquetWriter(path, table.schema, **row_table_options(table.schema, 1)) as writer:
            writer.write_table(table)
    compactor = CommitCompactor(store, 1)
    for shard_id in range(n):
        body = made_up_commit(
            shard_id,
            shard_id % WORKERS,
            shard_id // WORKERS * (SHARD_S + IDLE_S),
            (IDLE_S, SHARD_S),
            nodes=NODES,
            fingerprint=made.fingerprint,
            rows_path=f"data/{shard_id % ROW_TABLES}.rows.parquet",
            rows=[rows[shard_id % ROW_TABLES]],
        ).to_json()
        path = output / commit_key(shard_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        compactor.add(shard_id, body)
    compactor.flush()
    Path(folder, MADE).touch()


def finish(folder: str, n: int) -> dict[str, Any]:
    """Finish the job in `folder`: seconds, and memory above what a driver holds before."""
    from millijoule.pipeline.closing import finish as product
    from millijoule.pipeline.energy.closure import EXACT_CHECKS
    from millijoule.pipeline.output.job import read_job
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.workers.storage.open import open_store

    product.write_preview = lambda *_: None  # there are no pictures
    store = open_store(f"{folder}/out")
    job = read_job(store)
    assert job is not None
    shards = load_job_shards(store, job)
    assert len(shards) == n
    began, cpu, peak_before = time.monotonic(), time.process_time(), peak_mb()
    stats = product.finish_job(store, job, shards)
    seconds = time.monotonic() - began
    assert all(stats["closure"][check] for check in EXACT_CHECKS)
    return {
        "shards": n,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "peak_added_mb": peak_mb() - peak_before,
        "peak_mb": peak_mb(),
        "segments": stats["energy"]["segments"],
    }


def check(folder: str, n: int) -> dict[str, Any]:
    """Check the finished job in `folder`: seconds, and memory above what it took to load the program."""
    from millijoule.pipeline.closing import check as product
    from millijoule.workers.storage.open import open_store

    store = open_store(f"{folder}/out")
    began, cpu, peak_before = time.monotonic(), time.process_time(), peak_mb()
    # commits share row tables, so that rows are not those of the plan; what is compared afterwards must agree
    wrong = [p for p in product.check_output(store, images=False) if not p.startswith("shard ")]
    assert not wrong, wrong[:3]
    return {
        "shards": n,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_added_mb": peak_mb() - peak_before,
        "peak_mb": peak_mb(),
    }
