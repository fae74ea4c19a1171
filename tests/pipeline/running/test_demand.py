"""How many workers are asked for, and which requests are taken back."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st
from support.single_nodes import OneNode, alone, can_stand, clusters

from millijoule.pipeline.fleet.room import NodeNow, Nodes
from millijoule.pipeline.running.demand import NODE_ANSWER_S, Demand, PoolOptions

IMAGES = 10  # of a shard


@dataclass
class Worker:
    worker_id: str
    spawned: float = 0.0
    ready: object = None
    stopping: bool = False
    node: object = None
    placed: float | None = None
    held: object = None
    pool: str = ""


def at_work(worker_id, pool="", start_s=30.0):
    return Worker(worker_id, -start_s, "yes", False, "there", 0.0, "a shard", pool)


@dataclass
class Work:
    """A coordinator's face: shards left, `begun` by a worker (id, seconds ago, images done and when) and `made` since the last look."""

    remaining: int
    begun: tuple[tuple[str, float, int, float], ...] = ()
    made: deque = field(default_factory=deque)
    n_ahead: int = 0
    images_per_shard: float = IMAGES

    @property
    def useful_workers(self) -> int:
        return self.remaining

    @property
    def unleased(self) -> int:
        return self.remaining - len(self.begun)

    @property
    def active(self):
        def entry(worker_id, began, done, at):
            lease = SimpleNamespace(
                worker_id=worker_id, writes=True, resumes=False, shard=SimpleNamespace(n_images=IMAGES)
            )
            return SimpleNamespace(
                lease=lease, is_ahead=False, started=began, images_done=done, images_step=done, images_at=at
            )

        return {i: entry(*begun) for i, begun in enumerate(self.begun)}


def waiting(n: int) -> list[Worker]:
    return [Worker(f"w{i}") for i in range(n)]


def ids(workers: list[Worker]) -> list[str]:
    return [w.worker_id for w in workers]


def options(most: int = 1000, *, least: int = 0, at_once: int | None = 0) -> PoolOptions:
    return PoolOptions(least, most, at_once=at_once)


def demand(*pools: PoolOptions, **stated: float) -> Demand:
    names = [""] if len(pools) == 1 else "abc"
    return Demand(dict(zip(names, pools, strict=False)), stated)


def wanted(opts: PoolOptions, work: Work) -> int:
    d = demand(opts)
    d.look(work, [], 0.0)
    return d.wanted()


def test_until_a_shard_is_known_one_node_is_asked_for_and_those_that_are_there_all_at_once():
    assert wanted(options(), Work(1000)) == 1
    assert wanted(options(at_once=64), Work(1000)) == 64
    assert wanted(options(at_once=None), Work(1000)) == 1000
    assert wanted(options(at_once=64), Work(3)) == 3
    assert wanted(options(), Work(0)) == 0
    assert wanted(options(3, least=2), Work(0)) == 2


def test_a_job_that_is_large_at_any_speed_asks_for_several_at_once():
    """A million images of the fastest workers there are take each of three of them longer than a start, assumed to take 30 s."""
    assert wanted(options(), Work(100_000)) == 1_000_000 // (10_000 * 30)


def test_the_first_images_tell_how_much_work_there_is():
    """Five of the first shard's ten images took five seconds: 98 shards of 5 to 10 s each are worth more than one node."""
    d, first = demand(options()), at_work("a")
    d.look(Work(100, begun=(("a", 0.0, 0, 0.0),)), [first], 0.2)
    assert d.wanted() < 20
    d.look(Work(100, begun=(("a", 0.0, 5, 5.0),)), [first], 5.2)
    # the next five images may come at once, so a shard takes 5 s or more; 99 of them, less what the first begins in the meantime
    at_least = 99 * 5 - 30 - 30
    assert at_least / 30 <= d.wanted() <= 1 + 99 * 5 / 30


def test_long_shards_are_seen_to_be_long_before_the_first_has_ended():
    d, asked = demand(options(64)), []
    for second in range(0, 40, 5):
        d.look(Work(1000, begun=(("a", 0.0, 0, 0.0),)), [at_work("a")], float(second))
        asked.append(d.wanted())
    assert asked[0] == 1
    assert asked == sorted(asked)
    assert asked[-1] == 64


