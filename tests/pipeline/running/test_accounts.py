"""Accounts that workers leave open, and the readers that close them; Ray's part is played by `Readers`."""

import json
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError

from millijoule.pipeline.running import accounts as accounts_module
from millijoule.pipeline.running.accounts import Accounts
from millijoule.pipeline.running.record_writer import RecordWriter
from millijoule.workers.layout import closing_key, worker_key
from millijoule.workers.lease import AccountRead
from millijoule.workers.schemas import CounterRead, WorkerClosing, WorkerEnvironment
from millijoule.workers.storage.open import open_store


def read(mj):
    return CounterRead("boot", mj, mj, 0, {"gpu:GPU-1": mj})


def environment(worker_id, node="node-a", host="host-a"):
    return WorkerEnvironment(
        *(worker_id, 1, node, host, "GPU-1", ("GPU-1",), None, None, "3", None, "nvml-counter", read(5))
    )


class Readers:
    """Nodes, and actors on them that answer `read_for` at once with 100 mJ; those in `dying` die of their first call."""

    def __init__(self):
        self.alive = {"node-a": "host-a"}
        self.dying = 0
        self.still_runs = False
        self.started = []  # node id of each
        self.killed = set()
        self.dead = set()
        self.calls = {}

    def nodes(self):
        return [{"NodeID": n, "NodeManagerHostname": h, "Alive": True} for n, h in self.alive.items()]

    def options(self, *, scheduling_strategy, **_):
        def remote(*_):
            number = len(self.started)
            self.started.append(scheduling_strategy.node_id)
            if number < self.dying:
                self.dead.add(number)
            return SimpleNamespace(
                number=number, read_for=SimpleNamespace(remote=lambda worker: self.call(number, worker))
            )

        return SimpleNamespace(remote=remote)

    def call(self, number, worker):
        call = f"call-{len(self.calls)}"
        self.calls[call] = number, worker
        return call

    def wait(self, calls, *, num_returns, timeout):
        return list(calls), []

    def get(self, call):
        number, worker = self.calls[call]
        if number in self.dead or number in self.killed:
            raise RayActorError(error_msg=f"reader {number} is dead")
        if self.still_runs:
            return AccountRead(worker.worker_id, None, "its process still runs")
        return AccountRead(worker.worker_id, read(100))

    def kill(self, reader):
        self.killed.add(reader.number)


@pytest.fixture
def readers(monkeypatch):
    readers = Readers()
    monkeypatch.setattr(accounts_module, "ray", readers)
    monkeypatch.setattr(
        accounts_module,
        "NodeAffinitySchedulingStrategy",
        lambda node_id, soft: SimpleNamespace(node_id=node_id),
    )
    monkeypatch.setattr(accounts_module, "LAST_BREATH_S", 0.5)
    return readers


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def writer():
    writer = RecordWriter()
    yield writer
    writer.close()


@pytest.fixture
def accounts(store, writer, readers):
    return Accounts(store, 1, writer, readers, None)


def opened(store, *worker_ids):
    for worker_id in worker_ids:
        store.put(worker_key(worker_id), environment(worker_id).to_json())


def closing(store, writer, worker_id):
    writer.close()
    return WorkerClosing.from_json(store.get(closing_key(worker_id)))


def settle(writer):
    """Until the works so far are done and their results were taken."""
    while not writer.idle:
        writer.settle()
        time.sleep(0.01)


def test_an_account_without_last_words_is_closed_by_a_reader_on_the_same_node(
    store, writer, accounts, readers
):
    opened(store, "w0001-0001")
    accounts.gone("w0001-0001")
    accounts.close()
    assert closing(store, writer, "w0001-0001").read == read(100)
    assert readers.started == ["node-a"]
    assert readers.killed == {0}


def test_a_reader_that_dies_with_several_accounts_costs_none_of_them(store, writer, accounts, readers):
    """What has to be tried again goes to one new reader, which the second failure must not take for the dead one."""
    readers.dying = 1
    names = ["w0001-0001", "w0001-0002", "w0001-0003"]
    opened(store, *names)
    for name in names:
        accounts.gone(name)
    settle(writer)
    accounts.close()
    assert [closing(store, writer, name).read for name in names] == [read(100)] * 3
    assert len(readers.started) == 2


def test_an_account_that_is_opened_with_the_last_breath_is_closed_too(store, writer, accounts, readers):
    """A worker that is killed while it starts goes on until the signal reaches it."""
    accounts.gone("w0001-0001")
    settle(writer)
    opened(store, "w0001-0001")
    accounts.close()
    assert closing(store, writer, "w0001-0001").read == read(100)


def test_a_worker_that_never_opened_an_account_owes_none(store, writer, accounts, readers):
    accounts.gone("w0001-0001")
    accounts.close()
    writer.close()
    assert readers.started == []
    assert not store.exists(closing_key("w0001-0001"))


def test_a_lost_node_whose_host_comes_back_is_read_at_the_end(store, writer, accounts, readers):
    opened(store, "w0001-0001")
    readers.alive = {"node-c": "host-c"}
    accounts.gone("w0001-0001")
    settle(writer)
    assert readers.started == []
    readers.alive["node-b"] = "host-a"
    accounts.close()
    assert closing(store, writer, "w0001-0001").read == read(100)
    assert readers.started == ["node-b"]


def test_where_nobody_can_read_the_closing_says_why(store, writer, accounts, readers):
    opened(store, "w0001-0001")
    readers.alive = {}
    accounts.gone("w0001-0001")
    accounts.close()
    end = closing(store, writer, "w0001-0001")
    assert end.read is None
    assert end.reason == "its node is gone"


def test_an_answer_of_storage_after_the_end_starts_no_reader(store, writer, accounts, readers, monkeypatch):
    monkeypatch.setattr(accounts_module, "CUT_OFF_TIMEOUT_S", 0.2)
    opened(store, "w0001-0001")
    slow_get = store.get

    def get(key):
        time.sleep(1.0)
        return slow_get(key)

    store.get = get
    accounts.gone("w0001-0001")
    accounts.close(cut_off=True)
    writer.close()
    end = json.loads(slow_get(closing_key("w0001-0001")))
    assert "storage" in end["reason"]
    assert readers.started == []


@pytest.mark.parametrize("alive", [{}, {"node-a": "host-a"}])
def test_what_another_driver_has_read_stands(store, writer, accounts, readers, alive):
    opened(store, "w0002-0001")
    readers.alive = alive
    accounts.gone("w0002-0001", of_this_run=False)
    settle(writer)
    store.put(closing_key("w0002-0001"), WorkerClosing("w0002-0001", 2, "w0002-0001", read(90)).to_json())
    accounts.close()
    assert closing(store, writer, "w0002-0001").read == read(90)


def test_a_process_that_ran_on_is_asked_for_once_more_at_the_end(store, writer, accounts, readers):
    opened(store, "w0001-0001")
    readers.still_runs = True
    accounts.gone("w0001-0001")
    settle(writer)
    accounts.tick()
    readers.still_runs = False
    accounts.close()
    assert closing(store, writer, "w0001-0001").read == read(100)
