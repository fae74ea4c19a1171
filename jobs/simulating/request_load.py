"""Requests of a small real job by kind, stage by stage: planned, drawn shard by shard by the product's own worker code, and closed.

Only the pictures are made up; the store is the product's `S3Store` over a bucket that counts (`counted_s3`). One worker draws one shard
after the other, so that what a shard asks of storage is told apart from what a job does.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from millijoule.jobs.simulating.counted_s3 import CountedS3Store
from millijoule.workers.attempts.parts import PartClock
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.schemas import ImageRequest

#: Dollars per thousand requests: list price of AWS for S3 Standard in us-east-1, as published through 2025. What deletes is free.
PRICES = {"PUT": 0.005, "LIST": 0.005, "GET": 0.0004, "HEAD": 0.0004}
PRICES_OF = "AWS S3 Standard, us-east-1, list price as published through 2025, dollars per 1,000 requests"
#: Jobs whose shards are looked at: images of a shard, the output's format, and pixels a side: of 700 an image has 1.5 MB, as one of SDXL.
#: With 1, every batch of 4 is sealed as a part, as of a shard that takes long.
CASES = (
    (16, "parquet", 32, 0),
    (100, "parquet", 32, 0),
    (100, "parquet", 32, 1),
    (100, "parquet", 700, 0),
    (100, "webdataset", 32, 0),
    (100, "files", 32, 0),
)
#: `--part-seconds` of those that are sealed in parts; the clock is a stand-in.
PART_S = 10.0
SHARDS = 2

Counts = dict[str, int]


class _Noise:
    """Draws pixels that do not compress."""

    def __init__(self, pixels: int) -> None:
        self.info = GeneratorInfo("noise", "0" * 64, pixels, pixels, num_inference_steps=1, batch_size=4)

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        shape = (self.info.height, self.info.width, 3)
        drawn = [np.random.default_rng(r.seed).integers(0, 256, shape, np.uint8) for r in requests]
        return GeneratedBatch(np.stack(drawn))


def count_requests(images: int, output_format: str, pixels: int, in_parts: int = 0) -> dict[str, Any]:
    """Requests by kind of planning, of each of `SHARDS` shards of `images` images, and of closing; and what a shard costs."""
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as folder:
        if not in_parts:
            return _count(Path(folder), images, output_format, pixels, 0.0)
        with patch.object(PartClock, "drew", lambda clock, left: True):
            return _count(Path(folder), images, output_format, pixels, PART_S)


def _count(folder: Path, images: int, output_format: str, pixels: int, part_s: float) -> dict[str, Any]:
    from millijoule.pipeline.closing.finish import finish_job
    from millijoule.pipeline.output.commits import CommitCompactor, list_committed
    from millijoule.pipeline.output.job import JobSpec, open_epoch, publish_job
    from millijoule.pipeline.planning.make_plan import plan_job
    from millijoule.pipeline.planning.plan_options import PlanOptions
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.workers.layout import DATA_PREFIX
    from millijoule.workers.schemas import Commit
    from millijoule.workers.storage.inputs import expand_inputs

    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"picture {i}\n" for i in range(SHARDS * images)))
    store = CountedS3Store(folder / "out")
    stages: dict[str, Counts] = {}

    def counted(stage: str) -> None:
        stages[stage] = store.requests
        store.s3.requests.clear()

    made = plan_job(expand_inputs([str(prompts)]), PlanOptions(shard_size=images), store, {})
    job = publish_job(
        store,
        JobSpec(
            *(
                made.fingerprint,
                "noise",
                "noise",
                "0" * 64,
                0,
                1,
                output_format,
                images,
                "error",
                (str(prompts),),
            ),
            *(made.n_rows, made.n_images, made.n_shards, 0, 0.0, "bench"),
        ),
    )
    counted("plan")
    shards, epoch = load_job_shards(store, job), open_epoch(store, exclusive=True)
    coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch)
    counted("driver's start")
    attempts, compactor = _worker(store, job, epoch, part_s, _Noise(pixels)), CommitCompactor(store, epoch)
    parts: list[int] = []
    while (lease := coordinator.next_lease("w", 0.0)) is not None:
        result = attempts.run(lease)
        assert result.outcome == "committed"
        assert result.commit_json is not None
        counted(f"shard {lease.shard.shard_id}")
        parts.append(len(Commit.from_json(result.commit_json).parts))
        compactor.add(lease.shard.shard_id, result.commit_json)
        coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
    attempts.close()
    compactor.flush()
    counted("compacted commits")
    finish_job(store, job, shards)
    counted("closing")
    per_shard = [stages.pop(f"shard {i}") for i in range(SHARDS)]
    if not part_s:
        assert all(one == per_shard[0] for one in per_shard), per_shard
    size = sum(item.size_bytes for item in store.list(DATA_PREFIX))
    return {
        "images_per_shard": images,
        "format": output_format,
        "mb_per_shard": round(size / SHARDS / 1e6, 3),
        "shards": SHARDS,
        "parts": parts[0],
        "per_shard": per_shard[0],
        "dollars_per_million_shards": round(1e6 * dollars(per_shard[0]), 2),
        "stages": stages,
    }


def _worker(store: CountedS3Store, job: Any, epoch: int, part_s: float, generator: Any) -> Any:
    """A worker's half of the protocol, on this process's CPU."""
    from millijoule.workers.attempts.runner import AttemptRunner
    from millijoule.workers.lease import WorkerConfig
    from millijoule.workers.meters.meter import open_meter
    from millijoule.workers.meters.power_samples import PowerSampler
    from millijoule.workers.meters.segment_timeline import SegmentTimeline
    from millijoule.workers.schemas import WorkerEnvironment

    what = store.url, job.fingerprint, job.job_seed, job.output_format, job.model, job.model_sha256
    config, meter = WorkerConfig(*what, epoch, part_s=part_s), open_meter()
    who = WorkerEnvironment("w", epoch, "node", "host", "cpu", (), None, None, "", None, "missing")
    timeline = SegmentTimeline("w", meter)
    return AttemptRunner(config, store, generator, meter, timeline, who, PowerSampler(meter))


def dollars(requests: Mapping[str, int]) -> float:
    """What these requests cost, see `PRICES`."""
    return sum(PRICES.get(kind, 0.0) * n for kind, n in requests.items()) / 1000
