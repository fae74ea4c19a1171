"""A pool: workers that are alike because they ask for nodes with the same labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.lease import WorkerConfig

#: What a job is to save: joules, time, or money.
Preference = Literal["energy", "speed", "cost"]


@dataclass(frozen=True)
class Pool:
    """One of a job's pools.

    Attributes:
        options: bounds, and what a worker asks Ray for, labels included.
        model: how its workers load and run the model; None: as the job says.
        price_per_hour: of one worker's device, in the job's currency; None: not stated.
        images_per_s, joules_per_image: of one worker, as stated; what is measured replaces them.
    """

    name: str
    options: PoolOptions = field(default_factory=lambda: PoolOptions(0, 1))
    model: GeneratorOptions | None = None
    price_per_hour: float | None = None
    images_per_s: float | None = None
    joules_per_image: float | None = None


def config_of(config: WorkerConfig, pool: Pool) -> WorkerConfig:
    """What a worker of `pool` needs to know, where the job's workers have `config`."""
    return replace(
        config,
        options=pool.model or config.options,
        cpu_threads=max(1, int(pool.options.cpus_per_worker)),
        pool=pool.name,
        price_per_hour=pool.price_per_hour,
    )
