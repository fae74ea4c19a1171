"""One attempt: its commit, its losses, and requests that fail."""

import itertools
import json
import re
import tempfile
import time
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ledgers import commit
from support.local_job import plan, runner, work
from support.models import Plain

from millijoule.pipeline.output.commits import CommitCompactor, list_committed, parse_commit, read_commits
from millijoule.pipeline.output.image_rows import rows_table
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts import runner as runner_module
from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.isolate import FittedGenerator, batch_limits
from millijoule.workers.errors import NodeError, RowError, SickWorkerError, StoreError
from millijoule.workers.generators.protocol import GeneratedBatch
from millijoule.workers.layout import commit_key
from millijoule.workers.schemas import (
    IMAGE_ROW_SCHEMA,
    Commit,
    CounterRead,
    ImageRequest,
    ImageRow,
    Segment,
    carried_rows,
)


def leases(store, job):
    shards = load_job_shards(store, job)
    return Coordinator(shards, np.zeros(len(shards), bool), 60.0, open_epoch(store, exclusive=True))


def test_the_second_of_two_attempts_loses_cleans_up_and_books_its_energy_as_waste(tmp_path):
    store, job = plan(tmp_path, ["a", "b", "c"])
    first, second = (leases(store, job).next_lease(w, 0.0) for w in ("w1", "w2"))
    winner, loser = runner(store, job, 2, worker="w1"), runner(store, job, 2, worker="w2")
    assert winner.run(first).outcome == "committed"
    lost = loser.run(second)
    assert lost.outcome == "exists"
    assert parse_commit(store, 0, lost.commit_json).attempt_id == first.attempt_id
    assert not [i.key for i in store.list("data/") if second.attempt_id in i.key]
    assert [s.segment_class for s in loser.timeline.take()][-1] == "loser"


def test_segments_ride_with_the_next_commit_and_join_without_a_gap(tmp_path):
    store, job = plan(tmp_path, [f"p{i}" for i in range(24)])
    shards = work(store, job)
    segments = [s for c in read_commits(store, len(shards)) for s in c.segments]
    assert [s.segment_class for s in segments].count("shard") == 3
    assert all(a.close == b.open for a, b in itertools.pairwise(segments))


def test_a_commit_survives_its_json(tmp_path):
    store, job = plan(tmp_path, ["a"])
    work(store, job)
    body = store.get(commit_key(0))
    assert Commit.from_json(body).to_json() == body
    with pytest.raises(StoreError, match=r"00000000\.json: not a commit"):
        parse_commit(store, 0, b'{"shard_id": 0}')


def test_the_compacted_ledger_is_only_a_cache(tmp_path):
    store, job = plan(tmp_path, [f"p{i}" for i in range(24)])
    shards = work(store, job)
    true = list(read_commits(store, len(shards)))  # no part is compacted yet
    compactor = CommitCompactor(store, 1)
    compactor.add(1, store.get(commit_key(1)))
    compactor.flush()
    assert list(read_commits(store, len(shards))) == true
    store.delete([commit_key(1)])
    assert [c.shard_id for c in read_commits(store, len(shards))] == [0, 2]
    assert list_committed(store, len(shards)).tolist() == [True, False, True]


def watched(attempt, monkeypatch):
    """All attempts that `attempt`, a runner, ever has at work, as they come."""
    made = []

    class Watched(Attempt):
        def __init__(self, lease):
            super().__init__(lease)
            made.append(self)

    monkeypatch.setattr(runner_module, "Attempt", Watched)
    return made


class Stepping(Plain):
    """Says after each of three steps of a batch that it got on, as a model with many steps does."""

    def __init__(self):
        super().__init__("cpu")
        self.on_step = lambda: None

    def generate(self, requests):
        for _ in range(3):
            self.on_step()
        return super().generate(requests)


def test_every_step_forward_is_reported_and_nothing_else(tmp_path, monkeypatch):
    store, job = plan(tmp_path, [f"p{i}" for i in range(8)])
    attempt = runner(store, job, 1, Stepping())
    made = watched(attempt, monkeypatch)
    result = attempt.run(leases(store, job).next_lease("w1", 0.0))
    commit = parse_commit(store, 0, result.commit_json)
    batches = 8 // attempt.drawing.generator.info.batch_size
    rows_read = 1
    parts = batches  # of images this small, a batch is a part
    assert made[0].steps == rows_read + batches * (3 + 1) + parts + len(commit.files)


def test_a_generator_that_stands_still_reports_nothing(tmp_path):
    store, job = plan(tmp_path, ["a"])
    during = []

    class Stuck(Stepping):
        def generate(self, requests):
            for _ in range(2):
                during.append(attempt.progress[0].steps)
                time.sleep(0.05)
            return Plain.generate(self, requests)

    attempt = runner(store, job, 1, Stuck())
    attempt.run(leases(store, job).next_lease("w1", 0.0))
    assert during[0] == during[1]


