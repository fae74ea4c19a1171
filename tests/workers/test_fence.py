"""Two runs of one job at once: nothing that the superseded one makes is committed by it, nothing finished is lost, every joule is booked.

The oracle is the files, read afresh, and two counters; and a note of what was in the store when a commit was created.
"""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.counted_images import IMAGE_MJ, Counter, Spending
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
from millijoule.workers.attempts.parts import Part
from millijoule.workers.errors import StoreError
from millijoule.workers.fence import is_superseded
from millijoule.workers.layout import COMMITS_PREFIX, PARTS_PREFIX, epoch_key

TESTS = Path(__file__).parents[1]
PROMPTS = [f"p{i}" for i in range(12)]
SHARD_SIZE = 4


class Run:
    """One run with one worker, whose host has a counter of its own."""

    def __init__(self, store, job, name, part_s):
        self.raw, self.job, self.name = store, job, name
        self.epoch = open_epoch(store, exclusive=True)
        self.counter, self.drawn, self.outcomes = Counter(f"boot-of-{name}"), [], []
        self.worker = runner(
            self.seen_store(), job, self.epoch, Spending(self.counter, self.drawn), name, self.counter, part_s
        )
        self.worker.drawing.fitted.batches = in_pairs
        shards = load_job_shards(store, job)
        self.coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, self.epoch)

    def seen_store(self):
        return self.raw

    def shard(self):
        """Make one shard that has no commit, as far as this run knows; False: there is none."""
        known = self.coordinator
        known.in_parts = frozenset(shards_in_parts(self.raw, known.committed))
        lease = known.next_lease(self.name, 0.0)
        if lease is None:
            return False
        result = self.worker.run(lease)
        self.outcomes.append(result.outcome)
        if result.outcome in ("committed", "exists"):
            known.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
        return True

    def last_words(self):
        self.worker.close()
        self.worker.timeline.close("idle", last=True)
        words = UncommittedWriter(self.raw, self.epoch)
        words.add(self.name, self.worker.timeline.take(), ())
        words.flush()


class Zombie(Run):
    """A run that nobody tells of the other one, and that tries every shard once. Before its operation number `moment` on the store,
    or after it, the other run begins and makes `eager` shards; `late` creates are those with the other run's epoch in place."""

    def __init__(self, store, job, part_s, moment, after, eager):
        self.moment, self.after, self.eager, self.part_s = moment, after, eager, part_s
        self.other, self.asked, self.late, self.made_early = None, [], [], {}
        super().__init__(store, job, "zombie", part_s)

    def seen_store(self):
        return Watched(self)

    def other_begins(self):
        self.other = Run(self.raw, self.job, "other", self.part_s)
        for _ in range(self.eager):
            before = sealed(self.raw)
            drawn = len(self.other.drawn)
            self.other.shard()
            assert not set(self.other.drawn[drawn:]) & before, "what was sealed is drawn again"


class Watched:
    OPERATIONS = ("put", "put_file", "put_exclusive", "delete", "get", "size", "exists")

    def __init__(self, zombie):
        self.zombie, self.left = zombie, zombie.moment

    def __getattr__(self, name):
        attribute = getattr(self.zombie.raw, name)
        if name not in self.OPERATIONS:
            return attribute

        def operation(*arguments):
            zombie = self.zombie
            self.left -= 1
            if self.left == -1 and not zombie.after:
                zombie.other_begins()
            there = zombie.other is not None  # as the store has it at this moment
            if arguments[0] == epoch_key(zombie.epoch + 1):
                zombie.asked.append(there)
            done = attribute(*arguments)
            if name == "put_exclusive" and arguments[0].startswith(COMMITS_PREFIX):
                assert zombie.asked[-1] is False, "it had been told, and committed"
                zombie.late += [arguments[0]] if there else []
            if self.left == -1 and zombie.after:
                zombie.other_begins()
            return done

        return operation


def in_pairs(requests):
    places = list(requests)
    return [places[i : i + 2] for i in range(0, len(places), 2)]


def table(store, key):
    return pq.read_table(io.BytesIO(store.get(key))).to_pylist()


