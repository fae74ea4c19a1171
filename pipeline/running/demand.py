"""How many workers the work that is left is worth, and which requests for workers nobody needs any more.

A worker that waits for capacity is a request for a node, which an autoscaler buys. So requests follow the work: as many
as the nodes that are there hold at once, beyond them only as many as have work for as long as a worker takes to start,
never more than there are shards. What exceeds that is withdrawn, newest first, as long as it has no node: a worker
that has one is paid for.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from millijoule.pipeline.running.coordinator import Coordinator

#: Before it is known how long a shard takes, this many are asked for on nodes yet to come: enough to find out.
FIRST_WORKERS = 4
#: A worker is worth asking for if there is work for it for as long as it took others to start (model and node included), and at
#: least and at most this long: what a first worker waited for on a full cluster says nothing about the next.
START_S, LEAST_START_S, MOST_START_S = 30.0, 10.0, 600.0
#: What was asked for is withdrawn only when it is this many times what is worth asking for: estimates waver.
HYSTERESIS = 2
#: A worker with a node answers at once, while its model loads; one that has not for this long has none.
NODE_ANSWER_S = 1.0


@dataclass(frozen=True)
class PoolOptions:
    """How many workers, and what each asks Ray for.

    `min_workers` may be 0: then nothing runs while nothing waits. `at_once` workers fit the nodes that are there: beyond
    them nodes are asked for as far as the work is worth it; None asks for one for each shard at once. `selectors` are labels
    of nodes, by Ray's names, in order of preference; none: any node will do.
    """

    min_workers: int
    max_workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    at_once: int | None = None
    selectors: tuple[dict[str, str], ...] = ()

    @property
    def asked(self) -> dict[str, float]:
        """What a worker asks for, by Ray's names."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **self.resources}

    def actor_options(self) -> dict[str, Any]:
        """The same as keyword arguments of an actor class's `options`."""
        first, *others = self.selectors or (None,)
        fallback = {"fallback_strategy": [{"label_selector": s} for s in others]} if others else {}
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker,
            "resources": self.resources or None,
            "label_selector": first,
            **fallback,
        }

    def elsewhere(self, name: str, values: Collection[str]) -> PoolOptions:
        """The same, on nodes whose label `name` has none of `values`."""
        if not values:
            return self
        selectors = self.selectors or ({},)
        return replace(self, selectors=tuple({**s, name: f"!in({','.join(values)})"} for s in selectors))


class Demand:
    """Watches one pool. Its owner calls `look`, then asks `wanted` and `withdrawable`.

    A worker, for it, has `worker_id`, `spawned` (monotonic seconds), `node` (None while it has not said where it is), `ready`
    (None before) and `stopping`; they come in the order they were asked for.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.options = options
        self.target: int | None = None  # never more than this, where somebody else says so
        self._looked: float | None = None
        self._committed_before = self._committed = 0
        self._active = self._remaining = self._useful = 0
        self._busy_s = 0.0  # worker-seconds spent on leases
        self._starts: deque[float] = deque(maxlen=256)
        self._started: set[str] = set()

    def look(self, coordinator: Coordinator, workers: Collection[Any], now: float) -> None:
        """Take note of what is done, at work and left."""
        if self._looked is None:
            self._committed_before = coordinator.n_committed
        else:
            self._busy_s += self._active * (now - self._looked)
        self._looked = now
        self._committed = coordinator.n_committed - self._committed_before
        self._active = coordinator.at_work
        self._remaining = coordinator.remaining
        self._useful = coordinator.useful_workers
        for worker in workers:
            if worker.ready is not None and worker.worker_id not in self._started:
                self._started.add(worker.worker_id)
                self._starts.append(now - worker.spawned)

    def wanted(self, factor: int = 1) -> int:
        """Workers there should be, where `factor` times what the work is worth is."""
        options, useful = self.options, self._useful
        if options.at_once is not None:
            useful = min(useful, max(options.at_once, factor * self._worth()))
        if self.target is not None:
            useful = min(useful, self.target)
        return min(options.max_workers, max(options.min_workers, useful))

    def _worth(self) -> int:
        """Workers that have enough to do, by how long shards took, those at work counted as done by now."""
        shards = self._committed + self._active
        work_s = self._remaining * self._busy_s / shards if shards else 0.0
        start_s = statistics.median(self._starts) if self._starts else START_S
        worth = math.ceil(work_s / min(MOST_START_S, max(LEAST_START_S, start_s)))
        return max(1, worth) if self._committed else max(FIRST_WORKERS, worth)

    def withdrawable(self, workers: Collection[Any], now: float, *, draining: bool) -> list[Any]:
        """Workers to take back: asked for in excess of what is wanted, or of anything when draining, and without a node."""
        staying = sum(not w.stopping for w in workers)
        excess = staying - (0 if draining else self.wanted(HYSTERESIS))
        if excess <= 0:
            return []
        waiting = [w for w in workers if w.ready is None and not w.stopping]
        without = [w for w in reversed(waiting) if w.node is None and now - w.spawned >= NODE_ANSWER_S]
        return without[:excess]
