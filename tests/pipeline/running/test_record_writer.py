"""The thread that talks to storage: order, repetition, and what it says when storage does not come back."""

import threading

import pytest

from millijoule.pipeline.running import record_writer
from millijoule.pipeline.running.record_writer import QueuedWrites, RecordWriter
from millijoule.workers.errors import DamagedError, StoreError
from millijoule.workers.storage.open import open_store


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(record_writer, "BACKOFF_FIRST_S", 0.001)


@pytest.fixture
def writer():
    made = RecordWriter()
    yield made
    try:
        made.close(0.0)
    except StoreError:
        pass


def settled(writer):
    """Wait until all works are done and their results taken."""
    while not writer.idle:
        writer.settle()


class Failing:
    """A work that fails with `errors` one after another, and then is done; `failed` is set at the first."""

    def __init__(self, *errors):
        self.errors, self.failed = list(errors), threading.Event()

    def __call__(self):
        if self.errors:
            self.failed.set()
            raise self.errors.pop(0)
        return "done"


class Refusing(Failing):
    """A work that fails for ever."""

    def __call__(self):
        self.failed.set()
        raise self.errors[0]


AWAY = StoreError("503", transient=True)
REFUSED = StoreError("disk full")


def test_works_are_done_in_order_by_another_thread_and_taken_by_the_callers(writer):
    done, taken = [], []
    for n in range(20):
        writer.submit(
            "counting",
            lambda n=n: (done.append((n, threading.get_ident())), n)[1],
            lambda result: taken.append((result, threading.get_ident())),
        )
    settled(writer)
    assert [n for n, _ in done] == [n for n, _ in taken] == list(range(20))
    assert len({thread for _, thread in done}) == 1
    assert {thread for _, thread in taken} == {threading.get_ident()} != {done[0][1]}


def test_what_fails_in_passing_is_repeated_and_said_once(writer, caplog):
    taken = []
    work = Failing(AWAY, AWAY, REFUSED, AWAY)
    writer.submit("writing a", work, taken.append)
    assert work.failed.wait(60)
    settled(writer)
    assert taken == ["done"]
    assert caplog.text.count("waiting for storage (writing a): 503") == 1
    assert not writer.waits_for_storage


def test_storage_that_refuses_for_long_is_an_error_of_the_run(writer, monkeypatch):
    work = Refusing(REFUSED)
    writer.submit("writing a", work)
    assert work.failed.wait(60)
    writer.settle()  # it may be mended soon
    while not writer.waits_for_storage:
        pass
    monkeypatch.setattr(record_writer, "REFUSED_FOR_S", -1.0)
    with pytest.raises(StoreError, match="disk full"):
        writer.settle()


def test_a_damaged_object_is_an_error_at_once(writer):
    writer.submit("reading a", Failing(DamagedError("commit 3 is not what was written")))
    with pytest.raises(DamagedError, match="commit 3"):
        settled(writer)


def test_an_end_without_storage_says_how_much_is_lost(writer):
    work = Refusing(REFUSED)
    writer.submit("writing a", work)
    writer.submit("writing b", lambda: None)
    assert work.failed.wait(60)
    with pytest.raises(StoreError, match="2 records of this run could not be written: disk full"):
        writer.close()


def test_an_end_that_may_not_wait_gives_up_on_storage_that_is_away(writer):
    work = Refusing(AWAY)
    writer.submit("writing a", work)
    assert work.failed.wait(60)
    with pytest.raises(StoreError, match="1 records of this run could not be written: 503"):
        writer.close(0.0)


def test_an_end_waits_for_storage_that_comes_back(writer):
    taken = []
    writer.submit("writing a", Failing(*[AWAY] * 5), taken.append)
    writer.close()
    assert taken == ["done"]


def test_room_ends_where_many_works_wait_and_comes_back(writer):
    go = threading.Event()
    for _ in range(record_writer.MAX_WAITING):
        assert writer.has_room
        writer.submit("waiting", go.wait)
    assert not writer.has_room
    go.set()
    settled(writer)
    assert writer.has_room


def test_queued_writes_are_in_storage_at_the_end(writer, tmp_path):
    store = open_store(str(tmp_path / "out"))
    QueuedWrites(store, writer).put("a", b"bytes")
    writer.close()
    assert store.get("a") == b"bytes"