def test_every_shard_that_nobody_has_is_worth_a_worker_where_shards_take_longer_than_starts():
    d = demand(options())
    d.look(Work(3, begun=(("a", 0.0, 1, 10.0),)), [at_work("a")], 10.0)  # 50 s or more each; starts take 30 s
    assert d.wanted() == 3


def test_workers_that_start_count_as_if_they_had_their_work():
    d = demand(options())
    there = [Worker(f"w{i}", spawned=-20.0, node="there", placed=-1.0) for i in range(5)]
    d.look(Work(7, begun=(("a", 0.0, 1, 10.0),)), [at_work("a"), *there], 10.0)
    assert d.wanted() == 7  # the sixth shard that waits is the next one's


def test_how_long_the_first_waited_on_a_full_cluster_does_not_stop_the_next():
    d = demand(options())
    d.look(Work(100, begun=(("a", 0.0, 5, 600.0),)), [at_work("a", start_s=36_000.0)], 600.0)
    assert d.wanted() > 90  # of ten minutes or more each


def test_what_is_stated_is_known_before_anything_is_made():
    d = demand(options(), options(), a=1.0)
    d.look(Work(30), [], 0.0)  # 300 s of work at a start of 30 s
    assert (d.wanted("a"), d.wanted("b")) == (10, 0)


def test_pools_of_which_nothing_is_known_share_what_one_alone_would_get():
    """One worker of the first is asked for; when its rate shows, half of what is worth a node goes to the others, two each."""
    d = demand(*[options(50, at_once=0)] * 3)
    d.look(Work(1000), [], 0.0, order=lambda: ["b", "a", "c"])
    assert [d.wanted(name) for name in "abc"] == [0, 1, 0]
    work = Work(1000, begun=(("x", 0.0, 5, 10.0),))
    d.look(work, [at_work("x", "b")], 10.0, order=lambda: ["b", "a", "c"])
    assert d.wanted("b") > 20
    assert [d.wanted(name) for name in "ac"] == [2, 2]


def test_a_pool_whose_nodes_do_not_come_is_made_up_for_and_keeps_one_request():
    d = demand(options(4), options(4), a=1.0, b=1.0)
    requests = [Worker(f"w{i}", pool="a") for i in range(3)]
    d.look(Work(9), requests, 100.0)
    assert (d.wanted("a"), d.wanted("b")) == (3, 0)  # 90 s of work
    d.look(Work(9), requests, 200.0)
    assert (d.wanted("a"), d.wanted("b")) == (1, 2)


@st.composite
def pools_and_steps(draw):
    pools = draw(
        st.lists(
            st.builds(options, st.integers(5, 50), at_once=st.none() | st.integers(0, 60)),
            min_size=1,
            max_size=3,
        )
    )
    steps = st.tuples(st.integers(0, 40), st.integers(0, 9), st.floats(0, 900))
    return pools, draw(st.lists(steps, max_size=8))


@given(pools_and_steps())
def test_all_pools_together_never_have_more_than_there_are_shards_and_some_while_there_is_work(case):
    pools, steps = case
    d = demand(*pools)
    workers, now, left = [], 0.0, 200
    for committed, active, seconds in steps:
        now, left = now + seconds, max(0, left - committed)
        at = [w for w in workers if w.ready][:active]
        work = Work(left, tuple((w.worker_id, now - seconds, 3, now) for w in at[:left]))
        workers = [w for w in workers if w.ready][:left]  # others were taken back, and some died
        d.look(work, workers, now)
        for name in d.pools:
            more = d.more(sum(w.pool == name for w in workers), len(workers), name)
            assert more <= max(0, d.wanted(name))
            workers += [at_work(f"w{now}-{name}-{i}", name, 1.0) for i in range(more)]
        assert len(workers) <= left
        assert left == 0 or workers


