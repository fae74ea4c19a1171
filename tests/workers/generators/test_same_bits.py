"""The shipped model through the whole pipeline: the same images whatever the shards, and after a resume."""

import pyarrow.parquet as pq
from support.local_job import plan, runner, work

from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.generators.registry import load_generator

PROMPTS = [
    f"a {c} {n} on a gray background"
    for c in ("red", "blue", "green")
    for n in ("cat", "star", "key", "moon")
]


def hashes(store):
    with store.open_input("manifest.parquet") as source:
        return {r["prompt_id"]: r["sha256"] for r in pq.ParquetFile(source).read().to_pylist()}


def test_shards_and_resumes_do_not_change_an_image(tmp_path):
    generator = load_generator("default")
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    store, job = plan(tmp_path / "whole", PROMPTS, shard_size=12)
    work(store, job, generator)
    undisturbed = hashes(store)
    assert len(set(undisturbed.values())) == len(PROMPTS)
    store, job = plan(tmp_path / "broken", PROMPTS, shard_size=5)
    shards = load_job_shards(store, job)
    epoch = open_epoch(store, exclusive=True)
    first = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch).next_lease("w0", 0.0)
    runner(store, job, epoch, generator, worker="w0").run(first)
    work(store, job, load_generator("default"))
    assert hashes(store) == undisturbed