class Picky(Plain):
    def __init__(self, bad):
        super().__init__("cpu")
        self.bad = bad

    def generate(self, requests):
        if any(r.prompt in self.bad for r in requests):
            raise ValueError("no")
        return super().generate(requests)


def requests(n):
    return [ImageRequest(f"p{i}", 0, str(i), seed=i) for i in range(n)]


@pytest.mark.parametrize("bad", [set(), {"3"}, {"0", "15"}, {str(i) for i in range(16)}])
def test_failing_requests_are_isolated_and_the_order_kept(bad):
    fitted = FittedGenerator(generator := Picky(bad), BatchSizer(batch_limits(generator, 16)))
    parts = list(fitted.isolate(requests(16), lambda: None))
    assert [r.prompt for part, _ in parts for r in part] == [str(i) for i in range(16)]
    assert {p[0].prompt for p, outcome in parts if isinstance(outcome, Exception)} == bad


def test_a_device_that_no_longer_works_blames_no_prompt(tmp_path):
    """After a sticky device error every request fails: the worker must die instead of emptying its shard."""
    store, job = plan(tmp_path, ["a", "b"])
    generator = Picky(set())
    attempt = runner(store, job, 1, generator)
    attempt.warm_up(ImageRequest("warm-up", 0, "fine", seed=0))
    generator.bad = {"fine", "a", "b"}
    with pytest.raises(SickWorkerError):
        attempt.run(leases(store, job).next_lease("w1", 0.0))
    assert not store.exists(commit_key(0))


@pytest.mark.parametrize("output_format", ["parquet", "webdataset", "files"])
def test_a_small_shards_commit_carries_the_rows_of_its_row_table(tmp_path, output_format):
    prompts = [f"p{i} \u2603" for i in range(16 + 16 + 3)]
    store, job = plan(tmp_path, prompts, shard_size=16, output_format=output_format)
    shards = work(store, job)
    for c in read_commits(store, len(shards)):
        with store.open_input(c.rows_path) as file:
            table = pq.read_table(file, columns=IMAGE_ROW_SCHEMA.names).to_pylist()
        assert [dict(zip(IMAGE_ROW_SCHEMA.names, row, strict=True)) for row in c.rows] == table


@pytest.mark.parametrize("prompts", [["p"] * 17, ["p" * 9000]], ids=["many", "long"])
def test_rows_that_are_many_or_long_stay_out_of_the_commit(tmp_path, prompts):
    store, job = plan(tmp_path, prompts, shard_size=64)
    shards = work(store, job)
    (c,) = read_commits(store, len(shards))
    assert c.rows is None
    assert json.loads(store.get(commit_key(0)))["rows"] is None


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
INT32 = st.integers(0, 2**31 - 1)
REQUESTS = st.builds(
    ImageRequest,
    prompt_id=TEXT,
    image_index=INT32,
    prompt=TEXT,
    seed=st.integers(0, 2**64 - 1),
    negative_prompt=st.none() | TEXT,
    guidance_scale=st.none() | st.floats(-1000, 1000),  # a plan has no others
    extra=st.none() | TEXT,
)
ROWS = st.builds(
    ImageRow,
    request=REQUESTS,
    status=st.sampled_from(["ok", "quarantined"]),
    width=st.none() | INT32,
    height=st.none() | INT32,
    num_inference_steps=st.none() | INT32,
    size_bytes=st.none() | st.integers(0, 2**63 - 1),
    path=st.none() | TEXT,
    error=st.none() | TEXT,
    warnings=st.lists(TEXT, max_size=2).map(tuple),
)


@pytest.mark.long
@settings(deadline=None)
@given(st.lists(ROWS, max_size=16))
def test_carried_rows_survive_their_json_and_are_the_row_tables(rows):
    true = pa.Table.from_pylist([row.as_record() for row in rows], schema=IMAGE_ROW_SCHEMA)
    body = replace(commit(1, "a", 1), rows=carried_rows(rows)).to_json()
    read = Commit.from_json(body)
    assert read.to_json() == body
    assert rows_table(read.rows).equals(true)
    bare = replace(read, rows=None).to_json()
    assert Commit.from_json(bare).rows is None