def test_the_newest_requests_are_taken_back_first_and_only_what_is_too_much():
    workers = waiting(60)
    d = demand(options(60, at_once=None))
    d.look(Work(3), workers, 0.0)
    assert d.withdrawable(workers, 0.0, draining=False) == []  # they may be starting
    back = d.withdrawable(workers, NODE_ANSWER_S, draining=False)
    assert ids(back) == [f"w{i}" for i in range(59, 2, -1)]


def test_a_worker_that_has_a_node_is_paid_for():
    workers = waiting(10)
    for w in workers[4:]:
        w.node = "there"
    workers[0].ready, workers[1].stopping = "yes", True
    d = demand(options(10, at_once=None))
    d.look(Work(1), workers, 0.0)
    d.withdrawable(workers, 0.0, draining=False)
    assert ids(d.withdrawable(workers, 5.0, draining=False)) == ["w3", "w2"]


def test_a_draining_job_waits_for_no_node():
    workers = waiting(4)
    workers[0].node = "there"
    d = demand(options(4, least=4, at_once=None))
    d.look(Work(100), workers, 0.0)
    d.withdrawable(workers, 0.0, draining=True)
    assert ids(d.withdrawable(workers, 5.0, draining=True)) == ["w3", "w2", "w1"]
    assert d.withdrawable(workers, 5.0, draining=False) == []


def test_what_was_asked_for_is_not_taken_back_for_a_little_less_work():
    """Two are worth their node if asked for now, three were before: the third is kept, until half of the work is gone."""
    d = demand(options())
    first, requests = at_work("x"), [Worker(f"w{i}", spawned=0.0) for i in range(3)]
    workers = [first, *requests]

    def look(shards: int, now: float) -> list[Worker]:
        made = deque([("x", IMAGES, 0.0, 8.0)] if now == 8.0 else [])
        d.look(Work(shards, (("x", now, 0, 0.0),), made), workers, now)
        return d.withdrawable(workers, now, draining=False)

    assert look(40, 8.0) == []
    assert d.wanted() < len(workers)
    assert len(look(6, 14.0)) == 3


def test_how_long_a_start_takes_is_as_others_took_and_of_a_node_that_is_there_as_long_as_there():
    d = Demand({"p": PoolOptions(0, 9, at_once=2), "q": PoolOptions(0, 9, at_once=None)})
    assert (d.start_s("p"), d.start_s("p", 0)) == (30.0, 30.0)
    there = Worker("a", -5.0, "yes", False, "there", -4.0, "a shard", "p")  # it had a node after a second
    came = Worker("b", -90.0, "yes", False, "there", -20.0, "a shard", "p")
    d.look(Work(100), [there, came], 0.0)
    assert d.start_s("p") == 90.0
    assert [d.start_s("p", own) for own in (0, 1, 2, 3)] == [5.0, 5.0, 90.0, 90.0]
    assert (
        d.start_s("q", 0) == 90.0
    )  # nobody counts its nodes, and the slowest pool known is what it is taken for


# -- pools that fit the same nodes ----------------------------------------------------------------------------------


