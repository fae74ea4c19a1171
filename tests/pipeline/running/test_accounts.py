"""Accounts that workers leave open, and the readers that close them; Ray, its clock and storage's thread are stood in for."""

import pytest
from support.ray_stand_in import Dies, RayStandIn
from support.stand_in_jobs import WriterAtOnce

from millijoule.jobs.simulating.clocked_ray import After, install
from millijoule.pipeline.running.accounts import CUT_OFF_TIMEOUT_S, Accounts
from millijoule.workers.layout import closing_key, worker_key
from millijoule.workers.lease import AccountRead
from millijoule.workers.schemas import CounterRead, WorkerClosing, WorkerEnvironment
from millijoule.workers.storage.open import open_store


def read(mj):
    return CounterRead("boot", mj, mj, 0, {"gpu:GPU-1": mj})


class World:
    """A cluster of readers that read 100 mJ after a second; the first `dying` of them die of their first call instead."""

    def __init__(self, monkeypatch, store):
        self.ray = RayStandIn(lambda node, *_: Reader(self, node))
        install(monkeypatch.setattr, self.ray, self.ray.time)
        self.store, self.writer = store, WriterAtOnce()
        self.node = self.ray.add_node("host-a")
        self.readers = []  # the host of each
        self.dying = 0
        self.still_runs = False
        self.accounts = Accounts(store, 1, self.writer, self.ray.actor_class, None)

    def opened(self, *worker_ids, host="host-a", first=None):
        for worker_id in worker_ids:
            environment = WorkerEnvironment(
                *(worker_id, 1, self.node.node_id, host, "GPU-1", ("GPU-1",)),
                *(None, None, "3", None, "nvml-counter", first or read(5)),
            )
            self.store.put(worker_key(worker_id), environment.to_json())

    def closing(self, worker_id):
        self.writer.close()
        return WorkerClosing.from_json(self.store.get(closing_key(worker_id)))


class Reader:
    def __init__(self, world, node):
        self.world = world
        world.readers.append(node.host)
        self.dies = len(world.readers) <= world.dying

    def read_for(self, worker):
        if self.dies:
            return Dies(1.0)
        if self.world.still_runs:
            return AccountRead(None, "its process still runs")
        return After(1.0, AccountRead(read(100)))


@pytest.fixture
def world(monkeypatch, tmp_path):
    return World(monkeypatch, open_store(str(tmp_path / "out")))


def test_an_account_without_last_words_is_closed_by_a_reader_on_the_same_node(world):
    world.opened("w0001-0001")
    world.accounts.gone("w0001-0001")
    world.accounts.close()
    assert world.closing("w0001-0001").read == read(100)
    assert world.readers == ["host-a"]
    assert world.ray.running == []


def test_a_reader_that_dies_with_several_accounts_costs_none_of_them(world):
    """What has to be tried again goes to one new reader, which the second failure must not take for the dead one."""
    world.dying = 1
    names = ["w0001-0001", "w0001-0002", "w0001-0003"]
    world.opened(*names)
    for name in names:
        world.accounts.gone(name)
    world.accounts.close()
    assert [world.closing(name).read for name in names] == [read(100)] * 3
    assert len(world.readers) == 2


def test_an_account_that_is_opened_with_the_last_breath_is_closed_too(world):
    """A worker that is killed while it starts goes on until the signal reaches it."""
    world.accounts.gone("w0001-0001")
    world.writer.settle()
    world.ray.at(0.5, lambda: world.opened("w0001-0001"))
    world.accounts.close()
    assert world.closing("w0001-0001").read == read(100)


def test_a_worker_that_never_opened_an_account_owes_none(world):
    world.accounts.gone("w0001-0001")
    world.accounts.close()
    world.writer.close()
    assert world.readers == []
    assert not world.store.exists(closing_key("w0001-0001"))


