"""Whole jobs in this process: the product's driver and workers, with `support.ray_stand_in` for Ray and its clock."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

from support.ray_stand_in import RayStandIn, StandInNode, install

from millijoule.jobs.set_up import calibration, ray_cluster
from millijoule.pipeline.running import run
from millijoule.workers import actor
from millijoule.workers.actor import ShardWorker


class WriterAtOnce:
    """A `RecordWriter` without a thread: works are done when they come, and taken by `settle` as ever.

    While `storage_is_away` they are kept, until `come_back`.
    """

    has_room = True
    waits_for_storage = False

    def __init__(self) -> None:
        self.storage_is_away = False
        self._works: deque[tuple[Any, Any]] = deque()
        self._results: deque[tuple[Any, Any]] = deque()

    @property
    def idle(self) -> bool:
        return not self._works and not self._results

    def submit(self, what: str, do: Any, then: Any = lambda result: None) -> None:
        self._works.append((do, then))
        if not self.storage_is_away:
            self.come_back()

    def come_back(self) -> None:
        """Storage answers, also what was asked before."""
        self.storage_is_away = False
        while self._works:
            do, then = self._works.popleft()
            self._results.append((then, do()))

    def settle(self) -> None:
        while self._results:
            then, value = self._results.popleft()
            then(value)

    def close(self, timeout_s: float | None = None) -> None:
        self.settle()


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
