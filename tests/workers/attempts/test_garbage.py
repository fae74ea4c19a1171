"""Attempts of the shipped generator leave nothing that only the collector of cyclic garbage finds: it may run rarely."""

import gc
from collections import Counter

import numpy as np
from support.local_job import plan, runner

from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.attempts.handover import Handover
from millijoule.workers.generators.protocol import GeneratedBatch, LeavesNoGarbage
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.images.writers import ShardWriter
from millijoule.workers.schemas import ImageRequest, ImageRow
from millijoule.workers.shard_rows import PlanRow

#: What a shard consists of.
KINDS = (
    *(Attempt, DrawnImage, GeneratedBatch, Handover, ImageRequest, ImageRow, PlanRow, ShardWriter),
    *(bytes, np.ndarray),
)


def test_a_shard_leaves_no_garbage(tmp_path):
    generator = load_generator("default")
    assert isinstance(generator, LeavesNoGarbage)
    assert generator.leaves_no_garbage
    store, job = plan(tmp_path, ["a red cat", "two dogs", "", "a blorp"] * 8, shard_size=16)
    shards = load_job_shards(store, job)
    epoch = open_epoch(store, exclusive=True)
    coordinator = Coordinator(shards, np.zeros(len(shards), bool), 60.0, epoch)
    attempts = runner(store, job, epoch, generator, "w1")
    assert attempts.run(coordinator.next_lease("w1", 0.0)).outcome == "committed"  # what is made once
    gc.collect()
    gc.disable()
    try:
        assert attempts.run(coordinator.next_lease("w1", 0.0)).outcome == "committed"
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(one).__name__ for one in gc.garbage if isinstance(one, KINDS))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left
    attempts.close()
