"""`millijoule bench finish [RESULT.json]`: seconds and memory of closing the books of a job of many shards, and of `check`.

The job is made up to have as little as possible per shard but its records: one image, two segments with five counters,
a commit and a row table; on a local disk, of sixteen workers on two nodes. `finish_job` is the product's own: ledger,
manifest, seven energy tables, closure checks, `stats.json`. `check` compares the output with its commits afterwards, without
images, because there are none. Each run is in a process of its own; `peak_mb` is what it held at
most, `peak_added_mb` that above what it held before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from millijoule.jobs.bench.process import memory_mb, peak_mb
from millijoule.jobs.bench.result import write_result
from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment

if TYPE_CHECKING:
    from millijoule.workers.schemas import ImageRow

SECOND_NS = 1_000_000_000
NODES, WORKERS, SHARD_S, IDLE_S = 2, 16, 30, 1
#: Row tables that differ; the commits take turns, because a hundred thousand files would only measure the disk.
ROW_TABLES = 256
#: Stands beside a job once all of it is made.
MADE = "made"


@dataclass(frozen=True)
class BenchOptions:
    """Measure how a job of many shards ends."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

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
                probe("make", str(folder), shards)
            for _ in range(options.repeats):
                rows.append(probe("finish", str(folder), shards))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if options.check:
                checks.append(probe("check", str(folder), shards))
                print(json.dumps(checks[-1]), file=sys.stderr, flush=True)
    small, large = rows[: options.repeats], rows[options.repeats :]
    peaks = [min(r["peak_added_mb"] for r in part) for part in (small, large)]
    result = {
        "what": "finish",
        "options": {k: v for k, v in asdict(options).items() if k not in ("result", "folder")},  # no paths
        "shards": options.shards,
        "seconds": sorted(r["seconds"] for r in large)[len(large) // 2],
        "cpu_seconds": sorted(r["cpu_seconds"] for r in large)[len(large) // 2],
        "peak_added_mb": peaks[1],
        "mb_per_100_000_shards": (peaks[1] - peaks[0]) / (options.shards - options.shards // 10) * 100_000,
        "rows": rows,
        "check": checks,
        "environment": environment(),
    }
    write_result(result, options.result)
    return COMPLETE


def probe(what: str, folder: str, shards: int) -> dict[str, Any]:
    """Run `make` or `finish` in a process of its own; what it returns."""
    command = [sys.executable, "-m", "millijoule.jobs.bench.finish", "--probe", what, folder, str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def make(folder: str, n: int) -> dict[str, Any]:
    """Plan a job of `n` one-image shards in `folder` and commit all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from millijoule.pipeline.output.commits import CommitCompactor
    from millijoule.pipeline.output.job import JobSpec, publish_job
    from millijoule.pipeline.planning.plan import PlanOptions, plan_job
    from millijoule.workers.images.writers import row_table_options
    from millijoule.workers.layout import commit_key
    from millijoule.workers.schemas import IMAGE_ROW_SCHEMA
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    prompts = Path(folder, "prompts.txt")
    with prompts.open("w") as file:
        file.writelines(f"prompt {i}\n" for i in range(n))
    store = open_store(f"{folder}/out")
    made = plan_job(expand_inputs([str(prompts)]), PlanOptions(shard_size=1), store, {})
    spec = JobSpec(
        *(made.fingerprint, "none", "none", "0" * 64, 0, 1, "parquet", 1, "error", (str(prompts),)),
        *(made.n_rows, made.n_images, made.n_shards, 0, 0.0, "bench"),
    )
    publish_job(store, spec)
    for i in range(ROW_TABLES):
        row = made_up_row(i)
        rows = pa.Table.from_pylist([row.as_record()], schema=IMAGE_ROW_SCHEMA)
        path = Path(folder, "out", f"data/{i}.rows.parquet")
        path.parent.mkdir(exist_ok=True)
        with pq.ParquetWriter(path, rows.schema, **row_table_options(rows.schema, 1)) as writer:
            writer.write_table(rows)
    compactor = CommitCompactor(store, 1)
    for shard_id in range(n):
        body = made_up_commit(shard_id, made.fingerprint)
        path = Path(folder, "out", commit_key(shard_id))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        compactor.add(shard_id, body)
    compactor.flush()
    Path(folder, MADE).touch()
    return {"shards": n}


@cache
def made_up_row(number: int) -> ImageRow:
    """The one row of row table `number`."""
    from millijoule.workers.schemas import ImageRequest, ImageRow

    request = ImageRequest(f"p{number}", 0, f"prompt {number}", number)
    return ImageRow(request, "ok", 64, 64, 10, f"data/{number}.png", f"{number:064x}", 1)


def made_up_commit(shard_id: int, fingerprint: str) -> bytes:
    """The commit of a one-image shard: each worker makes every sixteenth, a second after the one before."""
    from millijoule.workers.schemas import Commit, CounterRead, Segment, carried_rows

    number = shard_id % WORKERS
    start_s = shard_id // WORKERS * (SHARD_S + IDLE_S)
    name, node, gpu = f"w0001-{number:04d}", number % NODES, f"GPU-{number:08x}-0000-4000-8000-000000000000"
    boot = f"{node:08d}-1111-4222-8333-444444444444"
    watts = {f"gpu:{gpu}": 500} | {
        f"{kind}:package-{i}": w for kind, w in (("cpu", 150), ("dram", 20)) for i in (0, 1)
    }

    def read(at_s: int) -> CounterRead:
        # no two workers of a node read at the same nanosecond, and what they read follows from when
        t = (1_000_000 + at_s) * SECOND_NS + number * 1_000_000
        energy = {d: 10**9 + w * t // 1_000_000 for d, w in watts.items()}
        return CounterRead(boot, t, t + 10**18, 150_000, energy, 10 * at_s, 0)

    reads = [read(start_s), read(start_s + IDLE_S), read(start_s + IDLE_S + SHARD_S)]
    attempt = f"e000001-{shard_id:08d}"
    return Commit(
        *(shard_id, attempt, 1, name, f"node-{node}", f"host-{node}", gpu, fingerprint, "0" * 64, ()),
        *(f"data/{shard_id % ROW_TABLES}.rows.parquet", 1, 0, {}, reads[1].t_wall_ns, reads[2].t_wall_ns),
        *(None, tuple(watts), 300, "nvml-counter+rapl"),
        (
            Segment(name, "idle", reads[0], reads[1]),
            Segment(name, "shard", reads[1], reads[2], shard_id, attempt),
        ),
        rows=carried_rows([made_up_row(shard_id % ROW_TABLES)]),
    ).to_json()


def finish(folder: str, n: int) -> dict[str, Any]:
    """Finish the job in `folder`: seconds, and memory above what a driver holds before."""
    from millijoule.pipeline.closing import finish as product
    from millijoule.pipeline.energy.closure import EXACT_CHECKS
    from millijoule.pipeline.output.job import read_job
    from millijoule.pipeline.planning.retry import load_job_shards
    from millijoule.workers.storage.open import open_store

    product.write_preview = lambda *_: None  # there are no pictures
    store = open_store(f"{folder}/out")
    job = read_job(store)
    assert job is not None
    shards = load_job_shards(store, job)
    assert len(shards) == n
    before, began, cpu = memory_mb()["private"], time.monotonic(), time.process_time()
    peak_before = peak_mb()
    stats = product.finish_job(store, job, shards)
    seconds = time.monotonic() - began
    assert all(stats["closure"][check] for check in EXACT_CHECKS)
    return {
        "shards": n,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu,
        "private_before_mb": before,
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


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--probe"]:
        what, folder, shards = arguments[1:]
        print(json.dumps({"make": make, "finish": finish, "check": check}[what](folder, int(shards))))
        return COMPLETE
    return run_command("bench finish", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