def sealed(store):
    """Prompt ids in sealed parts of shards without a commit."""
    commits = {int(Path(i.key).stem) for i in store.list(COMMITS_PREFIX)}
    parts = [Part.from_json(store.get(i.key)) for i in store.list(PARTS_PREFIX)]
    return {row["prompt_id"] for p in parts if p.shard_id not in commits for row in table(store, p.rows_path)}


def expected_hashes():
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), PROMPTS, shard_size=SHARD_SIZE)
        run = Run(store, job, "alone", 0.0)
        while run.shard():
            pass
        return {
            r["prompt_id"]: r["sha256"] for c in read_commits(store, 3) for r in table(store, c.rows_path)
        }


def assert_all_is_well(store, job, *spent_mj):
    """Every image once, as an undisturbed run has it; its files are what they are said to be; every joule of all counters is booked."""
    commits = list(read_commits(store, len(load_job_shards(store, job))))
    rows = [row for commit in commits for row in table(store, commit.rows_path)]
    assert {row["prompt_id"]: row["sha256"] for row in rows} == EXPECTED
    assert len(rows) == len(PROMPTS)
    for file in (file for commit in commits for file in commit.files):
        assert hashlib.sha256(store.get(file.path)).hexdigest() == file.sha256
    finish_job(store, job, load_job_shards(store, job))
    assert list(check_output(store)) == []
    stats = json.loads(store.get("stats.json"))
    assert stats["energy"]["total_mj"] == sum(spent_mj)
    assert stats["energy"]["shard_mj"] == IMAGE_MJ * len(PROMPTS)
    named = {file.path for commit in commits for file in commit.files}
    assert all(orphan.key not in named for orphan in find_orphans(store))
    return commits


EXPECTED = expected_hashes()


@pytest.fixture(autouse=True)
def _every_batch_is_a_part(monkeypatch):
    seal_every_batch(monkeypatch)


@settings(max_examples=20, deadline=None)
@given(
    moment=st.integers(0, 45),
    after=st.booleans(),
    eager=st.integers(0, 3),
    part_s=st.sampled_from([60.0, EVERY_BATCH_S]),
)
@example(moment=0, after=False, eager=0, part_s=60.0)
@example(moment=3, after=True, eager=0, part_s=60.0)
@example(moment=3, after=True, eager=3, part_s=60.0)
def test_whenever_another_run_begins_the_superseded_one_commits_at_most_what_it_was_creating(
    moment, after, eager, part_s
):
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), PROMPTS, shard_size=SHARD_SIZE)
        zombie = Zombie(store, job, part_s, moment, after, eager)
        for _ in range(3):
            if not zombie.shard():
                break
        zombie.last_words()
        if zombie.other is None:
            zombie.other_begins()
        other = zombie.other
        assert len(zombie.late) <= 1, "one create may have been on its way"
        finished, drawn = sealed(store), len(other.drawn)
        while other.shard():
            pass
        other.last_words()
        assert not set(other.drawn[drawn:]) & finished, "what was finished is drawn again"
        assert zombie.worker.timeline.take() == ()
        commits = assert_all_is_well(store, job, zombie.counter.spent_mj, other.counter.spent_mj)
        assert sum(c.driver_epoch == 1 for c in commits) == zombie.outcomes.count("committed")


