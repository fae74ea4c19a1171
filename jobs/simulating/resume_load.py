"""A second driver on an output of which half is committed: from its start to its first lease, by the product's own code.

The output is that of `closing_load`, in a bucket that counts; the commits of the first half of its shards are listed. Ray is
simulated, and no worker comes.
"""

from __future__ import annotations

import time
from typing import Any

from millijoule.jobs.measuring.process import peak_mb
from millijoule.jobs.simulating.clocked_ray import ClockedRay, installed
from millijoule.jobs.simulating.counted_s3 import CountedS3Store
from millijoule.jobs.simulating.devices import Fleet
from millijoule.jobs.simulating.memory_store import PromptWriter

#: What no job reaches: a cap, so that a driver has to know what was used before.
ENDLESS_KWH = 1e9


def resume(folder: str, shards: int, capped: bool, latency_s: float = 0.0) -> dict[str, Any]:
    """Seconds, memory and requests until the first lease of a driver that finds half of `shards` committed.

    Args:
        folder: where `closing_load.make_output` made the output.
        capped: the job has a cap on energy, so that all commits are read and not only listed.
        latency_s: that an answer of storage takes at least.
    """
    from millijoule.pipeline.output.job import require_job
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.pipeline.running.demand import PoolOptions
    from millijoule.pipeline.running.run import JobRun, PlannedJob
    from millijoule.pipeline.running.spending import Caps, Spending

    committed = shards // 2
    store = CountedS3Store(folder, committed, latency_s)
    ray = ClockedRay(lambda *_: None, Fleet({}, 1))
    before_mb, cpu, began = peak_mb(), time.process_time(), time.monotonic()
    with installed(ray, PromptWriter):
        job = require_job(store)
        planned = PlannedJob(job, load_job_shards(store, job), exclusive=True)
        plan_s = time.monotonic() - began
        caps = Caps(max_kwh=ENDLESS_KWH if capped else None)
        options = PoolOptions(0, 1000, gpus_per_worker=1.0)
        job_run = JobRun(
            *(store, planned, options, ray.actor_class),
            lease_s=120.0,
            speculate=True,
            spending=Spending(caps),
            part_s=10.0,
        )
        lease = job_run.coordinator.next_lease("w", 0.0)
    assert lease is not None
    assert lease.shard.shard_id >= committed
    assert job_run.coordinator.n_committed == committed
    return {
        "shards": shards,
        "committed": committed,
        "capped": capped,
        "latency_s": latency_s,
        "seconds": round(time.monotonic() - began, 2),
        "plan_s": round(plan_s, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "peak_mb": round(peak_mb()),
        "mb_before": round(before_mb),
        "requests": store.requests,
        "read_mb": round(store.s3.received_bytes / 1e6, 1),
    }