def test_a_commit_of_an_older_version_is_read_as_it_was_meant():
    """Written by `json` from `asdict`, without the fields that came later, and with one that no version knows."""
    first = CounterRead("boot", 10, 20, 1, {"gpu:GPU-1": 5}, 7)
    reads = (first, replace(first, t_mono_ns=11, energy_mj={"gpu:GPU-1": 9}))
    chain = (Segment("w1", "idle", *reads), Segment("w1", "shard", reads[1], reads[1], 1, "a"))
    meant = replace(commit(1, "a", 1), segments=chain)
    raw = json.loads(json.dumps(asdict(meant), sort_keys=True))
    for segment in raw["segments"]:
        for end in ("open", "close"):
            del segment[end]["wrap_epoch"]
    del raw["rows"], raw["power"]
    read = Commit.from_json(json.dumps(raw | {"later": 1}).encode())
    assert read == meant
    assert read.segments[1].open is read.segments[0].close  # a ledger holds many


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.long
@settings(deadline=None, max_examples=300)
@given(ROWS, st.integers(0, len(IMAGE_ROW_SCHEMA) - 1), JSON)
def test_whatever_stands_in_a_carried_row_is_either_refused_or_fits_the_table(row, at, value):
    raw = json.loads(replace(commit(1, "a", 1), rows=carried_rows([row])).to_json())
    raw["rows"][0][at] = value
    try:
        read = Commit.from_json(json.dumps(raw).encode())
    except (ValueError, TypeError):
        return
    assert rows_table(read.rows)[at].type == IMAGE_ROW_SCHEMA[at].type
    assert IMAGE_ROW_SCHEMA[at].nullable or value is not None


@pytest.mark.parametrize("rows", [5, "x", {}, [None], [{}], ["x" * 16]])
def test_rows_that_are_no_rows_are_refused(rows):
    raw = json.loads(commit(1, "a", 1).to_json())
    with pytest.raises(ValueError):
        Commit.from_json(json.dumps(raw | {"rows": rows}).encode())


class Returning(Plain):
    """Returns what it is told to for a request whose prompt is "odd", alone or among others."""

    def __init__(self, answer):
        super().__init__("cpu")
        self.answer = answer

    def generate(self, requests):
        out = super().generate(requests)
        return self.answer(out) if any(r.prompt == "odd" for r in requests) else out


def _interrupted(out):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda out: None, "returned NoneType, not a GeneratedBatch"),
        (lambda out: GeneratedBatch(out.images.tolist()), "not a GeneratedBatch of an array"),
        (lambda out: GeneratedBatch(out.images * np.float32("nan")), "images as float32, not as uint8"),
        (lambda out: GeneratedBatch(out.images[..., 0]), r"images of shape \(1, 8, 8\)"),
        (lambda out: GeneratedBatch(out.images[:0]), "0 images for 1 requests"),
        (lambda out: GeneratedBatch(out.images[:, :4]), "images of 8x4 pixels where 8x8 were asked for"),
        (lambda out: GeneratedBatch(out.images, ((),) * 5), "warnings for 5 images of 1"),
        (_interrupted, "RuntimeError: KeyboardInterrupt"),
    ],
)
def test_what_is_not_an_image_per_request_is_suspected_like_an_exception_and_the_reason_kept(
    tmp_path, answer, reason
):
    store, job = plan(tmp_path, ["a", "odd", "b", "c"])
    result = runner(store, job, 1, Returning(answer)).run(leases(store, job).next_lease("w1", 0.0))
    assert (result.outcome, result.healthy) == ("suspect", (0, 0))
    (suspect,) = result.suspects
    assert (suspect.row, suspect.image_index) == (1, 0)
    assert re.search(reason, suspect.reason)
    assert not store.exists(commit_key(0))
    commit = parse_commit(store, 0, result.commit_json)
    assert (commit.images_ok, commit.images_quarantined) == (3, 1)


def test_a_request_the_model_draws_nowhere_is_quarantined_without_a_second_opinion(tmp_path):
    def refuse(out):
        raise RowError("no such class")

    store, job = plan(tmp_path, ["a", "odd"])
    result = runner(store, job, 1, Returning(refuse)).run(leases(store, job).next_lease("w1", 0.0))
    assert result.outcome == "committed"
    assert parse_commit(store, 0, result.commit_json).errors == {"RowError: no such class": 1}


def test_no_scratch_space_is_the_node_s_fault(tmp_path, monkeypatch):
    store, job = plan(tmp_path, ["a"])
    attempt = runner(store, job, 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(NodeError, match=r"scratch folder .*gone.*; free space there, or set TMPDIR"):
        attempt.run(leases(store, job).next_lease("w1", 0.0))


def test_a_cancelled_attempt_ends_between_two_steps_of_a_batch(tmp_path):
    store, job = plan(tmp_path, ["a", "b"])
    lease = leases(store, job).next_lease("w1", 0.0)
    attempt = runner(store, job, 1, Stepping())
    go_on, steps = attempt.generator.on_step, 0

    def step():
        nonlocal steps
        steps += 1
        if steps == 2:
            attempt.cancel(lease.attempt_id)
        go_on()

    attempt.generator.on_step = step
    assert attempt.run(lease).outcome == "cancelled"
    assert steps == 2
    assert [s.segment_class for s in attempt.timeline.take()] == ["idle", "loser"]
