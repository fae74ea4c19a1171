"""Single measurements of `millijoule bench`, each in a process of its own: `bench_probes NAME N` prints one JSON line."""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

#: Written in place of a real fingerprint's inputs; the probes never generate an image.
_MODEL_SHA256 = "0" * 64


def plan(n: int) -> dict[str, Any]:
    """Plan `n` prompts from one Parquet file; seconds and this process's peak memory."""
    from millijoule.pipeline.planning.plan import PlanOptions, plan_job
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.parquet")
        # in a process of its own: what writing the input holds is not planning's
        writer = multiprocessing.get_context("spawn").Process(target=_write_prompts, args=(path, n))
        writer.start()
        writer.join()
        began = time.monotonic()
        result = plan_job(expand_inputs([str(path)]), PlanOptions(), open_store(f"{folder}/out"), {})
        seconds = time.monotonic() - began
    return {"rows": result.n_rows, "seconds": seconds, "peak_rss_mb": _peak_rss_mb()}


def _write_prompts(path: Path, n: int) -> None:
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
        for start in range(0, n, 50_000):
            rows = [f"a photo of thing number {i} in the rain" for i in range(start, min(n, start + 50_000))]
            writer.write_table(pa.table({"prompt": rows}))


def resume(n: int) -> dict[str, Any]:
    """Seconds from start to first lease on an output with `n` committed shards and ten left."""
    from millijoule.pipeline.output.commits import CommitCompactor, list_committed
    from millijoule.pipeline.output.job import JobSpec, open_epoch, publish_job, read_job
    from millijoule.pipeline.planning.plan import PlanOptions, compute_fingerprint, plan_job
    from millijoule.pipeline.planning.retry import load_job_shards
    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.workers.layout import commit_key
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        with prompts.open("w") as file:
            file.writelines(f"prompt {i}\n" for i in range(n + 10))
        store = open_store(f"{folder}/out")
        options = PlanOptions(shard_size=1)
        files = expand_inputs([str(prompts)])
        made = plan_job(files, options, store, {})
        publish_job(store, _spec(JobSpec, made))
        compactor = CommitCompactor(store, 1)
        for shard_id in range(n):
            body = json.dumps({"shard_id": shard_id, "attempt_id": "e0001-0"}).encode()
            path = Path(folder, "out", commit_key(shard_id))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
            compactor.add(shard_id, body)
        compactor.flush()
        began = time.monotonic()
        job = read_job(store)
        assert job is not None
        assert compute_fingerprint(files, options, {}) == job.fingerprint
        shards = load_job_shards(store, job)
        epoch = open_epoch(store, exclusive=True)
        coordinator = Coordinator(shards, list_committed(store, len(shards)), 120.0, epoch)
        lease = coordinator.next_lease("w", 0.0)
        seconds = time.monotonic() - began
        assert lease is not None
        assert lease.shard.shard_id == n
    return {"shards": n, "seconds": seconds, "peak_rss_mb": _peak_rss_mb()}


def leases(n: int) -> dict[str, Any]:
    """Leases per second through Ray: four actors that return at once, the real pool and coordinator."""
    import ray

    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.pipeline.running.pool import PoolOptions, WorkerPool
    from millijoule.workers.lease import (
        AttemptResult,
        Lease,
        NodePlace,
        WorkerConfig,
        WorkerReady,
        WorkerStatus,
        WorkerStopped,
    )
    from millijoule.workers.shard_rows import Shard

    class Idle:
        """Stands for a worker whose shards take no time."""

        def __init__(self, worker_id: str, config: WorkerConfig) -> None:
            self.worker_id = worker_id

        def place(self) -> NodePlace:
            return NodePlace("", "")

        def start(self) -> WorkerReady:
            return WorkerReady(self.worker_id, "", "", "cpu", "missing", 0.0)

        def run(self, lease: Lease) -> AttemptResult:
            return AttemptResult(lease, "committed", b"{}")

        def status(self) -> WorkerStatus:
            return WorkerStatus(None, 0)

        def cancel(self, attempt_id: str) -> None: ...

        def stop(self) -> WorkerStopped:
            return WorkerStopped(self.worker_id, ())

    class Events:
        first: float | None = None
        last = 0.0
        count = 0

        def committed(self, result: AttemptResult, *, news: bool) -> None:
            self.last = time.monotonic()
            self.first = self.first or self.last
            self.count += 1

        def prepared(self, result: AttemptResult) -> None:
            raise AssertionError("not in this measurement")

        def discarded(self, result: AttemptResult) -> None:
            raise AssertionError("not in this measurement")

        def stopped(self, stopped: WorkerStopped) -> None: ...
        def gone(self, worker_id: str) -> None: ...
        def tick(self, pool: object) -> None: ...

    shards = [Shard(i, "part", i, 1, 1, None, None, None, "p", "") for i in range(n)]
    coordinator = Coordinator(shards, np.zeros(n, bool), 120.0, 1)
    config = WorkerConfig("", "", 0, "parquet", "", "", 1)
    events = Events()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    WorkerPool(ray.remote(Idle), coordinator, config, PoolOptions(4, 4), events).run()
    ray.shutdown()
    assert events.first is not None
    rate = (events.count - 1) / (events.last - events.first)
    return {"leases": events.count, "leases_per_second": rate, "workers": 4}


def _spec(job_spec: Any, made: Any) -> Any:
    return job_spec(
        fingerprint=made.fingerprint,
        model="default",
        model_name="none",
        model_sha256=_MODEL_SHA256,
        job_seed=0,
        images_per_prompt=1,
        output_format="parquet",
        shard_size=1,
        duplicate_ids="error",
        prompts=("prompts.txt",),
        rows=made.n_rows,
        images=made.n_images,
        shards=made.n_shards,
        bad_rows=0,
        created_unix=0.0,
        millijoule_version="0",
    )


def _peak_rss_mb() -> float:
    """High-water mark of this process alone; `ru_maxrss` would start at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    print(json.dumps({"plan": plan, "resume": resume, "leases": leases}[sys.argv[1]](int(sys.argv[2]))))