def test_a_lost_node_whose_host_comes_back_is_read_at_the_end(world):
    world.opened("w0001-0001")
    world.ray.lose_node(world.node)
    world.ray.add_node("host-c")
    world.accounts.gone("w0001-0001")
    world.writer.settle()
    assert world.readers == []
    world.ray.add_node("host-a")
    world.accounts.close()
    assert world.closing("w0001-0001").read == read(100)
    assert world.readers == ["host-a"]


def test_where_nobody_can_read_the_closing_says_why(world):
    world.opened("w0001-0001")
    world.ray.lose_node(world.node)
    world.accounts.gone("w0001-0001")
    world.accounts.close()
    end = world.closing("w0001-0001")
    assert end.read is None
    assert end.reason == "its node is gone"


def estimate(mj):
    """A read where no counter can be read."""
    return CounterRead("boot", mj, mj, 0, {}, mj)


def log_of_open_accounts(world, caplog):
    """What the next run of the job says of accounts that earlier ones left open."""
    caplog.clear()
    caplog.set_level("INFO")
    later = Accounts(world.store, 2, world.writer, world.ray.actor_class, None)
    later.look_for_open()
    later.close()
    return [r.getMessage() for r in caplog.records if "left open" in r.getMessage()]


def test_a_worker_without_counters_is_not_looked_for_again_by_every_later_run(world, caplog):
    world.opened("w0001-0001", first=estimate(3))
    assert log_of_open_accounts(world, caplog) == ["accounts of devices that earlier runs left open: 1"]
    assert log_of_open_accounts(world, caplog) == []
    assert world.readers == []
    assert world.closing("w0001-0001").read is None


def test_what_a_worker_without_counters_said_while_it_loaded_ends_its_account(world, caplog):
    world.opened("w0001-0001", "w0001-0002", first=estimate(3))
    world.accounts.loading("w0001-0001", estimate(9))
    world.accounts.loading("w0001-0002", None)  # it had not opened its meter yet
    for name in ("w0001-0001", "w0001-0002"):
        world.accounts.gone(name)
    world.accounts.close()
    end = world.closing("w0001-0001")
    assert (end.read, end.by) == (estimate(9), "w0001-0001")
    assert world.closing("w0001-0002").read is None
    assert log_of_open_accounts(world, caplog) == []


def test_what_a_worker_with_counters_said_while_it_loaded_is_no_end_of_its_account(world):
    """It went on until it was killed; a reader says what it used until then."""
    world.opened("w0001-0001")
    world.accounts.loading("w0001-0001", read(50))
    world.accounts.gone("w0001-0001")
    world.accounts.close()
    assert world.closing("w0001-0001").read == read(100)


def test_an_answer_of_storage_after_the_end_starts_no_reader(world):
    world.opened("w0001-0001")
    world.writer.storage_is_away = True
    world.accounts.gone("w0001-0001")
    world.accounts.close(cut_off=True)
    assert CUT_OFF_TIMEOUT_S <= world.ray.now < 2 * CUT_OFF_TIMEOUT_S
    world.writer.come_back()
    assert "storage" in world.closing("w0001-0001").reason
    assert world.readers == []


@pytest.mark.parametrize("there", [True, False])
def test_what_another_driver_has_read_stands(world, there):
    world.opened("w0002-0001")
    if not there:
        world.ray.lose_node(world.node)
    world.accounts.gone("w0002-0001")
    world.writer.settle()
    theirs = WorkerClosing("w0002-0001", 2, "w0002-0001", read(90))
    world.store.put(closing_key("w0002-0001"), theirs.to_json())
    world.accounts.close()
    assert world.closing("w0002-0001").read == read(90)


def test_a_process_that_ran_on_is_asked_for_once_more_at_the_end(world):
    world.opened("w0001-0001")
    world.still_runs = True
    world.accounts.gone("w0001-0001")
    world.writer.settle()
    world.accounts.tick()
    world.still_runs = False
    world.accounts.close()
    assert world.closing("w0001-0001").read == read(100)
