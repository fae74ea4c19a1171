"""Parts of shards: crashes at any step of long attempts, and an oracle that looks at files and at a counter, not at the protocol."""

import hashlib
import io
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.counted_images import Counter, Spending
from support.local_job import EVERY_BATCH_S, plan, runner, seal_every_batch

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.closing.garbage import find_orphans
from millijoule.pipeline.energy.uncommitted import UncommittedWriter
from millijoule.pipeline.output.commits import list_committed, read_commits
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.output.parts import shards_in_parts
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts.parts import Part, as_ranges
from millijoule.workers.errors import StoreError
from millijoule.workers.layout import PARTS_PREFIX
from millijoule.workers.schemas import Commit

PROMPTS = [f"p{i}" for i in range(12)]


class Crash(BaseException):
    """The worker's process ends here: nothing of it runs any more."""


class Dying:
    """A real store for a worker that dies at its `step`-th write or deletion, before it or after it."""

    def __init__(self, store, step, after):
        self._store, self.left, self._after = store, step, after

    def __getattr__(self, name):
        return getattr(self._store, name)

    def _do(self, act, *args):
        self.left -= 1
        if self.left == 0 and not self._after:
            raise Crash
        if self.left < 0:
            raise Crash
        done = act(*args)
        if self.left == 0:
            raise Crash
        return done

    def put(self, *args):
        return self._do(self._store.put, *args)

    def put_exclusive(self, *args):
        return self._do(self._store.put_exclusive, *args)

    def put_file(self, *args):
        return self._do(self._store.put_file, *args)

    def delete(self, keys):
        return self._do(self._store.delete, list(keys))


def coordinator(store, job, epoch):
    shards = load_job_shards(store, job)
    done = list_committed(store, len(shards))
    return Coordinator(shards, done, 60.0, epoch, in_parts=frozenset(shards_in_parts(store, done)))


def table(store, key):
    return pq.read_table(io.BytesIO(store.get(key))).to_pylist()


def reference(output_format):
    """SHA-256 of each image's bytes where nothing dies, by prompt id."""
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), PROMPTS, shard_size=12, output_format=output_format)
        lease = coordinator(store, job, open_epoch(store, exclusive=True)).next_lease("w1", 0.0)
        assert runner(store, job, 1, part_s=0.0).run(lease).outcome == "committed"
        (commit,) = read_commits(store, 1)
        assert commit.parts == ()
        return {row["prompt_id"]: row["sha256"] for row in table(store, commit.rows_path)}


def attempt(store, job, counter, drawn, worker, crash=None):
    """One worker's attempt, two images a batch, in a driver of its own. Returns its outcome, or "died", and its runner."""
    epoch = open_epoch(store, exclusive=True)
    lease = coordinator(store, job, epoch).next_lease(worker, 0.0)
    seen = store if crash is None else Dying(store, *crash)
    attempts = runner(seen, job, epoch, Spending(counter, drawn), worker, counter, part_s=EVERY_BATCH_S)
    attempts.drawing.fitted.batches = in_pairs
    try:
        return attempts.run(lease).outcome, attempts
    except Crash:
        return "died", attempts


def in_pairs(requests):
    places = list(requests)
    return [places[i : i + 2] for i in range(0, len(places), 2)]


@pytest.fixture(autouse=True)
def _every_batch_is_a_part(monkeypatch):
    seal_every_batch(monkeypatch)


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
@settings(max_examples=8, deadline=None)
@given(crashes=st.lists(st.tuples(st.integers(1, 16), st.booleans()), max_size=4))
def test_whatever_dies_every_image_is_there_once_and_sealed_parts_are_not_drawn_again(output_format, crashes):
    expected = reference(output_format)
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), PROMPTS, shard_size=12, output_format=output_format)
        counter, drawn = Counter(), []
        for n, crash in enumerate(crashes):
            if list_committed(store, 1).all():
                break
            sealed = sealed_images(store)
            before = len(drawn)
            attempt(store, job, counter, drawn, f"w{n}", crash)
            assert not set(drawn[before:]) & sealed, "a sealed image was drawn again"
        if not list_committed(store, 1).all():
            sealed = sealed_images(store)
            before = len(drawn)
            assert attempt(store, job, counter, drawn, "last")[0] == "committed"
            assert not set(drawn[before:]) & sealed
        (commit,) = read_commits(store, 1)
        rows = table(store, commit.rows_path)
        assert {row["prompt_id"]: row["sha256"] for row in rows} == expected
        assert len(rows) == len(PROMPTS)
        for file in commit.files:
            assert hashlib.sha256(store.get(file.path)).hexdigest() == file.sha256
        # what the shard is said to have used is what drawing just these images once cost on the counter
        assert commit.energy_mj == 7 * len(PROMPTS)
        finish_job(store, job, load_job_shards(store, job))
        assert [p for p in check_output(store) if "energy" not in p] == []
        named = {file.path for file in commit.files}
        assert not {o.key for o in find_orphans(store)} & named


