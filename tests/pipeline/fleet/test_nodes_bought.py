"""Nodes that a job has an autoscaler buy, over all its pools, against the shards there are for them: the driver on simulated fleets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millijoule.jobs.simulating.devices import DeviceKind, Fleet
from millijoule.jobs.simulating.fleets import mixed_kinds
from millijoule.jobs.simulating.job import made_up_plan, run_job
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.running import demand
from millijoule.pipeline.running.crew import Crew
from millijoule.pipeline.running.demand import PoolOptions

IMAGES = 20


@dataclass
class Bought:
    """A job on pools without a node, and what was seen of it from outside the rules that are tested."""

    kinds: dict
    shards: int
    prefer: str = "speed"
    stated: dict = field(default_factory=dict)
    deadline_s: float | None = None
    images: int = IMAGES
    asked: list = field(
        default_factory=list
    )  # at each request: workers there are with it, and shards not done
    idle: list = field(
        default_factory=list
    )  # shards that nobody had, whenever a worker ended without a lease
    asked_of: Counter = field(default_factory=Counter)  # by pool
    last_asked_s: float = 0.0
    started: set = field(default_factory=set)
    worked: set = field(default_factory=set)

    coordinator: object = None

    def run(self):
        pools = [
            Pool(
                name,
                PoolOptions(0, n, gpus_per_worker=1.0, selectors=(dict(kind.labels),), at_once=0),
                price_per_hour=kind.price,
                images_per_s=self.stated.get(name),
            )
            for name, (kind, n) in self.kinds.items()
        ]
        self.fleet = Fleet(self.kinds, 1)
        policy = FleetPolicy(pools, self.prefer, deadline_s=self.deadline_s)
        spawn = Crew.spawn
        with pytest.MonkeyPatch.context() as patch:

            def spawned(crew, now, *args):
                spawn(crew, now, *args)
                self.asked_of[args[2]] += 1
                self.last_asked_s = self.fleet.ray.now
                there = sum(not w.stopping for w in crew.workers.values())
                open_shards = self.coordinator.remaining if self.coordinator else self.shards
                self.asked.append((there, open_shards))

            patch.setattr(Crew, "spawn", spawned)
            self.outcome = run_job(
                made_up_plan(self.shards, self.images),
                self.fleet,
                fleet=policy,
                close_books=False,
                on_tick=self.look,
            )
        assert self.outcome.complete
        return self

    def look(self, job_run):
        self.coordinator = job_run.coordinator
        for worker in job_run.pool.workers.values():
            if worker.ready is not None:
                self.started.add(worker.worker_id)
            if worker.held:
                self.worked.add(worker.worker_id)
            elif worker.ready is not None and worker.worker_id not in self.worked:
                self.idle.append(job_run.coordinator.unleased)

    @property
    def nodes(self):
        return sum(node.held_s > 0 for node in self.fleet.nodes)

    @property
    def nodes_that_worked(self):
        """By what their devices drew: more than a start does."""
        return sum(node.all_mj > 1000 * node.kind.idle_w * node.held_s * 1.001 for node in self.fleet.nodes)


@st.composite
def jobs(draw):
    """Pools of any speed, whose nodes come within two minutes: later, others would make up for them."""
    kinds = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        rate, joules = draw(st.sampled_from([0.2, 1.0, 8.0, 60.0])), draw(st.sampled_from([1.0, 30.0, 300.0]))
        load_s, boot_s = draw(st.sampled_from([1.0, 20.0, 60.0])), draw(st.sampled_from([3.0, 30.0, 60.0]))
        kind = DeviceKind(name, rate, 40 + joules * rate, 20.0, 1.0, load_s=load_s, boot_s=boot_s)
        kinds[name] = kind, draw(st.sampled_from([1, 3, 12]))
    shards = draw(st.sampled_from([1, 2, 3, 5, 10, 20]))
    return kinds, shards, draw(st.sampled_from(["speed", "energy", "cost"]))


SOON = DeviceKind("a", 0.2, 40.2, 20.0, 1.0, load_s=1.0, boot_s=3.0)


@settings(max_examples=5, deadline=None)
@given(jobs())
# the second pool's node comes near the end, when nobody knows yet how fast it is
@example(({"a": (SOON, 3), "b": (replace(SOON, name="b", load_s=60.0), 1)}, 5, "speed"))
def test_never_more_workers_are_asked_for_than_shards_are_open_and_who_starts_gets_one(job):
    kinds, shards, prefer = job
    bought = Bought(kinds, shards, prefer).run()
    assert all(there <= still_open for there, still_open in bought.asked)
    idle = bought.started - bought.worked
    assert not idle or min(bought.idle) <= 0  # the work had ended
    assert bought.nodes >= 1


SLOW = DeviceKind("SLOW", 0.5, 150.0, 20.0, price=0.1, load_s=20.0, boot_s=10.0)
QUICK = DeviceKind("QUICK", 4.0, 400.0, 50.0, price=4.0, load_s=20.0, boot_s=10.0)
LEAN = DeviceKind("LEAN", 1.0, 60.0, 20.0, price=1.0, load_s=20.0, boot_s=10.0)
THREE = {"slow": (SLOW, 8), "quick": (QUICK, 8), "lean": (LEAN, 8)}


@pytest.mark.parametrize("prefer", ["speed", "energy", "cost"])
@pytest.mark.parametrize("shards", [1, 3])
def test_three_pools_from_zero_have_no_node_beyond_the_shards_and_each_makes_one(prefer, shards):
    bought = Bought(THREE, shards, prefer).run()
    assert bought.nodes == bought.nodes_that_worked <= shards


def test_a_large_job_has_all_the_nodes_it_may_have_one_start_after_the_first():
    """Twenty-four nodes for 150 shards: no more than a start and a few images later than if all were asked for at once."""
    bought = Bought(THREE, 150).run()
    assert bought.nodes == bought.nodes_that_worked == 24
    all_at_once = run_job(made_up_plan(150, IMAGES), Fleet(THREE, 1), close_books=False)
    assert bought.outcome.makespan_s < all_at_once.makespan_s + 30 + 15


def test_the_first_worker_is_of_the_pool_that_is_stated_to_be_the_fastest():
    bought = Bought(THREE, 1, stated={"slow": 0.5, "quick": 4.0}).run()
    assert [name for name, kind in bought.outcome.by_kind.items() if kind["hours"]] == ["QUICK"]


@pytest.mark.parametrize("many", [0, 50], ids=["looked at each second", "looked at each turn"])
def test_whoever_is_let_go_is_not_replaced(many, monkeypatch):
    """What a pool is worth is worked out once a second in a large fleet: workers that end in between must not be asked for anew."""
    monkeypatch.setattr(demand, "MANY_WORKERS", many)
    kinds = {name: (kind, 6) for name, kind in {"slow": SLOW, "quick": QUICK, "lean": LEAN}.items()}
    bought = Bought(kinds, 300, "energy", deadline_s=1200.0)
    bought.run()
    assert bought.outcome.makespan_s <= 1200
    # slow and quick ones show what they take and end; the lean ones alone are enough, and start once each
    assert all(bought.asked_of[name] <= n for name, n in {"slow": 2, "quick": 2, "lean": 6}.items())


@pytest.mark.parametrize("spot", [False, True])
def test_nobody_is_asked_for_who_would_not_be_ready_before_the_deadline(spot):
    """Starts of 120 s, which is more than any start is thought to take before one was seen."""
    kinds = mixed_kinds("even", 40, spot=spot)
    stealing = run_job(made_up_plan(800, 16), Fleet(kinds, 2), close_books=False)
    deadline_s = 1.25 * stealing.makespan_s
    bought = Bought(kinds, 800, "energy", deadline_s=deadline_s, images=16).run()
    assert bought.outcome.makespan_s <= deadline_s
    assert bought.last_asked_s <= deadline_s - 120
