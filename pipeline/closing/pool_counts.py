"""What each pool of a job made and used, for `stats.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import Entries, sum_of_known
from millijoule.workers.schemas import WorkerEnvironment


def count_pools(
    commits: CommitTable, workers: Mapping[str, WorkerEnvironment], entries: Entries
) -> dict[str, dict[str, Any]]:
    """What the workers of each pool made and used; empty where the job has no pools.

    Of a shard that several pools had a part in, each has the images that it drew and what it used for them: `shards` were committed by
    the pool, `shards_made` is what its images are in shards of the job's mean size. `shard_s` and `shard_mj` are its devices' time and
    joules in shards, null where the joules were not measured; `shard_estimate_mj` is what a model of CPU time says of the same, null
    where it says nothing; `device_cost` is that time at the price that the pool states, null where it states none.

    Args:
        entries: of the job's ledger.
    """
    pool_of = {worker_id: worker.pool for worker_id, worker in workers.items() if worker.pool}
    if not pool_of:
        return {}
    made, by_pool = commits.number("images_ok").copy(), _pools(commits.names, pool_of)
    places, others, taken = commits.images_by_others()
    np.subtract.at(made, places, taken)
    finished, helped = by_pool[commits.name_codes("worker_id")], by_pool[others]
    mean = commits.number("images_ok").sum() / max(1, len(commits))
    drawn = entries.of_class("shard")
    drawing, mj = _pools(entries.names, pool_of)[entries.worker[drawn]], entries.total_mj[drawn]
    estimate_mj = entries.estimates()[drawn]
    t_mono_ns = entries.columns.t_mono_ns
    ns = t_mono_ns[entries.close[drawn]] - t_mono_ns[entries.open[drawn]]
    prices = {w.worker_id: w.price_per_hour for w in workers.values()}
    price = np.array([np.nan if (p := prices.get(n)) is None else p for n in entries.names], float)
    cost = ns / 3.6e12 * price[entries.worker[drawn]] if len(drawn) else np.zeros(0)
    found = {}
    for pool in sorted(set(pool_of.values())):
        images = int(made[finished == pool].sum() + taken[helped == pool].sum())
        mine = drawing == pool
        total_cost = float(cost[mine].sum())
        found[pool] = {
            "workers": sum(name == pool for name in pool_of.values()),
            "shards": int((finished == pool).sum()),
            "shards_made": round(images / mean, 3) if mean else 0.0,
            "images_ok": images,
            "shard_s": round(int(ns[mine].sum()) / 1e9, 3),
            "shard_mj": sum_of_known(mj[mine]),
            "shard_estimate_mj": sum_of_known(estimate_mj[mine]),
            "device_cost": None if np.isnan(total_cost) else total_cost,
        }
    return found


def _pools(worker_ids: Sequence[str], pool_of: Mapping[str, str]) -> np.ndarray:
    """The pool of each, empty where it has none."""
    return np.array([pool_of.get(worker_id, "") for worker_id in worker_ids], dtype=object)
