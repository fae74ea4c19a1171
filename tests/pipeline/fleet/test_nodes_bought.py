"""Nodes that a job has an autoscaler buy, over all its pools, against the shards there are for them: the driver on simulated fleets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st

from millijoule.jobs.simulating.devices import ACCELERATOR, DeviceKind, Fleet
from millijoule.jobs.simulating.job import made_up_plan, run_job
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
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
    asked: list = field(
        default_factory=list
    )  # at each request: workers there are with it, and shards not done
    idle: list = field(
        default_factory=list
    )  # shards that nobody had, whenever a worker ended without a lease
    started: set = field(default_factory=set)
    worked: set = field(default_factory=set)

    coordinator: object = None

    def run(self):
        pools = [
            Pool(
                name,
                PoolOptions(0, n, gpus_per_worker=1.0, selectors=({ACCELERATOR: kind.name},), at_once=0),
                price_per_hour=kind.price,
                images_per_s=self.stated.get(name),
            )
            for name, (kind, n) in self.kinds.items()
        ]
        self.fleet = Fleet(self.kinds, 1)
        policy = FleetPolicy(pools, self.prefer, deadline_s=self.deadline_s)
        spawn = Crew.spawn
        with pytest.MonkeyPatch.context() as patch:

            def spawned(crew, *args):
                spawn(crew, *args)
                there = sum(not w.stopping for w in crew.workers.values())
                open_shards = self.coordinator.remaining if self.coordinator else self.shards
                self.asked.append((there, open_shards))

            patch.setattr(Crew, "spawn", spawned)
            self.outcome = run_job(
                made_up_plan(self.shards, IMAGES),
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


kinds = st.builds(
    lambda name, images_per_s, load_s, boot_s, joules: DeviceKind(
        name, images_per_s, 40 + joules * images_per_s, 20.0, 1.0, load_s=load_s, boot_s=boot_s
    ),
    st.just("?"),
    st.floats(0.2, 200.0),
    st.floats(1.0, 60.0),
    st.floats(2.0, 300.0),
    st.floats(1.0, 1000.0),
)
