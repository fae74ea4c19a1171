"""The measurements of `millijoule bench pipeline` that are to be run in a process of their own."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.jobs.bench.finish import plan_one_image_shards, write_commits
from millijoule.jobs.bench.measurement import run_alone
from millijoule.jobs.bench.process import peak_mb


def plan(n: int) -> dict[str, Any]:
    """Plan `n` prompts from one Parquet file; seconds and this process's peak memory."""
    from millijoule.pipeline.planning.make_plan import plan_job
    from millijoule.pipeline.planning.plan_options import PlanOptions
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompts.parquet")
        run_alone(write_prompts, str(path), n)  # what writing the input holds is not planning's
        began = time.monotonic()
        result = plan_job(expand_inputs([str(path)]), PlanOptions(), open_store(f"{folder}/out"), {})
        seconds = time.monotonic() - began
    return {"rows": result.n_rows, "seconds": seconds, "peak_rss_mb": peak_mb()}


def write_prompts(path: str, n: int) -> None:
    """A Parquet file of `n` prompts."""
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
        for start in range(0, n, 50_000):
            rows = [f"a photo of thing number {i} in the rain" for i in range(start, min(n, start + 50_000))]
            writer.write_table(pa.table({"prompt": rows}))


def resume(n: int) -> dict[str, Any]:
    """Seconds from start to first lease on an output with `n` committed shards and ten left."""
    from millijoule.pipeline.output.commits import list_committed
    from millijoule.pipeline.output.job import open_epoch, read_job
    from millijoule.pipeline.planning.plan_options import PlanOptions, compute_fingerprint
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        plan_one_image_shards(folder, n + 10)
        bodies = ({"shard_id": shard_id, "attempt_id": "e0001-0"} for shard_id in range(n))
        write_commits(folder, (json.dumps(body).encode() for body in bodies))
        store, files = open_store(f"{folder}/out"), expand_inputs([f"{folder}/prompts.txt"])
        began = time.monotonic()
        job = read_job(store)
        assert job is not None
        assert compute_fingerprint(files, PlanOptions(shard_size=1), {}) == job.fingerprint
        shards = load_job_shards(store, job)
        epoch = open_epoch(store, exclusive=True)
        coordinator = Coordinator(shards, list_committed(store, len(shards)), 120.0, epoch)
        lease = coordinator.next_lease("w", 0.0)
        seconds = time.monotonic() - began
        assert lease is not None
        assert lease.shard.shard_id == n
    return {"shards": n, "seconds": seconds, "peak_rss_mb": peak_mb()}


def leases(n: int) -> dict[str, Any]:
    """Leases per second through Ray: four actors that return at once, the real pool and coordinator."""
    import ray

    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.pipeline.running.demand import PoolOptions
    from millijoule.pipeline.running.pool import WorkerPool
    from millijoule.workers.lease import (
        AttemptResult,
        Lease,
        NodePlace,
        WorkerConfig,
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

        def start(self) -> NodePlace:
            return self.place()

        def run(self, lease: Lease) -> AttemptResult:
            return AttemptResult(lease, "committed", b"{}")

        def status(self) -> WorkerStatus:
            return WorkerStatus(None, 0)

        def cancel(self, attempt_id: str) -> None: ...

        def stop(self) -> WorkerStopped:
            return WorkerStopped(self.worker_id, ())

    class Events:
        def __init__(self) -> None:
            self.times: list[float] = []

        def committed(self, result: AttemptResult, *, news: bool) -> None:
            self.times.append(time.monotonic())

        def prepared(self, result: AttemptResult) -> None:
            raise AssertionError("not in this measurement")

        def discarded(self, result: AttemptResult) -> None:
            raise AssertionError("not in this measurement")

        def stopped(self, stopped: WorkerStopped) -> None: ...
        def gone(self, worker_id: str) -> None: ...
        def tick(self) -> None: ...

    shards = [Shard(i, "part", i, 1, 1, None, None, None, "p", "") for i in range(n)]
    coordinator = Coordinator(shards, np.zeros(n, bool), 120.0, 1)
    config = WorkerConfig("", "", 0, "parquet", "", "", 1)
    events = Events()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    WorkerPool(ray.remote(Idle), coordinator, config, PoolOptions(4, 4), events).run()
    ray.shutdown()
    times = events.times
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {"leases": len(times), "leases_per_second": rate, "workers": 4}
