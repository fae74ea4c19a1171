"""Stages that overlap: what the device draws while the shard before is finished, and whose segment is whose."""

import errno
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from support.local_job import plan, runner
from support.models import Plain

from millijoule.pipeline.output.commits import parse_commit
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts import runner as runner_module
from millijoule.workers.attempts.handover import ByteBudget
from millijoule.workers.attempts.parts import PartClock
from millijoule.workers.attempts.store_files import FILES_AT_ONCE
from millijoule.workers.errors import NodeError, SickWorkerError, StoreError
from millijoule.workers.images.formats import MAX_SIDE, ImageFormat
from millijoule.workers.images.writers import ShardWriter
from millijoule.workers.layout import PARTS_PREFIX, commit_key
from millijoule.workers.lease import AttemptResult
from millijoule.workers.shard_rows import read_shard_rows, shard_requests

PATIENCE_S = 20.0


def leases_of(store, job, n):
    shards = load_job_shards(store, job)
    coordinator = Coordinator(shards, np.zeros(len(shards), bool), 60.0, open_epoch(store, exclusive=True))
    return [coordinator.next_lease("w1", 0.0) for _ in range(n)]


class Noting(Plain):
    """Notes which prompts it drew, and waits for `go` before it draws one that says so."""

    def __init__(self):
        super().__init__("cpu")
        self.drawn = []
        self.go = threading.Event()

    def draw(self, request):
        if "wait" in request.prompt:
            assert self.go.wait(PATIENCE_S)
        self.drawn.append(request.prompt)
        return super().draw(request)


class Sick(Noting):
    """Draws the prompt `healthy`, until it has drawn another one."""

    broken = False

    def draw(self, request):
        super().draw(request)
        self.broken |= request.prompt != "healthy"
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Plain.draw(self, request)


class Gate:
    """A real store in which files whose key has a shard's number wait until they may go on, or fail."""

    def __init__(self, store, shard_id):
        self._store = store
        self._key = f"data/{shard_id:08d}"
        self.reached, self.open, self.error = threading.Event(), threading.Event(), None

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put_file(self, key, *arguments):
        if key.startswith(self._key):
            self.reached.set()
            assert self.open.wait(PATIENCE_S)
            if self.error is not None:
                raise self.error
        self._store.put_file(key, *arguments)


