"""What each pool of a job made, for `stats.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.counter_split import MISSING
from millijoule.workers.schemas import WorkerEnvironment


def count_pools(
    commits: CommitTable, workers: Mapping[str, WorkerEnvironment], shard_mj: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Workers, shards, images and the joules of their shards by pool; empty where the job has no pools.

    Args:
        shard_mj: of each commit, MISSING where it was not measured; then the pool's is null.
    """
    pool_of = {worker_id: worker.pool for worker_id, worker in workers.items() if worker.pool}
    if not pool_of:
        return {}
    codes, images = commits.name_codes("worker_id"), commits.number("images_ok")
    pools = np.array([pool_of.get(name, "") for name in commits.names])[codes]
    found = {}
    for pool in sorted(set(pool_of.values())):
        mine = pools == pool
        energy = shard_mj[mine]
        found[pool] = {
            "workers": sum(name == pool for name in pool_of.values()),
            "shards": int(mine.sum()),
            "images_ok": int(images[mine].sum()),
            "shard_mj": None if (energy == MISSING).any() else int(energy.sum()),
        }
    return found
