"""How a driver learns that a later run has begun, and of the parts that an earlier one still seals."""

import logging
import time

import numpy as np
import pytest
from support.local_job import plan, runner

from millijoule.pipeline.output.job import Epoch, open_epoch
from millijoule.pipeline.output.other_runs import (
    COMMITS_PERIOD_S,
    LATER_PERIOD_S,
    PARTS_PERIOD_FIRST_S,
    PARTS_PERIOD_GROWTH,
    LaterRun,
    OtherRuns,
)
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.run import JobRun, PlannedJob
from millijoule.workers.layout import COMMITS_PREFIX, SUCCESS_KEY, commit_key, part_key
from millijoule.workers.lease import AttemptResult, Suspect
from millijoule.workers.records import encode
from millijoule.workers.storage.open import open_store


class Counted:
    """A store, and the names of what is asked of it."""

    def __init__(self, store):
        self.store, self.asked = store, []

    def __getattr__(self, name):
        def call(*arguments):
            self.asked.append(name)
            return getattr(self.store, name)(*arguments)

        return call


class World:
    def __init__(self, store, epoch, shards=4, resumes=True):
        self.store, self.found, self.parts, self.commits = Counted(store), [], [], []
        self.runs = OtherRuns(
            *(
                self.store,
                epoch,
                lambda what, do, then=lambda result: None: then(do()),
                np.zeros(shards, bool),
            ),
            *(self.found.append, self.commits.append, self.parts.append if resumes else None),
        )


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_a_later_run_is_looked_for_by_one_request_now_and_then_and_found_once(store):
    world = World(store, open_epoch(store, exclusive=True))
    for tick in range(40):
        world.runs.tick(100.0 + tick * LATER_PERIOD_S / 10)
    assert world.store.asked == ["exists"] * 4
    assert world.runs.later is None
    open_epoch(store, exclusive=True)
    who = Epoch("gpu-9", 17, "ann", 1_780_000_000.0, series="RayJob night")
    store.put("_job/epochs/000003.json", encode(who))
    for tick in range(40, 80):
        world.runs.tick(100.0 + tick * LATER_PERIOD_S / 10)
    assert world.found == [LaterRun(3, who)]
    assert str(world.found[0]) == (
        "run 3 (on gpu-9, process 17 of ann, RayJob night, started 2026-05-28 20:26:40 UTC)"
    )


def test_a_run_whose_record_cannot_be_read_supersedes_all_the_same(store):
    world = World(store, 1)
    store.put("_job/epochs/000002.json", b"{")
    world.runs.look_at_once()
    assert [str(later) for later in world.found] == ["run 2"]


def test_parts_that_an_earlier_run_seals_are_looked_for_less_and_less(store):
    world = World(store, 2)
    store.put(part_key(3, "e0001-abc.p0"), b"{}")
    until, now, looks = PARTS_PERIOD_FIRST_S * (1 + PARTS_PERIOD_GROWTH) + 0.1, 0.0, []
    while now <= until:
        world.runs.tick(1000.0 + now)
        if len(world.parts) > len(looks):
            looks.append(now)
        now += 0.25
    assert looks == [PARTS_PERIOD_FIRST_S, PARTS_PERIOD_FIRST_S * (1 + PARTS_PERIOD_GROWTH)]
    assert set(world.parts) == {frozenset({3})}


@pytest.mark.parametrize(("epoch", "resumes"), [(1, True), (2, False)])
def test_a_first_run_and_one_without_parts_look_for_none(store, epoch, resumes):
    world = World(store, epoch, resumes=resumes)
    for now in range(100):
        world.runs.tick(float(now))
    assert "list" not in world.store.asked


def test_what_an_earlier_run_still_commits_is_looked_up_and_not_too_often(store, caplog):
    world = World(store, 2)
    store.put(commit_key(1), b"{}")
    world.runs.committed(1, 100.0)
    world.runs.committed(1, 100.1)
    assert world.commits == [[1]]
    store.put(commit_key(3), b"{}")
    world.runs.committed(1, 100.0 + 2 * COMMITS_PERIOD_S)
    assert world.commits[1:] == [[1, 3]]
    assert caplog.text.count("an earlier run (1; this is 2) still committed") == 1
    assert world.found == []


def test_a_commit_of_a_later_run_is_a_sign_of_it(store):
    world = World(store, 1)
    open_epoch(store, exclusive=True)
    open_epoch(store, exclusive=True)
    world.runs.committed(2, 100.0)
    assert [later.epoch for later in world.found] == [2]


def job_run(store, job):
    planned = PlannedJob(job, load_job_shards(store, job), exclusive=True)
    options = PoolOptions(1, 1, 1.0, 0.0, {})
    return JobRun(store, planned, options, None, lease_s=60.0, speculate=False, part_s=10.0)


def settle(driver):
    deadline = time.monotonic() + 60
    while not driver.writer.idle:
        assert time.monotonic() < deadline
        driver.writer.settle()
        time.sleep(0.01)


def test_a_driver_that_learns_of_a_later_one_stands_down_and_says_who_it_is(tmp_path, caplog):
    store, job = plan(tmp_path, ["a", "b"])
    first, second = job_run(store, job), job_run(store, job)
    with caplog.at_level(logging.WARNING):
        for driver in (first, second):
            driver.tick()
            settle(driver)
    (said,) = [r.getMessage() for r in caplog.records if "stands down" in r.getMessage()]
    assert said.startswith(f"{first.superseded} has taken over this job: run 1 (this one) stands down")
    assert first.superseded.who.host in said
    assert first.pool.draining == "superseded by run 2"
    assert (second.superseded, second.pool.draining) == (None, None)


def test_a_driver_creates_no_commit_for_a_worker_once_there_is_a_later_one(tmp_path):
    store, job = plan(tmp_path, ["a", "b"])
    first = job_run(store, job)
    lease = first.coordinator.next_lease("w1", 0.0)
    worker = runner(store, job, first.epoch)
    worker.config = worker.finishing.config = worker.config.__class__(
        **{**vars(worker.config), "commits_exclusively": False}
    )
    result = worker.run(lease)
    assert result.outcome == "prepared"
    suspect = AttemptResult(lease, "suspect", result.commit_json, (Suspect(0, 0, "cannot"),))
    second = job_run(store, job)
    first.prepared(suspect)
    settle(first)
    assert list(store.list(COMMITS_PREFIX)) == []
    assert list(store.list("data/")) == []
    assert first.superseded.epoch == second.epoch == 2
    first.flush(everything=True)
    settle(first)
    booked = b"".join(store.get(i.key) for i in store.list("_job/segments/"))
    assert booked.count(b'"loser"') == 1


def test_the_end_of_the_job_is_left_to_the_later_run(tmp_path):
    """All is committed before this run has heard of the other one."""
    store, job = plan(tmp_path, ["a", "b"])
    first = job_run(store, job)
    assert runner(store, job, first.epoch).run(first.coordinator.next_lease("w1", 0.0)).outcome == "committed"
    first.coordinator.complete("", 0, 1.0)
    open_epoch(store, exclusive=True)
    first.tick = lambda: None
    first.run()
    assert first.complete
    assert first.superseded is not None
    assert not store.exists(SUCCESS_KEY)
