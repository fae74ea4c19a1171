"""What a pool is held to be worth, learnt from commits that real attempts make on a counter."""

import time

import pytest
from support.local_job import plan, runner
from support.models import Plain

from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.fleet.rates import Rates
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.workers.lease import Lease
from millijoule.workers.schemas import Commit, CounterRead

IMAGES = 8
SECONDS_EACH = 0.02


class Counter:
    """5 mJ for each image that is drawn; its clock is the real one."""

    method = "rapl"
    cpu_ns_elsewhere = None
    spent_mj = 0

    def read(self):
        return CounterRead("boot", time.monotonic_ns(), time.time_ns(), 0, {"cpu:package-0": self.spent_mj})

    read_afresh = read


class Steady(Plain):
    """Takes as long for each image, one at a time."""

    def __init__(self, counter):
        super().__init__("cpu")
        self.counter, self.drawn = counter, 0

    def draw(self, request):
        time.sleep(SECONDS_EACH)
        self.counter.spent_mj += 5
        self.drawn += 1
        return super().draw(request)


@pytest.fixture(autouse=True)
def _every_image_is_a_part(monkeypatch):
    monkeypatch.setattr("millijoule.workers.attempts.parts.LEAST_REST_S", 0.0)


def worker(tmp_path, part_s, name="w1", store_and_job=None):
    store, job = store_and_job or plan(tmp_path, [f"p{i}" for i in range(2 * IMAGES)], shard_size=IMAGES)
    counter = Counter()
    attempts = runner(store, job, 1, Steady(counter), name, counter, part_s=part_s)
    attempts.drawing.fitted.batches = lambda requests: [[at] for at in requests]
    return store, job, attempts


def lease(store, job, number, attempt_id, **more):
    return Lease(load_job_shards(store, job)[number], attempt_id, "w1", **more)


def rates_of(commits):
    rates = Rates([Pool("only")])
    for commit in commits:
        rates.observe("only", Commit.from_json(commit))
    return rates


def test_a_shard_made_in_parts_is_as_fast_as_one_that_is_not(tmp_path):
    store, job, attempts = worker(tmp_path, part_s=3 * SECONDS_EACH)
    commits = [attempts.run(lease(store, job, n, f"e0001-{n:012x}")).commit_json for n in range(2)]
    assert len(Commit.from_json(commits[0]).parts) >= 2
    rates = rates_of(commits)
    assert rates.images_per_s("only") <= 1 / SECONDS_EACH
    assert rates.joules_per_image("only") == pytest.approx(0.005)


def test_a_shard_of_which_another_worker_made_a_part_says_nothing(tmp_path):
    store, job, first = worker(tmp_path, part_s=2 * SECONDS_EACH)
    draw = first.generator.draw

    def leaves_in_the_middle(request):
        if first.generator.drawn == IMAGES // 2:
            first.leave()
        return draw(request)

    first.generator.draw = leaves_in_the_middle
    assert first.run(lease(store, job, 0, "e0001-00000000000a")).outcome == "cancelled"
    *_, second = worker(tmp_path, 0.0, "w2", (store, job))
    result = second.run(lease(store, job, 0, "e0001-00000000000b", resumes=True))
    assert second.generator.drawn < IMAGES
    assert rates_of([result.commit_json]).images_per_s("only") is None
