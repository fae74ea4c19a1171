"""A whole job in this process, without Ray: real plan, coordinator, attempts and commits, for fast tests."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from support.models import Plain

from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import JobSpec, open_epoch, publish_job
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.retry_rounds import JobShards, load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts.parts import PartClock
from millijoule.workers.attempts.runner import AttemptRunner
from millijoule.workers.generators.protocol import Generator
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.layout import commit_key
from millijoule.workers.lease import WorkerConfig
from millijoule.workers.meters.meter import EnergyMeter, open_meter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.schemas import WorkerEnvironment
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store

MODEL_SHA256 = "a" * 64

#: What `seal_every_batch` goes by.
EVERY_BATCH_S = 1e-9


def seal_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of this process with `part_s=EVERY_BATCH_S` seal each batch, the last one too; others none."""
    monkeypatch.setattr(PartClock, "drew", lambda clock, left: clock.part_s == EVERY_BATCH_S)


def plan(
    folder: Path, prompts: list[str], *, shard_size: int = 8, output_format: str = "parquet"
) -> tuple[Store, JobSpec]:
    """Plan `prompts` into `folder/out`."""
    source = folder / "prompts.txt"
    source.write_text("".join(p + "\n" for p in prompts))
    store = open_store(str(folder / "out"))
    made = plan_job(expand_inputs([str(source)]), PlanOptions(shard_size=shard_size), store, {})
    job = JobSpec(
        fingerprint=made.fingerprint,
        model="plain",
        model_name="plain",
        model_sha256=MODEL_SHA256,
        job_seed=0,
        images_per_prompt=1,
        output_format=output_format,
        shard_size=shard_size,
        duplicate_ids="error",
        prompts=(str(source),),
        rows=made.n_rows,
        images=made.n_images,
        shards=made.n_shards,
        bad_rows=made.n_bad_rows,
        created_unix=0.0,
        millijoule_version="0",
    )
    return store, publish_job(store, job)


def stand_in_worker(worker_id: str, node_id: str, host: str, device: str, epoch: int) -> WorkerEnvironment:
    """What a worker would say about itself that has no board of its own to name."""
    return WorkerEnvironment(
        worker_id, epoch, node_id, host, device, (), None, None, platform.python_version(), None, "missing"
    )


def runner(
    store: Store,
    job: JobSpec,
    epoch: int,
    generator: Generator | None = None,
    worker: str = "w1",
    meter: EnergyMeter | None = None,
    part_s: float = 10.0,
) -> AttemptRunner:
    """A worker's half of the protocol."""
    config = WorkerConfig(
        *(store.url, job.fingerprint, job.job_seed, job.output_format, "plain", MODEL_SHA256, epoch),
        image_format=ImageFormat(job.image_format, job.image_quality),
        part_s=part_s,
    )
    meter = meter or open_meter()
    return AttemptRunner(
        config,
        store,
        generator or Plain("cpu"),
        meter,
        SegmentTimeline(worker, meter),
        stand_in_worker(worker, "node", "host", "cpu" if meter.method != "nvml-counter" else "GPU-1", epoch),
        PowerSampler(meter),
    )


def work(
    store: Store, job: JobSpec, generator: Generator | None = None, meter: EnergyMeter | None = None
) -> JobShards:
    """Lease and run everything that is left, then finish the job."""
    shards = load_job_shards(store, job)
    epoch = open_epoch(store, exclusive=True)
    coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch)
    attempts = runner(store, job, epoch, generator, f"w{epoch}", meter)
    while (lease := coordinator.next_lease("w1", 0.0)) is not None:
        result = attempts.run(lease)
        if result.outcome == "suspect":  # a second worker says the same, and the driver commits
            assert result.commit_json is not None
            store.put_exclusive(commit_key(lease.shard.shard_id), result.commit_json)
        coordinator.complete(lease.attempt_id, result.lease.shard.shard_id, 1.0)
    assert coordinator.done
    finish_job(store, job, shards)
    return shards