def sharing(nodes, **asks) -> Demand:
    """Pools `(least, most, CPUs)` of nodes that nobody joins."""
    there, pools = Nodes(nodes, may_grow=False), {}
    for name, (least, most, cpus) in asks.items():
        at_once = sum(int(node.resources["CPU"] // cpus) for node in nodes)
        pools[name] = PoolOptions(least, most, cpus, at_once=at_once, nodes=there)
    return Demand(pools)


def processors(*cpus: float) -> tuple[NodeNow, ...]:
    return tuple(NodeNow(f"n{i}", {"CPU": n}, {}) for i, n in enumerate(cpus))


def on(node_id: str, pool: str, **more) -> Worker:
    placed = at_work(f"{node_id}-{pool}", pool)
    placed.node = SimpleNamespace(node_id=node_id)
    for name, value in more.items():
        setattr(placed, name, value)
    return placed


def wanted_of(d: Demand, workers, *, now=10.0, order="ab", shards=99) -> list[int]:
    d.look(Work(shards), workers, now, order=lambda: list(order))
    return [d.wanted(name) for name in sorted(d.pools)]


def test_the_pool_that_is_preferred_takes_first_and_the_least_of_the_others_before():
    assert wanted_of(sharing(processors(4), a=(0, 3, 1), b=(0, 9, 1)), []) == [3, 1]
    assert wanted_of(sharing(processors(4), a=(0, 3, 1), b=(0, 9, 1)), [], order="ba") == [0, 4]
    assert wanted_of(sharing(processors(4), a=(1, 3, 1), b=(0, 9, 1)), [], order="ba") == [1, 3]
    assert wanted_of(sharing(processors(4), a=(0, 3, 1), b=(0, 9, 1)), [], shards=2) == [2, 0]


def test_workers_that_are_there_and_requests_that_may_be_met_any_moment_keep_their_room():
    d = sharing(processors(2, 2), a=(0, 9, 1), b=(0, 9, 2))
    assert wanted_of(d, [on("n0", "a")]) == [4, 0]
    assert wanted_of(d, [on("n0", "a")], order="ba") == [2, 1]
    asked = Worker("w", 9.0, pool="a")
    assert wanted_of(d, [asked], order="ba") == [2, 1]
    # where it waits for minutes its place is not there: somebody else's work is
    assert wanted_of(d, [asked], now=500.0, order="ba") == [0, 2]


def test_the_place_of_a_worker_that_ends_is_its_own_pools_until_it_is_gone():
    """Nobody else's request is to wait for it, and its pool's next worker is asked for at once."""
    d = sharing(processors(2), a=(0, 9, 1), b=(0, 9, 1))
    assert wanted_of(d, [on("n0", "a", stopping=True), on("n0", "b")], order="ba") == [1, 1]
    d.look(Work(9), [on("n0", "a", stopping=True)], 10.0, targets={"a": 0, "b": 9})
    assert [d.wanted("a"), d.wanted("b")] == [0, 1]


def test_a_start_on_a_node_that_is_there_is_only_as_long_where_others_leave_one():
    d = sharing(processors(2), a=(0, 9, 1), b=(0, 9, 1))
    for name in "ab":
        for start_s, has_waited in ((5.0, False), (90.0, True)):
            d._paces[name].starts[has_waited].append(start_s)
    d.look(Work(9), [on("n0", "a", spawned=-80.0)], 10.0)
    assert [d.start_s("a", own) for own in (1, 2)] == [5.0, 90.0]
    assert d.start_s("b", 0) == 90.0


@given(clusters(), st.data())
def test_all_that_is_wanted_fits_where_nobody_joins(cluster, data):
    """Workers stand anywhere they fit, requests are out, pools are preferred in any order: what is wanted has a place."""
    nodes, asks, order = cluster
    there = Nodes(nodes, may_grow=False)
    pools = {}
    for name, ask in asks.items():
        cpus, gpus = ask.asked["CPU"], ask.asked["GPU"]
        pools[name] = PoolOptions(
            0, ask.most, cpus, gpus, at_once=alone(nodes, ask), selectors=ask.selectors, nodes=there
        )
    d, workers = Demand(pools), []
    singles = {n.node_id: OneNode(n.resources, n.labels) for n in nodes}
    for i in range(data.draw(st.integers(0, 5))):
        name = data.draw(st.sampled_from(order))
        fitting = [node_id for node_id, single in singles.items() if single.takes(asks[name])]
        if fitting and data.draw(st.booleans()):
            node_id = data.draw(st.sampled_from(fitting))
            singles[node_id].put(asks[name])
            workers.append(on(node_id, name, worker_id=f"w{i}", stopping=data.draw(st.booleans())))
        else:
            workers.append(Worker(f"w{i}", data.draw(st.sampled_from([9.0, -500.0])), pool=name))
    d.look(Work(data.draw(st.integers(0, 9))), workers, 10.0, order=lambda: order)
    standing = {name: sum(w.pool == name and w.node is not None for w in workers) for name in asks}
    ending = {name: sum(w.pool == name and w.stopping for w in workers) for name in asks}
    # the place of a worker that ends is taken by the next of its pool
    more = {name: max(0, d.wanted(name) - standing[name]) for name in asks}
    assert can_stand(list(singles.values()), asks, more, as_they_are=True)
    assert all(d.wanted(name) <= max(asks[name].most, standing[name] - ending[name]) for name in asks)