@contextmanager
def two_callers():
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def eventually(condition):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_shard_is_drawn_while_the_one_before_is_stored_and_each_commit_has_its_own_segment(tmp_path):
    store, job = plan(tmp_path, ["a", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    gate, model = Gate(store, 0), Noting()
    attempts = runner(gate, job, 1, model)
    with two_callers() as call:
        one = call(attempts.run, first)
        assert gate.reached.wait(PATIENCE_S)
        two = call(attempts.run, second)
        assert two.result(PATIENCE_S).outcome == "committed"  # the first is not
        assert model.drawn == ["a", "b", "c", "d"]
        assert not store.exists(commit_key(0))
        gate.open.set()
        assert one.result(PATIENCE_S).outcome == "committed"
    commits = [parse_commit(store, i, store.get(commit_key(i))) for i in range(2)]
    assert [[s.segment_class for s in c.segments] for c in commits] == [["idle", "shard"], ["idle", "shard"]]
    assert [c.segments[-1].attempt_id for c in commits] == [first.attempt_id, second.attempt_id]
    chain = [s for c in commits for s in c.segments]
    assert all(a.close == b.open for a, b in itertools.pairwise(chain))
    assert attempts.timeline.take() == ()


def test_two_attempts_are_never_drawn_at_once_and_the_second_says_that_it_waits(tmp_path):
    store, job = plan(tmp_path, ["wait", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    model = Noting()
    attempts = runner(store, job, 1, model)
    with two_callers() as call:
        one = call(attempts.run, first)
        eventually(lambda: [p.has_begun for p in attempts.progress] == [True])
        two = call(attempts.run, second)
        eventually(lambda: [p.waits for p in attempts.progress] == [False, True])
        assert model.drawn == []
        model.go.set()
        assert (one.result(PATIENCE_S).outcome, two.result(PATIENCE_S).outcome) == ("committed", "committed")
    assert model.drawn == ["wait", "b", "c", "d"]


def test_a_lease_that_waits_can_be_given_back_and_leaves_no_trace(tmp_path):
    store, job = plan(tmp_path, ["wait", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    model = Noting()
    attempts = runner(store, job, 1, model)
    with two_callers() as call:
        one = call(attempts.run, first)
        eventually(lambda: [p.has_begun for p in attempts.progress] == [True])
        two = call(attempts.run, second)
        eventually(lambda: [p.waits for p in attempts.progress] == [False, True])
        assert not attempts.give_back(first.attempt_id)
        assert attempts.give_back(second.attempt_id)
        assert two.result(PATIENCE_S).outcome == "cancelled"
        model.go.set()
        assert one.result(PATIENCE_S).outcome == "committed"
    assert model.drawn == ["wait", "b"]
    assert not attempts.give_back(second.attempt_id)
    assert attempts.timeline.take() == ()
    assert attempts.budget.used_bytes == 0


def test_storage_that_fails_for_one_attempt_leaves_the_other_alone_and_its_energy_is_a_retry(tmp_path):
    store, job = plan(tmp_path, ["a", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    gate = Gate(store, 0)
    gate.error = StoreError("503", transient=True)
    attempts = runner(gate, job, 1, Noting())
    with two_callers() as call:
        one = call(attempts.run, first)
        assert gate.reached.wait(PATIENCE_S)
        assert call(attempts.run, second).result(PATIENCE_S).outcome == "committed"
        gate.open.set()
        with pytest.raises(StoreError, match="503"):
            one.result(PATIENCE_S)
    left = attempts.timeline.take()
    assert [(s.segment_class, s.attempt_id) for s in left] == [("idle", None), ("retry", first.attempt_id)]


def test_what_a_losing_attempt_used_is_waste_in_the_next_commit(tmp_path):
    store, job = plan(tmp_path, ["a", "b", "c", "d", "e", "f"], shard_size=2)
    first, second, third = leases_of(store, job, 3)
    gate = Gate(store, 0)
    attempts = runner(gate, job, 1, Noting())
    with two_callers() as call:
        one = call(attempts.run, first)
        assert gate.reached.wait(PATIENCE_S)
        assert call(attempts.run, second).result(PATIENCE_S).outcome == "committed"
        assert (
            runner(store, job, 2, worker="w2").run(replace(first, attempt_id="theirs")).outcome == "committed"
        )
        gate.open.set()
        assert one.result(PATIENCE_S).outcome == "exists"
    assert attempts.run(third).outcome == "committed"
    carried = parse_commit(store, 2, store.get(commit_key(2))).segments
    assert [(s.segment_class, s.attempt_id) for s in carried] == [
        ("idle", None),
        ("loser", first.attempt_id),
        ("idle", None),
        ("shard", third.attempt_id),
    ]
    assert not [i.key for i in store.list("data/") if first.attempt_id in i.key]


def test_an_attempt_called_off_while_it_is_stored_takes_its_files_away(tmp_path):
    store, job = plan(tmp_path, ["a", "b"], output_format="files")
    (lease,) = leases_of(store, job, 1)
    gate = Gate(store, 0)
    attempts = runner(gate, job, 1, Noting())
    with two_callers() as call:
        one = call(attempts.run, lease)
        assert gate.reached.wait(PATIENCE_S)
        attempts.cancel(lease.attempt_id)
        gate.open.set()
        assert one.result(PATIENCE_S).outcome == "cancelled"
    assert list(store.list("data/")) == []
    assert [s.segment_class for s in attempts.timeline.take()] == ["idle", "loser"]


def test_a_device_that_turns_out_sick_draws_nothing_of_what_waited_for_it(tmp_path):
    store, job = plan(tmp_path, ["wait", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    model = Sick()
    attempts = runner(store, job, 1, model)
    attempts.warm_up(replace(next(iter(requests_of(store, job))), prompt="healthy"))
    with two_callers() as call:
        one = call(attempts.run, first)
        eventually(lambda: [p.has_begun for p in attempts.progress] == [True])
        two = call(attempts.run, second)
        eventually(lambda: [p.waits for p in attempts.progress] == [False, True])
        model.go.set()
        with pytest.raises(SickWorkerError):
            one.result(PATIENCE_S)
        assert two.result(PATIENCE_S).outcome == "cancelled"
    assert not {"c", "d"} & set(model.drawn)


@pytest.mark.parametrize("ends_as", ["called off", "storage failed"])
def test_a_sick_device_is_told_with_the_next_lease_where_the_attempt_that_found_out_ended_otherwise(
    tmp_path, monkeypatch, ends_as
):
    """Else the driver goes on giving leases to a worker that cancels every one."""
    store, job = plan(tmp_path, ["wait", "b", "c", "d"], shard_size=2)
    first, second = leases_of(store, job, 2)
    model = Sick()
    attempts = runner(store, job, 1, model)
    attempts.warm_up(replace(next(iter(requests_of(store, job))), prompt="healthy"))
    model.go.set()
    finish = attempts.finishing.finish

    def finished(attempt, *rest):
        with pytest.raises(SickWorkerError):
            finish(attempt, *rest)
        if ends_as == "called off":
            return AttemptResult(attempt.lease, "cancelled")
        raise StoreError("busy")

    monkeypatch.setattr(attempts.finishing, "finish", finished)
    if ends_as == "called off":
        assert attempts.run(first).outcome == "cancelled"
    else:
        with pytest.raises(StoreError, match="busy"):
            attempts.run(first)
    with pytest.raises(SickWorkerError, match="on this device"):
        attempts.run(second)


def requests_of(store, job):
    return shard_requests(read_shard_rows(store, load_job_shards(store, job)[0]), 0)


def test_what_is_drawn_and_not_written_is_bounded_in_bytes(tmp_path, monkeypatch):
    """Nobody encodes: the device stops when the bound is reached, and one batch more is drawn at most."""
    encode, may_encode = ShardWriter.add_many, threading.Event()
    image_bytes = 8 * 8 * 3
    monkeypatch.setattr(runner_module, "MAX_WAITING_BYTES", 10 * image_bytes)

    def slow_add(self, *arguments):
        assert may_encode.wait(PATIENCE_S)
        encode(self, *arguments)

    monkeypatch.setattr(ShardWriter, "add_many", slow_add)
    store, job = plan(tmp_path, [f"p{i}" for i in range(60)], shard_size=60)
    (lease,) = leases_of(store, job, 1)
    model = Noting()
    attempts = runner(store, job, 1, model)
    with two_callers() as call:
        one = call(attempts.run, lease)
        eventually(lambda: attempts.budget.used_bytes == 8 * image_bytes)
        time.sleep(0.2)
        assert len(model.drawn) == 12  # two batches of four fit, and a third has been drawn
        may_encode.set()
        assert one.result(PATIENCE_S).outcome == "committed"
    assert attempts.budget.used_bytes == 0


def test_a_full_scratch_disk_ends_the_drawing_and_is_the_nodes_fault(tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/x")

    monkeypatch.setattr(ShardWriter, "add_many", full)
    store, job = plan(tmp_path, [f"p{i}" for i in range(400)], shard_size=400)
    (lease,) = leases_of(store, job, 1)
    model = Noting()
    model.seconds = 0.002
    attempts = runner(store, job, 1, model)
    with pytest.raises(
        NodeError, match=r"scratch folder /scratch/x: No space left .*; free space there, or set TMPDIR"
    ):
        attempts.run(lease)
    assert len(model.drawn) < 400
    assert [s.segment_class for s in attempts.timeline.take()] == ["idle", "retry"]
    assert attempts.budget.used_bytes == 0
    assert attempts.progress == ()


def test_an_image_that_its_format_cannot_hold_is_quarantined_without_a_second_opinion(tmp_path, monkeypatch):
    monkeypatch.setitem(MAX_SIDE, "webp", 7)
    store, job = plan(tmp_path, ["a", "b"])
    (lease,) = leases_of(store, job, 1)
    result = runner(store, replace(job, image_format="webp", image_quality=90), 1).run(lease)
    assert result.outcome == "committed"
    commit = parse_commit(store, 0, result.commit_json)
    assert (commit.images_ok, commit.images_quarantined) == (0, 2)
    assert list(commit.errors) == [
        "RowError: 8x8: webp has at most 7 pixels a side; --image-format png has no such limit"
    ]


@pytest.mark.parametrize(
    ("image_format", "suffix"), [(ImageFormat("jpeg", 95), "jpg"), (ImageFormat("webp", 90), "webp")]
)
@pytest.mark.parametrize("output_format", ["files", "webdataset"])
def test_files_and_members_are_named_after_what_they_hold(tmp_path, output_format, image_format, suffix):
    store, job = plan(tmp_path, ["a", "b"], output_format=output_format)
    job = replace(job, image_format=image_format.name, image_quality=image_format.quality)
    (lease,) = leases_of(store, job, 1)
    commit = parse_commit(store, 0, runner(store, job, 1).run(lease).commit_json)
    paths = [row[12] for row in commit.rows]
    assert all(path.endswith(f"_0.{suffix}") for path in paths)


def test_files_of_a_shard_are_stored_together(tmp_path):
    """Each waits until as many as may be under way are."""
    together = threading.Barrier(FILES_AT_ONCE)

    class Meeting(Gate):
        def put_file(self, key, *arguments):
            if key.endswith(".png"):
                together.wait(PATIENCE_S)
            self._store.put_file(key, *arguments)

    store, job = plan(
        tmp_path, [f"p{i}" for i in range(2 * FILES_AT_ONCE)], shard_size=64, output_format="files"
    )
    (lease,) = leases_of(store, job, 1)
    assert runner(Meeting(store, 0), job, 1).run(lease).outcome == "committed"
    assert sum(i.key.endswith(".png") for i in store.list("data/")) == 2 * FILES_AT_ONCE


@pytest.mark.parametrize(("transient", "left"), [(False, 0), (True, 4)])
def test_where_storage_refuses_a_file_those_beside_it_are_removed_and_where_it_is_away_nobody_waits_for_it(
    tmp_path, transient, left
):
    class Full(Gate):
        def __init__(self, store):
            super().__init__(store, 0)
            self.deletions = 0
            self.beside, self.first = threading.Semaphore(0), threading.Lock()

        def put_file(self, key, *arguments):
            if key.endswith(".png") and self.first.acquire(blocking=False):
                for _ in range(4):
                    assert self.beside.acquire(timeout=PATIENCE_S)
                raise StoreError("No space left on device", transient=transient)
            self._store.put_file(key, *arguments)
            self.beside.release()

        def delete(self, keys):
            self.deletions += 1
            self._store.delete(keys)

    store, job = plan(tmp_path, [f"p{i}" for i in range(4)], shard_size=4, output_format="files")
    (lease,) = leases_of(store, job, 1)
    full = Full(store)
    with pytest.raises(StoreError):
        runner(full, job, 1).run(lease)
    # three images and the table of rows are stored beside the one that is not
    assert len(list(store.list("data/"))) == left
    assert full.deletions == (not transient)


def test_a_budget_lets_one_piece_through_that_is_larger_than_all_of_it():
    budget = ByteBudget(100)
    budget.take(500, lambda: None)

    class Enough(Exception):
        pass

    def unwanted():
        raise Enough

    with pytest.raises(Enough):
        budget.take(1, unwanted)
    budget.give_back(500)
    budget.take(1, unwanted)
    assert budget.used_bytes == 1


class HoldsRecords:
    """A real store in which records of parts wait until they may go on."""

    def __init__(self, store):
        self._store, self.go = store, threading.Event()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put_exclusive(self, key, body):
        if key.startswith(PARTS_PREFIX):
            assert self.go.wait(PATIENCE_S)
        self._store.put_exclusive(key, body)


def parts_sealed(store, job, generator):
    """How many parts a shard has of which every batch, two images, is long enough for one."""
    (lease,) = leases_of(store, job, 1)
    attempts = runner(store, job, 1, generator, part_s=1e-9)
    attempts.drawing.fitted.batches = lambda wanted: [
        list(wanted)[n : n + 2] for n in range(0, len(wanted), 2)
    ]
    return len(parse_commit(store, 0, attempts.run(lease).commit_json).parts)


def test_the_device_draws_on_while_a_part_is_sealed_and_the_next_part_waits_for_that_one(tmp_path):
    prompts = [f"p{n}" for n in range(12)]
    store, job = plan(tmp_path, prompts, shard_size=12)
    holding, generator = HoldsRecords(store), Noting()
    usual = generator.draw

    def draw(request):
        if request.prompt == prompts[-1]:
            holding.go.set()
        return usual(request)

    generator.draw = draw
    assert parts_sealed(holding, job, generator) == 1
    assert generator.drawn == prompts


def test_as_soon_as_one_part_stands_the_next_may_be_sealed_but_for_the_last_piece(tmp_path, monkeypatch):
    prompts, stood, usual_stands = [f"p{n}" for n in range(12)], threading.Semaphore(1), PartClock.stands
    store, job = plan(tmp_path, prompts, shard_size=12)
    generator = Noting()
    usual_draw = generator.draw

    def stands(clock):
        usual_stands(clock)
        stood.release()

    def draw(request):
        if prompts.index(request.prompt) % 2 == 0:
            assert stood.acquire(timeout=PATIENCE_S)
        return usual_draw(request)

    monkeypatch.setattr(PartClock, "stands", stands)
    generator.draw = draw
    assert parts_sealed(store, job, generator) == 5


def test_what_a_commit_takes_tells_how_long_sealing_will(tmp_path):
    store, job = plan(tmp_path, ["a", "b"], shard_size=2)
    (lease,) = leases_of(store, job, 1)
    gate = Gate(store, 0)
    attempts = runner(gate, job, 1)
    with two_callers() as call:
        running = call(attempts.run, lease)
        assert gate.reached.wait(PATIENCE_S)
        began = time.monotonic()
        time.sleep(0.05)
        waited = time.monotonic() - began
        gate.open.set()
        assert running.result().outcome == "committed"
    assert attempts.sealing.seconds >= waited
