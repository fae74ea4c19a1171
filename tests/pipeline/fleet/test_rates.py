"""What a pool is held to be worth, learnt from commits that real attempts make on a counter."""

import time

import pytest
from support.local_job import EVERY_BATCH_S, plan, runner, seal_every_batch
from support.models import Plain

from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.fleet.rates import Rates
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.attempts.parts import LeaseClock
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
def _leases_are_short(monkeypatch):
    monkeypatch.setattr("millijoule.workers.attempts.parts.LEAST_REST_S", 0.0)
    seal_every_batch(monkeypatch)


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
    store, job, attempts = worker(tmp_path, part_s=EVERY_BATCH_S)
    commits = [attempts.run(lease(store, job, n, f"e0001-{n:012x}")).commit_json for n in range(2)]
    assert len(Commit.from_json(commits[0]).parts) >= 2
    rates = rates_of(commits)
    assert rates.images_per_s("only") <= 1 / SECONDS_EACH
    assert rates.joules_per_image("only") == pytest.approx(0.005)


def test_a_shard_of_which_another_worker_made_a_part_says_nothing(tmp_path):
    store, job, first = worker(tmp_path, part_s=EVERY_BATCH_S)
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


def test_a_lease_of_limited_time_gives_its_shard_back_and_its_piece_counts_for_speed_and_joules(tmp_path):
    store, job, first = worker(tmp_path, 0.0)
    result = first.run(lease(store, job, 0, "e1", at_most_s=3.5 * SECONDS_EACH))
    assert result.outcome == "cancelled"
    piece = result.piece
    assert 1 <= piece.images < IMAGES
    assert piece.energy_mj == 5 * piece.images
    assert piece.seconds >= piece.images * SECONDS_EACH
    rates = Rates([Pool("a"), Pool("b")])
    for _ in range(2):
        rates.observe_piece("a", "w1", piece)
    assert rates.images_per_s("a") == pytest.approx(piece.images / piece.seconds)
    assert rates.joules_per_image("a") == pytest.approx(0.005)

    second = worker(tmp_path, 0.0, "w2", (store, job))[2]
    done = second.run(lease(store, job, 0, "e2", resumes=True))
    commit = Commit.from_json(done.commit_json)
    assert commit.images_ok == IMAGES
    assert second.generator.drawn == IMAGES - piece.images
    assert commit.images_by_others == {"w1": piece.images}
    assert commit.energy_mj == 5 * IMAGES


def test_a_lease_goes_on_to_the_end_where_little_is_left_or_a_row_has_to_be_heard_elsewhere(tmp_path):
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0]).__next__
    drawn, suspect = DrawnImage((0, 0), None), DrawnImage((0, 0), None, is_suspect=True)
    limit = LeaseClock(2.5, 20, clock)
    assert [limit.is_over([drawn] * 4) for _ in range(3)] == [False, True, True]
    nearly = LeaseClock(2.0, 8, iter([0.0, 1.9, 2.1]).__next__)
    assert [nearly.is_over([drawn] * 7), nearly.is_over([drawn])] == [True, False]
    doubted = LeaseClock(1.0, 20, iter([0.0, 5.0, 9.0]).__next__)
    assert [doubted.is_over([suspect]), doubted.is_over([drawn])] == [False, False]
    assert LeaseClock(None, 20, iter([0.0]).__next__).is_over([drawn]) is False
