"""How many workers the work that is left is worth, over all pools, and which requests for workers nobody needs any more.

A worker that waits for capacity is a request for a node, which an autoscaler buys. So requests follow the work: as many
as the nodes that are there hold at once, beyond them only as many as have work for as long as a worker takes to start
(`pipeline.fleet.worth`), in all never more than there are shards. From zero that is one: its first images tell how much
work there is. What exceeds it is withdrawn, newest first, as long as it has no node: a worker that has one is paid for.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from millijoule.pipeline.fleet.pace import MOST_IMAGES_PER_S, Pace
from millijoule.pipeline.fleet.room import Nodes, Room
from millijoule.pipeline.fleet.worth import NO_CAPACITY_S, UNLIKE, Standing, share_out
from millijoule.pipeline.running.coordinator import Coordinator

#: A worker is worth asking for if there is work for it for as long as it took others to start (model and node included), and at
#: least and at most this long: what a first worker waited for on a full cluster says nothing about the next.
START_S, LEAST_START_S, MOST_START_S = 30.0, 10.0, 600.0
#: Who had a node sooner than this got one that was there: how long it took to start says nothing of a node to come.
NODE_THERE_S = 3.0
#: What is worth asking for is worked out so often; with many workers less often.
LOOK_PERIOD_S, MANY_WORKERS, LONG_LOOK_PERIOD_S = 0.0, 50, 1.0
#: What was asked for is withdrawn only when it is this many times what is worth asking for: estimates waver.
HYSTERESIS = 2
#: A worker with a node answers at once, while its model loads; one that has not for this long has none.
NODE_ANSWER_S = 1.0


@dataclass(frozen=True)
class PoolOptions:
    """How many workers, and what each asks Ray for.

    `min_workers` may be 0: then nothing runs while nothing waits. `at_once` workers fit the nodes that are there: beyond
    them nodes are asked for as far as the work is worth it; None asks for one for each shard at once. `selectors` are labels
    of nodes, by Ray's names, in order of preference; none: any node will do. `nodes` are those on which `at_once` is counted,
    where other pools of the job are counted on the same ones, too.
    """

    min_workers: int
    max_workers: int
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    at_once: int | None = None
    selectors: tuple[dict[str, str], ...] = ()
    nodes: Nodes | None = None

    @property
    def asked(self) -> dict[str, float]:
        """What a worker asks for, by Ray's names."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker, **self.resources}

    @property
    def bounds_at_once(self) -> tuple[int, int]:
        """The least and the most workers on the nodes that are there, as far as nobody else is."""
        most = self.max_workers if self.at_once is None else min(self.max_workers, self.at_once)
        return min(self.min_workers, most), most

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


def room_of(pools: Mapping[str, PoolOptions]) -> Room | None:
    """What all pools of a job share; None where nobody says which nodes there are."""
    nodes = [options.nodes for options in pools.values()]
    return None if None in nodes else Room(nodes[0] or Nodes(), pools)


