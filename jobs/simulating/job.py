"""A whole job on a simulated fleet: the product's driver (`JobRun`) from its first lease to its last record, then its ledger."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from millijoule.jobs.measuring.process import peak_mb
from millijoule.jobs.simulating.clocked_ray import EPOCH_S, ClockedRay, installed
from millijoule.jobs.simulating.devices import Fleet
from millijoule.jobs.simulating.memory_store import MemoryStore, PromptWriter
from millijoule.jobs.simulating.worker import SimulatedWorker
from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.planning.plan import SHARD_INDEX_SCHEMA
from millijoule.pipeline.planning.retry_rounds import JobShards
from millijoule.pipeline.planning.shard_cutter import SHARDS_PER_PART
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.run import JobRun, PlannedJob
from millijoule.pipeline.running.spending import Caps, Spending

FINGERPRINT = "f" * 64
#: A driver that is not done after so much simulated time hangs.
MOST_S = 60 * 86400.0


@dataclass
class Outcome:
    """How a simulated job went. `driver_cpu_s` is the driver's alone; energy in joules is of the devices while held."""

    makespan_s: float
    complete: bool
    driver_cpu_s: float
    peak_mb: float
    by_kind: dict[str, dict[str, float]]
    preemptions: int
    faults: int
    calls: dict[str, int]
    requests: dict[str, int]
    written_bytes: int
    lost_attempts: int
    wall_s: float
    ledger: dict[str, Any] = field(default_factory=dict)

    @property
    def joules(self) -> float:
        return sum(kind["joules"] for kind in self.by_kind.values())

    @property
    def money(self) -> float:
        return sum(kind["money"] for kind in self.by_kind.values())


def made_up_index(shards: int, images_per_shard: int) -> pa.RecordBatch:
    """The index of equal shards, as large as a real one, `SHARD_INDEX_SCHEMA`."""
    ids = np.arange(shards)
    columns = [
        *(ids, (ids // SHARDS_PER_PART).astype(np.int32), (ids % SHARDS_PER_PART).astype(np.int32)),
        *(np.full(shards, images_per_shard, np.int32), np.full(shards, images_per_shard, np.int32)),
        *(pa.nulls(shards, pa.int32()) for _ in range(3)),
        pa.array([f"prompt-{i:09d}" for i in range(shards)]),
        pa.array([f"{i:064x}" for i in range(shards)]),
    ]
    return pa.RecordBatch.from_arrays([pa.array(c) for c in columns], schema=SHARD_INDEX_SCHEMA)


def made_up_job(shards: int, images_per_shard: int) -> JobSpec:
    """The description of a job of equal shards."""
    n = shards * images_per_shard
    return JobSpec(
        *(FINGERPRINT, "none", "none", "0" * 64, 0, 1, "parquet", images_per_shard, "error", ("prompts",)),
        *(n, n, shards, 0, EPOCH_S, "simulated"),
    )


def made_up_plan(shards: int, images_per_shard: int) -> PlannedJob:
    """A plan of equal shards."""
    table = made_up_index(shards, images_per_shard)
    return PlannedJob(made_up_job(shards, images_per_shard), JobShards(FINGERPRINT, table), exclusive=True)


def run_job(
    planned: PlannedJob,
    devices: Fleet,
    *,
    deadline_s: float | None = None,
    options: PoolOptions | None = None,
    close_books: bool = True,
    driver_takes_time: bool = False,
    on_tick: Callable[[JobRun], None] = lambda run: None,
    **more: Any,
) -> Outcome:
    """Run `planned` on `devices` to its end.

    Args:
        deadline_s: of the simulated clock.
        options: the pool of workers; default: as many as there are nodes, all at once.
        driver_takes_time: see `ClockedRay`.
        close_books: build the ledger at the end.
        more: further arguments of `JobRun`.
    """
    began = time.monotonic()
    store = MemoryStore()
    ray = ClockedRay(
        lambda node, *args: SimulatedWorker(ray, devices, store, node, *args),
        devices,
        most_s=MOST_S,
        driver_takes_time=driver_takes_time,
    )
    devices.ray = ray
    options = options or PoolOptions(0, len(devices.nodes), gpus_per_worker=1.0)
    deadline = None if deadline_s is None else EPOCH_S + deadline_s
    gc.collect()
    with installed(ray, PromptWriter), _silent():
        cpu = time.process_time()
        job_run = JobRun(
            store,
            planned,
            options,
            ray.actor_class,
            lease_s=more.pop("lease_s", 120.0),
            speculate=True,
            spending=Spending(Caps(deadline_unix=deadline)),
            **more,
        )
        job_run.run(on_tick=partial(on_tick, job_run))
        driver_cpu_s = time.process_time() - cpu - ray.cpu_s
    makespan_s = ray.now
    devices.close()
    return Outcome(
        makespan_s,
        job_run.complete,
        driver_cpu_s,
        peak_mb(),
        devices.totals(),
        devices.preempted,
        devices.faults,
        dict(ray.n_calls),
        dict(store.requests),
        store.written_bytes,
        job_run.counts.lost_attempts,
        time.monotonic() - began,
        _books(store, len(planned.shards)) if close_books and job_run.complete else {},
    )


@contextmanager
def _silent() -> Iterator[None]:
    """A simulated driver says nothing: what it would say is meant for people who wait."""
    product = logging.getLogger("millijoule")
    before = product.level
    product.setLevel(logging.ERROR)
    try:
        yield
    finally:
        product.setLevel(before)


def _books(store: MemoryStore, n_shards: int) -> dict[str, Any]:
    """What the product's ledger makes of the job's records."""
    from millijoule.pipeline.closing.finish import load_records

    return load_records(store, n_shards).ledger.summary()
