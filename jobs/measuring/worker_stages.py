"""Where the processor time of one image goes in a worker, measured in one process without Ray: run by `bench worker`.

Only functions that have been the same for long are called here, so that it runs on the code of an older checkout, too.
`python worker_stages.py IMAGES ROUNDS` prints JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Images of a shard by default, in checkouts from before it depended on the model.
SHARD_BEFORE = 256


def measure(images: int, rounds: int) -> dict[str, Any]:
    """Microseconds of processor time per image, by stage, the least of `rounds`; "job" is everything between plan and closed books."""
    import torch

    from millijoule.workers.attempts.drawing import DrawnImage
    from millijoule.workers.attempts.encoding import Encoders, parts_of
    from millijoule.workers.generators.registry import load_generator
    from millijoule.workers.images.formats import ImageFormat
    from millijoule.workers.images.writers import open_writer
    from millijoule.workers.scenes.prompts import parse_prompt
    from millijoule.workers.schemas import ImageRow
    from millijoule.workers.shard_rows import PlanRow, shard_requests

    torch.set_num_threads(1)
    generator: Any = load_generator("default")
    info = generator.info
    texts = prompts(images)
    rows = [
        PlanRow(f"p{i}", text, None, None, 1, None, None, None, None, None, f"f:{i}")
        for i, text in enumerate(texts)
    ]
    least: dict[str, float] = {}
    shard = usual_shard()

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = call()
        used = (time.process_time() - began) / images * 1e6
        least[stage] = min(used, least.get(stage, used))
        return found

    def one_round() -> list[bytes]:
        requests = timed("requests", lambda: shard_requests(rows, 0))
        timed("prompts", lambda: [parse_prompt(r.prompt, generator.nouns) for r in requests])
        batches = [requests[i : i + info.batch_size] for i in range(0, images, info.batch_size)]
        made = timed("prompts and drawing", lambda: [generator.generate(batch).images for batch in batches])
        drawn = [
            DrawnImage((0, 0), ImageRow(request, "ok", 64, 64, info.num_inference_steps), image)
            for batch, pictures in zip(batches, made, strict=True)
            for request, image in zip(batch, pictures, strict=True)
        ]
        encoders = Encoders(1, ImageFormat(), info)

        def encode() -> list[Any]:
            waiting = [encoders.begin(part) for part in parts_of(drawn)]
            return [one for part in waiting for one in part.result()]

        encoded = timed("encoding", encode)
        encoders.close()

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                for start in range(0, images, shard):
                    writer = open_writer("parquet", Path(folder), f"data/{start}")
                    some = slice(start, start + shard)
                    for one, data in zip(drawn[some], encoded[some], strict=True):
                        writer.add(one.row, data)
                    writer.finish()

        timed("writing", write)
        timed("job", lambda: run_job(texts, generator))
        return encoded

    run_job(texts[:shard], generator)  # what is imported and begun once is no image's
    for _ in range(rounds):
        sizes = [len(data) for data in one_round()]
    return {"cpu_us_per_image": least, "bytes_per_image": sum(sizes) / len(sizes)}


def usual_shard() -> int:
    """Images of a shard, as in the job's default."""
    try:
        from millijoule.workers.generators.registry import usual_shard_images
    except ImportError:
        return SHARD_BEFORE
    return usual_shard_images("default")


def prompts(count: int) -> list[str]:
    """Different ones, of the six families, that leave things open."""
    from millijoule.jobs.bench.gpu import scene_requests

    return [request.prompt for request in scene_requests(count)]


def run_job(texts: list[str], generator: Any) -> None:
    """Plan, lease, draw, encode, write, commit and close: a whole job of one worker on a local disk."""
    from millijoule.pipeline.closing.finish import finish_job
    from millijoule.pipeline.output.commits import list_committed
    from millijoule.pipeline.output.job import JobSpec, open_epoch, publish_job
    from millijoule.pipeline.planning.make_plan import plan_job
    from millijoule.pipeline.planning.plan_options import PlanOptions
    from millijoule.pipeline.planning.retry_rounds import load_job_shards
    from millijoule.pipeline.running.coordinator import Coordinator
    from millijoule.workers.attempts.runner import AttemptRunner
    from millijoule.workers.lease import WorkerConfig
    from millijoule.workers.meters.meter import open_meter
    from millijoule.workers.meters.power_samples import PowerSampler
    from millijoule.workers.meters.segment_timeline import SegmentTimeline
    from millijoule.workers.schemas import WorkerEnvironment
    from millijoule.workers.storage.inputs import expand_inputs
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "prompts.txt")
        source.write_text("".join(text + "\n" for text in texts))
        store = open_store(str(Path(folder, "out")))
        made = plan_job(expand_inputs([str(source)]), PlanOptions(shard_size=usual_shard()), store, {})
        job = publish_job(
            store,
            JobSpec(
                fingerprint=made.fingerprint,
                model="default",
                model_name="default",
                model_sha256="a" * 64,
                job_seed=0,
                images_per_prompt=1,
                output_format="parquet",
                shard_size=usual_shard(),
                duplicate_ids="error",
                prompts=(str(source),),
                rows=made.n_rows,
                images=made.n_images,
                shards=made.n_shards,
                bad_rows=made.n_bad_rows,
                created_unix=0.0,
                millijoule_version="0",
            ),
        )
        shards, epoch = load_job_shards(store, job), open_epoch(store, exclusive=True)
        coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch)
        config = WorkerConfig(store.url, job.fingerprint, 0, "parquet", "default", "a" * 64, epoch)
        meter = open_meter()
        worker = WorkerEnvironment("w", epoch, "node", "host", "cpu", (), None, None, "", None, "missing")
        timeline = SegmentTimeline("w", meter)
        attempts = AttemptRunner(config, store, generator, meter, timeline, worker, PowerSampler(meter))
        while (lease := coordinator.next_lease("w", 0.0)) is not None:
            attempts.run(lease)
            coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
        attempts.close()
        finish_job(store, job, shards)


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))))