class Demand:
    """Watches all pools of a job. Its owner calls `look`, then asks `wanted` and `withdrawable`.

    A worker, for it, has `worker_id`, `pool`, `spawned` (monotonic seconds), `node` (None while it has not said where it is) and
    `placed` (when it did), `ready` (None before), `held` (what it has in hand) and `stopping`; they come in the order they were asked for.

    Args:
        pools: by name; those preferred first, where `look` is not told otherwise.
        stated: images per second of one worker, where somebody says so; believed until its pool has made some.
    """

    def __init__(self, pools: Mapping[str, PoolOptions], stated: Mapping[str, float] | None = None) -> None:
        self.pools = dict(pools)
        self._room = room_of(pools)
        self._stated = dict(stated or {})
        self._paces = {name: Pace() for name in pools}
        self._next_look = float("-inf")
        self._bounds: dict[str, int] = {}
        self._started: set[str] = set()
        self._pool_of: dict[str, str] = {}
        self._useful = 0
        self._wanted = dict.fromkeys(pools, 0)
        self._tolerated = dict.fromkeys(pools, 0)  # more than this is taken back
        self._fit = {name: options.at_once for name, options in pools.items()}  # nodes that are there

    def look(
        self,
        coordinator: Coordinator,
        workers: Collection[Any],
        now: float,
        *,
        targets: Mapping[str, int] | None = None,
        order: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Take note of what is done, at work and left.

        Args:
            workers: of all pools.
            targets: never more than so many workers of a pool.
            order: gives the names of the pools, those preferred first.
        """
        self._useful = coordinator.useful_workers
        bounds = dict(targets or {})
        if now < self._next_look and bounds == self._bounds:
            return
        self._bounds = bounds
        self._next_look = now + (LOOK_PERIOD_S if len(workers) < MANY_WORKERS else LONG_LOOK_PERIOD_S)
        self._learn(coordinator, workers, now)
        shard_images = coordinator.images_per_shard
        unbegun = (max(0, coordinator.unleased) + coordinator.n_ahead) * shard_images
        standing = self._standing(workers, now, targets or {}, order() if order else tuple(self.pools))
        places = None
        if self._room is not None:
            held = [(w.pool, w.node.node_id) for w in workers if w.node is not None]
            places = self._room.places([pool.name for pool in standing], held)
        share = share_out(standing, self._useful, unbegun, shard_images, places)
        self._wanted, self._fit = share.wanted, {**self._fit, **share.room}
        waited = {w.pool: now - w.spawned for w in workers if w.node is None}  # of the newest of each pool
        milder = [_for_what_waits(pool, waited.get(pool.name, 0.0)) for pool in standing]
        self._tolerated = share_out(milder, self._useful, unbegun, shard_images, places).wanted

    def _learn(self, coordinator: Coordinator, workers: Collection[Any], now: float) -> None:
        """How long starts took, and how fast each pool is."""
        for worker in workers:
            self._pool_of[worker.worker_id] = worker.pool
            if worker.ready is not None and worker.worker_id not in self._started:
                self._started.add(worker.worker_id)
                has_waited = worker.placed is None or worker.placed - worker.spawned > NODE_THERE_S
                self._paces[worker.pool].starts[has_waited].append(now - worker.spawned)
        while coordinator.made:
            worker_id, images, began, ended = coordinator.made.popleft()
            if (pool := self._pool_of.get(worker_id)) is not None:
                self._paces[pool].made(worker_id, images, began, ended)
        for pace in self._paces.values():
            pace.forget_what_is_in_hand()
        for entry in coordinator.active.values():
            pool = self._pool_of.get(entry.lease.worker_id)
            if pool is not None and entry.lease.writes and not entry.is_ahead:
                self._paces[pool].draws(entry, now)

    def _standing(
        self,
        workers: Collection[Any],
        now: float,
        targets: Mapping[str, int],
        order: Sequence[str],
    ) -> list[Standing]:
        rates = {name: pace.images_per_s for name, pace in self._paces.items()}
        known = {name: rate or self._stated.get(name) for name, rate in rates.items()}
        bounds = [bound for pace in self._paces.values() if (bound := pace.most_images_per_s)]
        fastest = max([rate for rate in known.values() if rate] or bounds, default=MOST_IMAGES_PER_S)
        most = min(MOST_IMAGES_PER_S, fastest * (UNLIKE if len(self.pools) > 1 else 1.0))
        there: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        ending: Counter[str] = Counter()
        coming: dict[str, list[float]] = defaultdict(list)
        starts = {name: self.start_s(name) for name in self.pools}
        in_vain: set[str] = set()
        for worker in workers:
            if worker.stopping:  # wanted no more: whoever is counted here is replaced when it is gone
                if self._room is not None and worker.node is not None and worker.node.node_id in self._room:
                    ending[worker.pool] += 1
                continue
            if worker.node is None:
                asked[worker.pool] += 1
                if now - worker.spawned > max(NO_CAPACITY_S, HYSTERESIS * starts[worker.pool]):
                    in_vain.add(worker.pool)
                continue
            there[worker.pool] += 1
            if not worker.held:
                waited_s = starts[worker.pool] if worker.ready is not None else now - worker.spawned
                coming[worker.pool].append(max(0.0, starts[worker.pool] - waited_s))
        standing = []
        for name in order:
            options = self.pools[name]
            standing.append(
                Standing(
                    name,
                    options.min_workers,
                    min(options.max_workers, targets.get(name, options.max_workers)),
                    options.at_once,
                    there[name],
                    0 if name in in_vain else asked[name],
                    ending[name],
                    tuple(self._paces[name].left.values()),
                    tuple(coming[name]),
                    known[name] or self._paces[name].most_images_per_s or most,
                    known[name] is not None,
                    starts[name],
                    starts[name],
                    name in in_vain,
                )
            )
        return standing

    def start_s(self, pool: str, own: int | None = None) -> float:
        """Seconds until a worker on a node to come is ready: as others of its pool, else as the slowest pool's, at least as assumed.

        Args:
            own: workers of the pool that there are, where one more is asked about: it may fit a node that is there.
        """
        fit, there = self._fit[pool], self._paces[pool].starts[False]
        if own is not None and fit is not None and own < fit and there:
            return statistics.median(there)
        medians = {
            name: statistics.median(p.starts[True]) for name, p in self._paces.items() if p.starts[True]
        }
        if (start_s := medians.get(pool)) is None:
            at_hand = [seconds for pace in self._paces.values() for seconds in pace.starts[False]]
            start_s = max([START_S, *medians.values(), *at_hand])
        return min(MOST_START_S, max(LEAST_START_S, start_s))

    def wanted(self, pool: str = "") -> int:
        """Workers of `pool` there should be."""
        return self._wanted[pool]

    def more(self, own: int, workers: int, pool: str = "") -> int:
        """Workers of `pool` to ask for: those there should be, as far as all pools together have no more than there is to do.

        Args:
            own, workers: how many of `pool`, and of all pools, there are.
        """
        least = self.pools[pool].min_workers - own
        return max(0, least, min(self._wanted[pool] - own, self._useful - workers))

    def withdrawable(self, own: Collection[Any], now: float, *, draining: bool, pool: str = "") -> list[Any]:
        """Of `own`, all workers of `pool`, those to take back: asked for in excess of what is wanted, or of anything when draining, and
        without a node."""
        excess = len(own) - (0 if draining else self._tolerated[pool])
        if excess <= 0:
            return []
        waiting = [w for w in own if w.ready is None and not w.stopping]
        without = [w for w in reversed(waiting) if w.node is None and now - w.spawned >= NODE_ANSWER_S]
        return without[:excess]


def _for_what_waits(pool: Standing, waited_s: float) -> Standing:
    """The same, to say what is still worth its node that was asked for before: the node may come any moment, and estimates waver."""
    is_due = waited_s < pool.wait_s * (1 + 1 / HYSTERESIS)
    wait_s = max(0.0, pool.wait_s - waited_s) if is_due else pool.wait_s
    return replace(pool, wait_s=min(wait_s, pool.wait_s / HYSTERESIS), repaid_s=pool.repaid_s / HYSTERESIS)
