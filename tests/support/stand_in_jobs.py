"""Whole jobs in this process: the product's driver and workers, with `support.ray_stand_in` for Ray and its clock."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from support.ray_stand_in import RayStandIn, StandInNode

from millijoule.jobs.set_up import calibration, ray_cluster
from millijoule.jobs.simulating.clocked_ray import install
from millijoule.jobs.simulating.memory_store import PromptWriter
from millijoule.pipeline.running import run
from millijoule.workers import actor
from millijoule.workers.actor import ShardWorker


class WriterAtOnce(PromptWriter):
    """A `RecordWriter` without a thread, whose works wait while `storage_is_away`, until `come_back`."""

    def __init__(self) -> None:
        super().__init__()
        self.storage_is_away = False
        self._works: deque[tuple[str, Any, Any]] = deque()

    @property
    def idle(self) -> bool:
        return not self._works and super().idle

    def submit(self, what: str, do: Any, then: Any = lambda result: None) -> None:
        self._works.append((what, do, then))
        if not self.storage_is_away:
            self.come_back()

    def come_back(self) -> None:
        """Storage answers, also what was asked before."""
        self.storage_is_away = False
        while self._works:
            super().submit(*self._works.popleft())


def start_cluster(monkeypatch: Any, worker: type[ShardWorker] = ShardWorker) -> RayStandIn:
    """A cluster without nodes to which this process is connected, for `generate` and whatever it calls."""

    def make(node: StandInNode, *arguments: Any) -> ShardWorker:
        context = SimpleNamespace(get_node_id=lambda: node.node_id, get_accelerator_ids=dict)
        monkeypatch.setattr(actor, "ray", SimpleNamespace(get_runtime_context=lambda: context))
        return worker(*arguments)

    ray = RayStandIn(make)
    install(monkeypatch.setattr, ray, ray.time)
    for module in (ray_cluster, calibration):
        monkeypatch.setattr(module, "ray", ray)
    monkeypatch.setattr(calibration, "remote_worker_class", lambda: ray.actor_class)
    monkeypatch.setattr(actor, "remote_worker_class", lambda: ray.actor_class)
    monkeypatch.setattr(actor, "exit_with_parent", lambda: None)
    monkeypatch.setattr(actor, "log_to_stderr", lambda line_format: None)
    monkeypatch.setattr(run, "RecordWriter", WriterAtOnce)
    return ray
