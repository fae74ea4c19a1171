"""The pools of a job on a cluster: what their workers ask for, what room there is, and the policy that chooses among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

from millijoule.jobs.set_up.pool_words import pool_gpus
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import JobRequest
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.fleet.room import Nodes, Room
from millijoule.pipeline.running.cluster import nodes_now, words
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)


def pools_on(request: JobRequest, cluster: Cluster) -> tuple[Pool, ...]:
    """The request's pools on the cluster as it is now.

    Raises:
        InputError: a pool has no room on this machine, which nobody will ever join.
    """
    if not request.pools:
        return ()
    options, pools = request.options, []
    nodes = Nodes(nodes_now(), may_grow=not cluster.own)
    for pool in request.pools:
        wanted = PoolOptions(
            pool.min_workers,
            pool.max_workers,
            options.cpus_per_worker if pool.cpus is None else pool.cpus,
            pool_gpus(pool, options),
            request.resources,
            selectors=pool.selectors,
            nodes=nodes,
        )
        room = Room(nodes, {pool.name: wanted}).places([pool.name]).fits(pool.name)
        if not room and cluster.own:
            raise InputError(
                f"--pool {pool.name}: this machine has no room for a worker that asks for {words(wanted.asked)}"
                f"{_labels_words(wanted)}; give --ray-address of a cluster"
            )
        pools.append(
            Pool(
                pool.name,
                replace(wanted, at_once=room),
                pool.model,
                pool.price,
                pool.images_per_s,
                pool.joules,
            )
        )
    return tuple(pools)


def together(pools: Iterable[Pool]) -> PoolOptions:
    """All pools as one: bounds are sums, what a worker asks for is what the first pool's does."""
    first, *_ = pools = tuple(pools)
    return replace(
        first.options,
        min_workers=sum(pool.options.min_workers for pool in pools),
        max_workers=sum(pool.options.max_workers for pool in pools),
        at_once=None,
        nodes=None,
    )


def policy_of(request: JobRequest, pools: tuple[Pool, ...]) -> FleetPolicy | None:
    """Which of the pools' workers there are to be, from now on; None where the job has no pools."""
    if not pools:
        return None
    policy = choosing(request, pools)
    fit = fit_together(policy)
    for pool in pools:
        log.info("pool %s", pool_words(pool, fit[pool.name]))
    if len({pool.model.rungs if pool.model else request.model.rungs for pool in pools}) > 1:
        log.warning(
            "pools draw with unlike settings: which of them an image is made with is by chance; attempt and env tables tell"
        )
    in_time = "" if policy.deadline_s is None else ", in time for the deadline"
    log.info("pools: %s is preferred%s", policy.prefer, in_time)
    return policy


def choosing(request: JobRequest, pools: Iterable[Pool]) -> FleetPolicy:
    """The policy, without a word."""
    caps, now = request.caps, time.time()
    deadline_s = None if caps.deadline_unix is None else time.monotonic() + caps.deadline_unix - now
    price = 0.0 if caps.price is None else caps.price.at(now) * caps.pue
    return FleetPolicy(tuple(pools), request.options.prefer, deadline_s=deadline_s, price_per_kwh=price)


def fit_together(policy: FleetPolicy, most: Mapping[str, int] | None = None) -> dict[str, int]:
    """Workers of each pool that the nodes that are there hold at the same time, those preferred first; never more than `most`."""
    bounds = {name: pool.options.bounds_at_once for name, pool in policy.pools.items()}
    for name, bound in (most or {}).items():
        bounds[name] = min(bounds[name][0], bound), min(bounds[name][1], bound)
    if policy.room is None:
        return {name: n for name, (_, n) in bounds.items()}
    return policy.room.together(policy.order(), bounds)


def pool_words(pool: Pool, fit: int) -> str:
    """A pool in a line; `fit`: how many of its workers the nodes that are there hold beside those of the others."""
    options, parts = pool.options, []
    parts.append(
        f"{pool.name}: {options.min_workers} to {options.max_workers} workers of {words(options.asked)}"
    )
    if labels := _labels_words(options):
        parts.append(labels.removeprefix(" "))
    if options.at_once is not None:
        _, alone = options.bounds_at_once
        parts.append(f"room now for {fit}{f' beside the other pools, {alone} alone' if fit < alone else ''}")
    if pool.model is not None:
        batch = f", batches of {pool.model.batch_size}" if pool.model.batch_size else ""
        rungs = f", {said}" if (said := pool.model.rungs.words()) != "none" else ""
        parts.append(f"engine {pool.model.engine}{batch}{rungs}")
    if pool.price_per_hour is not None:
        parts.append(f"{pool.price_per_hour:g} per hour")
    return ", ".join(parts)


def _labels_words(options: PoolOptions) -> str:
    """ " on nodes with a=b, c=d (else a=b, c=e)"."""
    texts = [", ".join(f"{name}={value}" for name, value in s.items()) for s in options.selectors if s]
    if not texts:
        return ""
    return f" on nodes with {texts[0]}" + "".join(f" (else {text})" for text in texts[1:])