def start_zombie(store, epoch, place):
    process = subprocess.Popen(
        [sys.executable, "-m", "support.stopped_zombie", store.url, str(epoch), place],
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        stdout=subprocess.PIPE,
        text=True,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    return process


def wake(process):
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return json.loads(said)


def test_a_stopped_worker_that_wakes_before_anybody_has_redone_its_shard_does_not_commit(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=SHARD_SIZE)
    process = start_zombie(store, open_epoch(store, exclusive=True), "before-asking")
    other = Run(store, job, "other", 10.0)
    woken = wake(process)
    assert woken == {"outcome": "superseded", "spent_mj": 4 * IMAGE_MJ, "shard": 0}
    assert list(store.list(COMMITS_PREFIX)) == []
    assert sealed(store) == {row["prompt_id"] for row in table_of_part(store)}
    while other.shard():
        pass
    other.last_words()
    assert len(other.drawn) == len(PROMPTS) - SHARD_SIZE, (
        "the zombie's images are taken over, not drawn again"
    )
    commits = assert_all_is_well(store, job, woken["spent_mj"], other.counter.spent_mj)
    assert [c.driver_epoch for c in commits] == [2, 2, 2]
    (part,) = commits[0].parts
    assert part.startswith("e0001-")


def table_of_part(store):
    (item,) = store.list(PARTS_PREFIX)
    return table(store, Part.from_json(store.get(item.key)).rows_path)


class BeforeAsking:
    """A store whose user's first question whether there is a later run comes after `act`."""

    def __init__(self, store, act):
        self.store, self.acts = store, [act]

    def __getattr__(self, name):
        return getattr(self.store, name)

    def exists(self, key):
        while key == epoch_key(2) and self.acts:
            self.acts.pop()()
        return self.store.exists(key)


def test_one_that_asks_when_its_shard_is_redone_throws_its_own_away(tmp_path):
    store, job = plan(tmp_path, PROMPTS, shard_size=SHARD_SIZE)
    zombie, runs = Run(store, job, "zombie", 10.0), []

    def redo():
        runs.append(Run(store, job, "other", 10.0))
        while runs[0].shard():
            pass

    zombie.worker.finishing.store = BeforeAsking(store, redo)
    zombie.shard()
    assert zombie.outcomes == ["exists"]
    assert list(store.list(PARTS_PREFIX)) == []
    assert not [i.key for i in store.list("data/") if "-e0001-" in i.key]
    zombie.last_words()
    runs[0].last_words()
    assert_all_is_well(store, job, zombie.counter.spent_mj, runs[0].counter.spent_mj)


def test_one_that_was_stopped_between_asking_and_creating_may_commit_and_the_later_run_takes_it_as_it_is(
    tmp_path,
):
    store, job = plan(tmp_path, PROMPTS, shard_size=SHARD_SIZE)
    process = start_zombie(store, open_epoch(store, exclusive=True), "before-creating")
    other = Run(store, job, "other", 10.0)
    woken = wake(process)
    assert woken["outcome"] == "committed"
    while other.shard():
        pass
    other.last_words()
    assert other.outcomes == ["exists", "committed", "committed"]
    commits = assert_all_is_well(store, job, woken["spent_mj"], other.counter.spent_mj)
    assert [c.driver_epoch for c in commits] == [1, 2, 2]


class Fails:
    """A store that fails at the record of a part, before or after it stands."""

    def __init__(self, store, *, stands):
        self.store, self.stands = store, stands

    def __getattr__(self, name):
        return getattr(self.store, name)

    def put_exclusive(self, key, data):
        if self.stands or not key.startswith(PARTS_PREFIX):
            self.store.put_exclusive(key, data)
        if key.startswith(PARTS_PREFIX):
            raise StoreError("no answer")


@pytest.mark.parametrize("stands", [False, True])
def test_where_sealing_fails_the_energy_is_booked_all_the_same(tmp_path, stands):
    store, job = plan(tmp_path, PROMPTS, shard_size=SHARD_SIZE)
    zombie = Run(store, job, "zombie", 10.0)
    zombie.worker.finishing.store = Fails(store, stands=stands)
    other = Run(store, job, "other", 10.0)
    with pytest.raises(StoreError, match="no answer"):
        zombie.shard()
    zombie.last_words()
    while other.shard():
        pass
    other.last_words()
    assert len(other.drawn) == len(PROMPTS) - SHARD_SIZE * stands
    commits = assert_all_is_well(store, job, zombie.counter.spent_mj, other.counter.spent_mj)
    assert bool(commits[0].parts) == stands


def test_asking_is_one_request_of_one_object(tmp_path):
    store, _ = plan(tmp_path, PROMPTS)
    first = open_epoch(store, exclusive=True)
    asked = []

    class Counts:
        def exists(self, key):
            asked.append(key)
            return store.exists(key)

    assert not is_superseded(Counts(), first)
    second = open_epoch(store, exclusive=True)
    assert is_superseded(Counts(), first)
    assert not is_superseded(Counts(), second)
    assert asked == [epoch_key(2), epoch_key(2), epoch_key(3)]
