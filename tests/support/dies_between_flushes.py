"""A driver that is killed between two flushes: `python -m support.dies_between_flushes OUTPUT COMMITS EVERY`.

It drives a planned job with the real `JobRun`, attempts and commits, turns its loop (and so flushes) after every
EVERY commits, and kills itself after COMMITS.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from support.local_job import runner

from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running import run
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.schemas import CounterRead
from millijoule.workers.storage.open import open_store


class SteadyMeter:
    """Stands in for a GPU that draws 100 W since the host started, whichever process reads it."""

    method = "nvml-counter"
    domains = ("gpu:GPU-1",)

    def read(self) -> CounterRead:
        t_ns = time.monotonic_ns()
        return CounterRead("boot", t_ns, time.time_ns(), 0, {"gpu:GPU-1": t_ns // 10_000})

    def close(self) -> None: ...


def main(output: str, commits: int, every: int) -> None:
    store = open_store(output)
    job = require_job(store)
    run.FLUSH_PERIOD_S = 0.0  # every turn of the loop flushes
    planned = run.PlannedJob(job, load_job_shards(store, job), exclusive=True)
    driver = run.JobRun(store, planned, PoolOptions(1, 1, 1.0, 0.0, {}), None, lease_s=60.0, speculate=False)
    worker = runner(store, job, driver.epoch, meter=SteadyMeter())
    for n in range(1, commits + 1):
        lease = driver.coordinator.next_lease("w1", 0.0)
        assert lease is not None
        result = worker.run(lease)
        driver.coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
        driver.committed(result, news=True)
        if n % every == 0:
            driver.tick()
            while not driver.writer.idle:  # its thread has written
                driver.writer.settle()
                time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
