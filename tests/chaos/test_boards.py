"""Kills under real Ray with one board per worker: what is certified is what the boards' counters ran."""

import os
import signal

import pytest
from support import boards
from support.cluster import RayCluster
from support.counter_judge import judge
from support.jobs import assert_exactly_once, generate, start, wait_for_commits, wait_for_log

from millijoule.workers.meters.meter import read_boot_id

SLOW_S = 3.0


@pytest.fixture(scope="module")
def cluster():
    """A head without room, and one node whose two GPUs Ray gives to workers by CUDA_VISIBLE_DEVICES."""
    with RayCluster(head_cpus=0) as cluster:
        cluster.add_node(cpus=2, gpus=2)
        yield cluster


class Job:
    """A job on stand-in boards of its own."""

    def __init__(self, folder, cluster):
        self.folder, self.cluster, self.out = folder, cluster, folder / "out"
        self.boards = boards.make_boards(folder / "host", 2)
        self.env = {
            "PYTHONPATH": f"{boards.SITE}:{boards.TESTS}",
            "MILLIJOULE_TEST_BOARDS": str(folder / "host"),
            "MILLIJOULE_TEST_SLOW_S": str(SLOW_S),
        }

    def prompts(self, *words):
        self.images = len(words)
        lines = (f"image {i} mj=4000 ms=60 {word}\n" for i, word in enumerate(words))
        (self.folder / "prompts.txt").write_text("".join(lines))

    def arguments(self, *more):
        return (
            *("--prompts", self.folder / "prompts.txt", "--output", self.out, "--shard-size", 4),
            *("--model", "python:support.spending_model:load", "--gpus-per-worker", 1, *more),
        )

    def generate(self, *more):
        done = generate(self.folder, *self.arguments(*more), ray=self.cluster.address, **self.env)
        assert done.returncode == 0, done.stderr
        return done

    def start(self, *more):
        return start(self.folder, *self.arguments(*more), ray=self.cluster.address, **self.env)

    def assert_certified(self):
        """All of both boards, to the millijoule; who spent anything on them was a worker of the job."""
        history = {b.uuid: ([read_boot_id()], b.records()) for b in self.boards}
        assert all(len(records) > 2 for _, records in history.values()), "both boards were at work"
        spenders = {r.pid for _, records in history.values() for r in records if r.kind == boards.SPEND}
        names = dict.fromkeys(spenders, "w0001-0001")
        verdict = judge(self.out, history, names)
        assert verdict.problems == []
        assert verdict.outcome == "certified"
        assert_exactly_once(self.out, self.images)


@pytest.fixture
def job(tmp_path, cluster):
    return Job(tmp_path, cluster)


def test_workers_that_die_in_their_batches(job):
    job.prompts(*[""] * 9, "slow die", *[""] * 12, "slow die", "")
    assert "is gone" in job.generate().stderr
    job.assert_certified()


@pytest.mark.slow
def test_a_straggler_whose_race_is_lost_ends_its_batch_at_the_end(job):
    job.prompts("slow", *[""] * 31)
    job.generate()
    job.assert_certified()


@pytest.mark.slow
def test_a_worker_and_the_driver_die_and_one_worker_goes_on(job):
    job.prompts(*[""] * 48)
    driver = job.start()
    wait_for_commits(job.out, 2)
    workers = job.cluster.nodes[1].workers()
    assert len(workers) == 2
    workers[0].kill()
    wait_for_log(job.folder, "is gone")
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    job.generate("--workers", 1)
    job.assert_certified()
