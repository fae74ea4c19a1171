"""The commit protocol as a property: crashes at any store operation, before or after it took effect, lose nothing."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.local_job import plan, runner, work

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import load_records
from millijoule.pipeline.output.commits import list_committed, read_commits
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.errors import StoreError


class Crash(BaseException):
    """The process is gone: nothing after this runs in it, not even its error handling."""


class CrashingStore:
    """A real store whose n-th writing operation is the last thing the process does."""

    WRITES = ("put", "put_file", "put_exclusive", "delete")

    def __init__(self, store, operation: int, *, takes_effect: bool, error: type[BaseException] = Crash):
        self._store = store
        self._left = operation
        self._takes_effect = takes_effect
        self._error = error

    def __getattr__(self, name):
        attribute = getattr(self._store, name)
        if name not in self.WRITES:
            return attribute

        def write(*arguments):
            self._left -= 1
            if self._left < 0:
                if self._takes_effect:
                    attribute(*arguments)
                raise self._error(f"{name} {arguments[0]}")
            return attribute(*arguments)

        return write


def attempt_everything(store, job, epoch: int, worker: str) -> None:
    """One worker that holds two leases at a time, until one of its attempts dies."""
    shards = load_job_shards(store, job)
    coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch)
    attempts = runner(store, job, epoch, worker=worker)
    lock, died = Lock(), Event()

    def call() -> None:
        while not died.is_set():
            with lock:
                lease = coordinator.next_lease(worker, 0.0)
            if lease is None:
                return
            try:
                attempts.run(lease)
            except BaseException:
                died.set()
                raise
            with lock:
                coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)

    with ThreadPoolExecutor(2) as callers:
        for done in [callers.submit(call) for _ in range(2)]:
            done.result()


lives = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.booleans(),
        st.sampled_from([Crash, lambda words: StoreError(words, transient=True)]),
        st.sampled_from(["parquet", "webdataset", "files"]),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.long
@given(lives)
@settings(max_examples=40, deadline=None)
def test_whatever_crashes_where_the_output_is_complete_and_sound(lives):
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), [f"p{i}" for i in range(9)], shard_size=4, output_format=lives[0][3])
        for n, (operation, takes_effect, error, _) in enumerate(lives):
            dying = CrashingStore(store, operation, takes_effect=takes_effect, error=error)
            try:
                attempt_everything(dying, job, open_epoch(store, exclusive=True), f"w{n}")
            except (Crash, StoreError):
                pass
        shards = work(store, job)
        assert list(check_output(store)) == []
        ledger = load_records(store, len(shards)).ledger
        winners = [e for e in ledger.entries if e.segment_class == "shard"]
        assert sorted(e.segment.shard_id for e in winners) == list(range(len(shards)))
        # nothing is carried twice
        segments = [s for c in read_commits(store, len(shards)) for s in c.segments]
        assert len(segments) == len({(s.worker_id, s.open.t_mono_ns, s.close.t_mono_ns) for s in segments})


@given(st.permutations(["w1", "w2", "w3"]))
@settings(max_examples=20, deadline=None)
def test_of_any_number_of_attempts_at_a_shard_exactly_one_stands(order):
    with tempfile.TemporaryDirectory() as folder:
        store, job = plan(Path(folder), ["a", "b", "c"])
        shards = load_job_shards(store, job)
        outcomes = []
        for worker in order:
            epoch = open_epoch(store, exclusive=True)
            lease = Coordinator(shards, np.zeros(1, bool), 60.0, epoch).next_lease(worker, 0.0)
            outcomes.append(runner(store, job, epoch, worker=worker).run(lease).outcome)
        assert outcomes == ["committed", "exists", "exists"]
        assert len({i.key for i in store.list("data/")}) == 1
