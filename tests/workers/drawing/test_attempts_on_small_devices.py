"""Whole attempts on devices that are too small for a batch, for an image, and for a health check."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.local_job import plan, runner, work
from support.models import Plain

from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers import host_folder
from millijoule.workers.errors import NodeError, SickWorkerError
from millijoule.workers.lease import Suspect
from millijoule.workers.schemas import ImageRequest

PROMPTS = [f"p{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def own_host(tmp_path, monkeypatch):
    """Notes of batch sizes are those of this test."""
    folder = tmp_path / "host"
    folder.mkdir()
    monkeypatch.setattr(host_folder, "shared_memory_or_temporary", lambda: folder)


class Small(Plain):
    """Holds `capacity` images; a prompt in `large` needs as much memory as two."""

    def __init__(self, capacity, large=()):
        super().__init__("cpu")
        self.capacity, self.large = capacity, large
        self.calls = []

    def generate(self, requests):
        self.calls.append(len(requests))
        if sum(2 if r.prompt in self.large else 1 for r in requests) > self.capacity:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.17 GiB")
        return super().generate(requests)


def images(store, job):
    """SHA-256 by prompt of all images of a finished job, read from its files."""
    found = {}
    for commit in read_commits(store, len(load_job_shards(store, job))):
        with store.open_input(commit.rows_path) as file:
            for row in pq.read_table(file).to_pylist():
                assert row["status"] == "ok"
                found[row["prompt"]] = hashlib.sha256(row["image"]).hexdigest()
    return found


def test_a_job_on_a_device_that_is_too_small_for_its_batch_has_every_image_and_the_same_bytes(tmp_path):
    jobs = []
    for name, generator in (("large", Small(4)), ("small", Small(1))):
        (tmp_path / name).mkdir()
        store, job = plan(tmp_path / name, PROMPTS, shard_size=8)
        work(store, job, generator)
        jobs.append(images(store, job))
        assert set(jobs[-1]) == set(PROMPTS)
    assert jobs[0] == jobs[1]
    assert generator.calls == [4, 2] + [1] * 20


def test_the_next_worker_of_the_host_does_not_run_out_of_memory_again(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=8)
    first, second = Small(2), Small(2)
    leases = Coordinator(
        load_job_shards(store, job), np.zeros(3, bool), 60.0, open_epoch(store, exclusive=True)
    )
    runner(store, job, 1, first).run(leases.next_lease("w1", 0.0))
    runner(store, job, 1, second).run(leases.next_lease("w2", 0.0))
    assert first.calls == [4] + [2] * 4
    assert second.calls == [2] * 4


def lease_of(store, job):
    shards = load_job_shards(store, job)
    return Coordinator(
        shards, np.zeros(len(shards), bool), 60.0, open_epoch(store, exclusive=True)
    ).next_lease("w1", 0.0)


def test_an_image_that_no_saver_makes_fit_is_the_node_s_trouble_and_no_row_s(tmp_path):
    store, job = plan(tmp_path, PROMPTS[:4])
    attempt = runner(store, job, 1, Small(1, large=["p2"]))
    attempt.warm_up(ImageRequest("warm-up", 0, "", seed=0))
    with pytest.raises(NodeError, match="out of memory with a single image of 8x8 pixels") as caught:
        attempt.run(lease_of(store, job))
    assert not isinstance(caught.value, SickWorkerError)
    assert not list(store.list("_job/commits/"))
    assert [s.segment_class for s in attempt.timeline.take()][-1] == "retry"


def test_memory_that_runs_out_in_a_health_check_is_no_sick_worker(tmp_path):
    """A bad row makes the worker draw a healthy one; that this then does not fit says nothing about the device."""
    store, job = plan(tmp_path, PROMPTS[:4])
    generator = Small(4)
    attempt = runner(store, job, 1, generator)
    attempt.warm_up(ImageRequest("warm-up", 0, "", seed=0))

    def fail(requests):
        generator.capacity = 0
        raise ValueError("no")

    generator.draw = fail
    with pytest.raises(NodeError) as caught:
        attempt.run(lease_of(store, job))
    assert not isinstance(caught.value, SickWorkerError)


def test_memory_that_runs_out_confirms_no_suspicion(tmp_path):
    from dataclasses import replace

    store, job = plan(tmp_path, PROMPTS[:4])
    lease = replace(lease_of(store, job), confirm=(Suspect(2, 0, "no"),), healthy=(0, 0))
    with pytest.raises(NodeError, match="out of memory"):
        runner(store, job, 1, Small(1, large=["p2"])).run(lease)


def test_host_memory_that_runs_out_while_files_are_written_is_the_node_s_trouble(tmp_path, monkeypatch):
    store, job = plan(tmp_path, PROMPTS[:4])

    def full(*_, **__):
        raise MemoryError("cannot allocate 3 GB")

    monkeypatch.setattr(store, "put_file", full)
    with pytest.raises(NodeError, match="out of memory"):
        runner(store, job, 1).run(lease_of(store, job))
