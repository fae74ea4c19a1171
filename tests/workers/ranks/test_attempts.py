"""An attempt of a worker with two ranks is one attempt: one commit, whose one segment has the energy of both devices."""

import json

from support.counters import UUIDS
from support.local_job import plan, work
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.schemas import CounterRead

SPENT_MJ = {f"gpu:{uuid}": rate for uuid, rate in zip(UUIDS, (1000, 700), strict=True)}


class TwoBoards:
    """Each read finds that both boards have spent as much again."""

    method = "nvml-counter"
    resolution_mj = 1

    def __init__(self):
        self.reads = 0

    def read(self):
        self.reads += 1
        spent = {domain: self.reads * mj for domain, mj in SPENT_MJ.items()}
        return CounterRead("boot", 10 * self.reads, 20 * self.reads, 1, spent, None)

    def sample_power(self):
        return ()

    def close(self):
        pass


def test_one_commit_and_one_segment_over_both_devices(forked_ranks, tmp_path):
    store, job = plan(tmp_path, ["a red dog", "a blue cat", "the moon"], shard_size=3)
    options = GeneratorOptions(engine="eager", ranks=2, rungs=Rungs(steps=1))
    generator = DiffusersGenerator.load(tiny_pipeline("sd15"), options=options)
    try:
        work(store, job, generator, TwoBoards())
    finally:
        generator.close()
    (commit,) = [json.loads(p.read_text()) for p in tmp_path.glob("out/_job/commits/*/*.json")]
    (segment,) = [s for s in commit["segments"] if s["segment_class"] == "shard"]
    for domain, mj in SPENT_MJ.items():
        opened, closed = (segment[end]["energy_mj"][domain] for end in ("open", "close"))
        assert closed - opened == mj
