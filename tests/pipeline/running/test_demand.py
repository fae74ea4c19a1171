"""How many workers are asked for, and which requests are taken back."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.running.demand import (
    FIRST_WORKERS,
    LEAST_START_S,
    NODE_ANSWER_S,
    Demand,
    PoolOptions,
)


@dataclass
class Worker:
    worker_id: str
    spawned: float = 0.0
    ready: object = None
    stopping: bool = False
    node: object = None


@dataclass
class Work:
    """A coordinator's face: shards committed, at work and left."""

    remaining: int
    active: tuple[int, ...] = ()
    n_committed: int = 0

    @property
    def useful_workers(self) -> int:
        return self.remaining

    @property
    def at_work(self) -> int:
        return len(self.active)


def waiting(n: int) -> list[Worker]:
    return [Worker(f"w{i}") for i in range(n)]


def ids(workers: list[Worker]) -> list[str]:
    return [w.worker_id for w in workers]


def options(most: int = 1000, *, least: int = 0, at_once: int | None = 0) -> PoolOptions:
    return PoolOptions(least, most, at_once=at_once)


def wanted(opts: PoolOptions, work: Work) -> int:
    d = Demand(opts)
    d.look(work, [], 0.0)
    return d.wanted()


def test_until_a_shard_is_known_few_nodes_are_asked_for_and_those_that_are_there_all_at_once():
    assert wanted(options(), Work(1000)) == FIRST_WORKERS
    assert wanted(options(at_once=64), Work(1000)) == 64
    assert wanted(options(at_once=None), Work(1000)) == 1000
    assert wanted(options(at_once=64), Work(3)) == 3
    assert wanted(options(), Work(2)) == 2
    assert wanted(options(), Work(0)) == 0
    assert wanted(options(3, least=2), Work(0)) == 2


def test_long_shards_are_seen_to_be_long_before_the_first_has_ended():
    d = Demand(options(64))
    asked = []
    for second in range(0, 30, 5):
        d.look(Work(1000, active=(0, 1)), [], float(second))
        asked.append(d.wanted())
    assert asked[0] == FIRST_WORKERS
    assert asked == sorted(asked)
    assert asked[-1] == 64


def test_short_shards_ask_for_as_many_workers_as_have_work_for_the_time_one_takes_to_start():
    d = Demand(options())
    d.look(Work(200, active=(0,)), [Worker("a", spawned=-50.0, ready="yes")], 0.0)  # took 50 s to start
    d.look(Work(199, active=(0,), n_committed=1), [], 6.0)  # 6 s, two shards: 3 s each
    assert d.wanted() == 12  # 199 * 3 s / 50 s
    d.look(Work(10, active=(0,), n_committed=190), [], 570.0)
    assert d.wanted() == 1
    d.look(Work(0, n_committed=200), [], 600.0)
    assert d.wanted() == 0


def test_how_long_the_first_waited_on_a_full_cluster_does_not_stop_the_next():
    d = Demand(options())
    d.look(Work(100, active=(0,)), [Worker("a", spawned=-36_000.0, ready="yes")], 0.0)
    d.look(Work(99, active=(0,), n_committed=1), [], 1200.0)
    assert d.wanted() == 99  # of ten minutes each


@given(
    st.integers(0, 5),
    st.integers(5, 50),
    st.none() | st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.floats(0, 900)), max_size=12),
)
def test_never_more_than_there_are_shards_nor_less_than_the_least(least, most, at_once, steps):
    d = Demand(options(most, least=least, at_once=at_once))
    now, done = 0.0, 0
    for committed, active, seconds in steps:
        now, done = now + seconds, min(200, done + committed)
        d.look(Work(200 - done, tuple(range(active)), done), [], now)
        for n in (d.wanted(), d.wanted(2)):
            assert least <= n <= max(least, min(most, 200 - done))
        assert d.wanted() <= d.wanted(2)
        assert done == 200 or d.wanted() >= 1


def test_the_newest_requests_are_taken_back_first_and_only_what_is_too_much():
    workers = waiting(60)
    d = Demand(options(60, at_once=None))
    d.look(Work(3), workers, 0.0)
    assert d.withdrawable(workers, 0.0, draining=False) == []  # they may be starting
    back = d.withdrawable(workers, NODE_ANSWER_S, draining=False)
    assert ids(back) == [f"w{i}" for i in range(59, 2, -1)]


def test_a_worker_that_has_a_node_is_paid_for():
    workers = waiting(10)
    for w in workers[4:]:
        w.node = "there"
    workers[0].ready, workers[1].stopping = "yes", True
    d = Demand(options(10, at_once=None))
    d.look(Work(1), workers, 0.0)
    d.withdrawable(workers, 0.0, draining=False)
    assert ids(d.withdrawable(workers, 5.0, draining=False)) == ["w3", "w2"]


def test_a_draining_job_waits_for_no_node():
    workers = waiting(4)
    workers[0].node = "there"
    d = Demand(options(4, least=4, at_once=None))
    d.look(Work(100), workers, 0.0)
    d.withdrawable(workers, 0.0, draining=True)
    assert ids(d.withdrawable(workers, 5.0, draining=True)) == ["w3", "w2", "w1"]
    assert d.withdrawable(workers, 5.0, draining=False) == []


def test_what_was_asked_for_is_not_taken_back_for_a_little_less_work():
    d = Demand(options())
    ready = [Worker("a", spawned=-LEAST_START_S, ready="yes")]
    workers = ready + waiting(5)
    d.look(Work(12, active=(0,)), workers, 0.0)
    d.look(Work(11, active=(0,), n_committed=1), workers, 6.0)  # 3 s each: 33 s of work
    assert d.wanted() == 4
    d.withdrawable(workers, 6.0, draining=False)
    assert d.withdrawable(workers, 9.0, draining=False) == []
    d.look(Work(6, active=(0,), n_committed=6), workers, 20.0)  # 17 s of work
    assert d.wanted() == 2
    d.withdrawable(workers, 20.0, draining=False)
    assert len(d.withdrawable(workers, 23.0, draining=False)) == 2