def sealed_images(store):
    """Prompt ids in sealed parts, read from the files that their records name."""
    found = set()
    for item in store.list(PARTS_PREFIX):
        part = Part.from_json(store.get(item.key))
        found |= {row["prompt_id"] for row in table(store, part.rows_path)}
    return found


def test_joules_of_a_dead_worker_s_sealed_parts_are_the_shards_and_those_of_a_living_one_count_once(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    counter, drawn = Counter(), []
    assert attempt(store, job, counter, drawn, "dead", (5, False))[0] == "died"  # two parts are sealed
    living = runner(
        store,
        job,
        open_epoch(store, exclusive=True),
        Spending(counter, drawn),
        "leaves",
        counter,
        part_s=EVERY_BATCH_S,
    )
    living.drawing.fitted.batches = in_pairs
    lease = coordinator(store, job, 2).next_lease("leaves", 0.0)
    usual = living.drawing.generator.draw

    def leave_after(request):
        if request.prompt == "p5":
            living.leave()
        return usual(request)

    living.drawing.generator.draw = leave_after
    assert living.run(lease).outcome == "cancelled"
    living.close()
    living.timeline.close("idle", last=True)
    words = UncommittedWriter(store, 2)
    words.add("leaves", living.timeline.take(), ())
    words.flush()
    assert attempt(store, job, counter, drawn, "last")[0] == "committed"
    (commit,) = read_commits(store, 1)
    assert len(commit.parts) >= 3
    assert commit.energy_mj == 7 * len(PROMPTS)
    finish_job(store, job, load_job_shards(store, job))
    assert list(check_output(store)) == []
    stats = json.loads(store.get("stats.json"))
    assert stats["energy"]["shard_mj"] == 7 * len(PROMPTS)
    assert stats["energy"]["total_mj"] == counter.spent_mj


class RefusesAfterwards:
    """A store in which the second part's record comes to stand, and then nothing more is told."""

    def __init__(self, store):
        self._store, self.parts = store, 0

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put_exclusive(self, key, body):
        self._store.put_exclusive(key, body)
        self.parts += key.startswith(PARTS_PREFIX)
        if self.parts == 2:
            raise StoreError("refused")


def test_a_part_of_which_its_worker_does_not_know_that_it_stands_costs_what_it_cost(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    counter, drawn = Counter(), []
    epoch = open_epoch(store, exclusive=True)
    living = runner(
        RefusesAfterwards(store),
        job,
        epoch,
        Spending(counter, drawn),
        "refused",
        counter,
        part_s=EVERY_BATCH_S,
    )
    living.drawing.fitted.batches = in_pairs
    with pytest.raises(StoreError):
        living.run(coordinator(store, job, epoch).next_lease("refused", 0.0))
    living.close()
    living.timeline.close("idle", last=True)
    words = UncommittedWriter(store, epoch)
    words.add("refused", living.timeline.take(), ())
    words.flush()
    assert attempt(store, job, counter, drawn, "last")[0] == "committed"
    finish_job(store, job, load_job_shards(store, job))
    energy = json.loads(store.get("stats.json"))["energy"]
    assert energy["shard_mj"] == 7 * len(PROMPTS)
    assert energy["total_mj"] == counter.spent_mj


def rows_of(store, result):
    """The rows of a commit that does not stand yet."""
    return table(store, Commit.from_json(result.commit_json).rows_path)


def leaving_at(store, job, prompt):
    """What comes of a lease whose worker is told to leave while it draws `prompt`, and its runner."""
    epoch, counter = open_epoch(store, exclusive=True), Counter()
    leaving = runner(store, job, epoch, Spending(counter, []), "leaves", counter, part_s=60.0)
    leaving.drawing.fitted.batches = in_pairs
    usual = leaving.drawing.generator.draw

    def draw(request):
        if request.prompt == prompt:
            leaving.leave()
        return usual(request)

    leaving.drawing.generator.draw = draw
    return leaving.run(coordinator(store, job, epoch).next_lease("leaves", 0.0)), leaving


def test_a_worker_that_leaves_with_the_last_batch_commits_its_shard(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    result, _ = leaving_at(store, job, PROMPTS[-1])
    assert result.outcome == "committed"


def test_a_lease_that_reaches_a_worker_after_it_was_told_to_leave_comes_back_at_once(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    result, leaving = leaving_at(store, job, PROMPTS[2])
    assert result.outcome == "cancelled"
    drawn = len(leaving.drawing.generator.drawn)
    late = coordinator(store, job, 1).next_lease("leaves", 0.0)
    assert leaving.run(late).outcome == "cancelled"
    assert len(leaving.drawing.generator.drawn) == drawn


def test_files_of_sealed_parts_are_kept_until_their_shard_is_committed_without_them(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    counter, drawn = Counter(), []
    assert attempt(store, job, counter, drawn, "dead", (5, False))[0] == "died"
    later = time.time() + 10 * 24 * 3600
    open_epoch(store, exclusive=True)
    (record, *_) = store.list(PARTS_PREFIX)
    part = Part.from_json(store.get(record.key))
    verdicts = {orphan.key: orphan for orphan in find_orphans(store, now=later)}
    assert all(not verdicts[file.path].removable for file in part.files)
    store.delete([item.key for item in store.list(PARTS_PREFIX)])
    assert attempt(store, job, counter, drawn, "last")[0] == "committed"
    verdicts = {orphan.key: orphan for orphan in find_orphans(store, now=later)}
    assert all(verdicts[file.path].removable for file in part.files)


def test_a_damaged_part_and_one_of_a_distrusted_worker_are_drawn_again(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    counter, drawn = Counter(), []
    assert attempt(store, job, counter, drawn, "liar", (5, False))[0] == "died"
    assert attempt(store, job, counter, drawn, "dead", (3, False))[0] == "died"
    parts = [Part.from_json(store.get(item.key)) for item in store.list(PARTS_PREFIX)]
    of_dead = [part for part in parts if part.worker_id == "dead"]
    assert len(of_dead) == 1
    assert len(parts) == 3
    store.put(of_dead[0].rows_path, b"something else")
    epoch = open_epoch(store, exclusive=True)
    lease = replace(coordinator(store, job, epoch).next_lease("last", 0.0), distrusted=("liar",))
    drawn.clear()
    assert (
        runner(store, job, epoch, Spending(counter, drawn), "last", counter).run(lease).outcome == "committed"
    )
    assert len([prompt for prompt in drawn if prompt]) >= len(PROMPTS)
    (commit,) = read_commits(store, 1)
    assert commit.parts == ()


def test_numbers_become_ranges():
    assert as_ranges([5, 0, 1, 2, 6]) == ((0, 3), (5, 7))


class FailsOn(Spending):
    """Raises on some prompts, in whatever company."""

    def __init__(self, counter, drawn, prompts):
        super().__init__(counter, drawn)
        self.prompts = prompts

    def generate(self, requests):
        if any(r.prompt in self.prompts for r in requests):
            raise ValueError("cannot be drawn here")
        return super().generate(requests)


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
def test_parts_are_sealed_after_a_row_that_fails_and_it_is_in_none(tmp_path, output_format):
    store, job = plan(tmp_path, PROMPTS, shard_size=12, output_format=output_format)
    epoch, counter, fail = (
        open_epoch(store, exclusive=True),
        Counter(),
        {"p3", "p6", "p7"},
    )  # p6 and p7: a whole batch
    accuser = runner(store, job, epoch, FailsOn(counter, [], fail), "w1", counter, part_s=EVERY_BATCH_S)
    accuser.drawing.fitted.batches = in_pairs
    shards = coordinator(store, job, epoch)
    result = accuser.run(shards.next_lease("w1", 0.0))
    assert result.outcome == "suspect"
    assert {PROMPTS[suspect.row] for suspect in result.suspects} == fail
    ids = {row["prompt_id"]: row["prompt"] for row in rows_of(store, result)}
    assert {ids[i] for i in sealed_images(store)} == set(PROMPTS) - fail
    assert [row["prompt"] for row in rows_of(store, result) if row["status"] == "quarantined"] == sorted(fail)
    assert [row["prompt"] for row in rows_of(store, result)] == PROMPTS
    commit = Commit.from_json(result.commit_json)
    assert sum(
        s.close.energy_mj["cpu:package-0"] - s.open.energy_mj["cpu:package-0"] for s in commit.segments
    ) == (counter.spent_mj)


def test_who_comes_after_one_whose_word_was_void_takes_nothing_of_it_and_who_comes_after_one_that_died_all(
    tmp_path,
):
    store, job = plan(tmp_path, PROMPTS, shard_size=12)
    epoch, counter = open_epoch(store, exclusive=True), Counter()
    accuser = runner(store, job, epoch, FailsOn(counter, [], {"p3"}), "w1", counter, part_s=EVERY_BATCH_S)
    accuser.drawing.fitted.batches = in_pairs
    lease = coordinator(store, job, epoch).next_lease("w1", 0.0)
    assert accuser.run(lease).outcome == "suspect"
    drawn = []
    distrustful = replace(lease, attempt_id="e0001-b", worker_id="w2", resumes=True, distrusted=("w1",))
    other = runner(Dying(store, 1, False), job, epoch, Spending(counter, drawn), "w2", counter, part_s=0.0)
    with pytest.raises(Crash):
        other.run(distrustful)
    assert len(drawn) == len(PROMPTS)
    drawn.clear()
    trusting = replace(lease, attempt_id="e0001-c", worker_id="w3", resumes=True)
    third = runner(store, job, epoch, Spending(counter, drawn), "w3", counter, part_s=0.0)
    assert third.run(trusting).outcome == "committed"
    assert len(drawn) == 1, "the row that failed"
    (commit,) = read_commits(store, 1)
    assert {row["prompt_id"]: row["sha256"] for row in table(store, commit.rows_path)} == reference("parquet")


def test_a_second_lease_for_a_straggler_takes_over_what_that_has_sealed(tmp_path):
    """And the straggler, which ends second, leaves the files alone that the commit has of it."""
    store, job = plan(tmp_path, PROMPTS, shard_size=6)
    epoch, drawn_by = open_epoch(store, exclusive=True), {"slow": [], "quick": []}
    leases = coordinator(store, job, epoch)
    workers = {}
    for name, drawn in drawn_by.items():
        workers[name] = runner(store, job, epoch, Spending(Counter(), drawn), name, part_s=EVERY_BATCH_S)
        workers[name].drawing.fitted.batches = in_pairs
    straggling, other = leases.next_lease("slow", 0.0), leases.next_lease("quick", 0.0)
    assert workers["quick"].run(other).outcome == "committed"
    leases.complete(other.attempt_id, other.shard.shard_id, 1.0)
    drawn_by["quick"].clear()
    usual = workers["slow"].drawing.generator.draw

    def draw(request):
        if request.prompt == "p4":
            while len(list(store.list(PARTS_PREFIX))) < 2:
                time.sleep(0.01)
            second = leases.next_lease("quick", 100.0)
            assert (second.shard.shard_id, second.resumes) == (straggling.shard.shard_id, True)
            assert workers["quick"].run(second).outcome == "committed"
        return usual(request)

    workers["slow"].drawing.generator.draw = draw
    assert workers["slow"].run(straggling).outcome == "exists"
    assert len(drawn_by["quick"]) == 2, "p4 and p5; the four before are the straggler's"
    (commit,) = [c for c in read_commits(store, 2) if c.shard_id == straggling.shard.shard_id]
    assert {row["prompt_id"]: row["sha256"] for row in table(store, commit.rows_path)}.items() <= reference(
        "parquet"
    ).items()
    assert [hashlib.sha256(store.get(file.path)).hexdigest() for file in commit.files] == [
        f.sha256 for f in commit.files
    ]
