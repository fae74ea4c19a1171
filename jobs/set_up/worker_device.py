"""What a job's workers run on, GPU or CPU, and how many there may be: decided once, and said with the reason.

A person's word counts first (`--device`, `--gpus-per-worker`), then GPUs that the cluster has, then GPUs that may come.
A model that needs a GPU in practice never ends up on CPUs unasked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.autoscaling import Prospect, prospect
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import needs_gpu

if TYPE_CHECKING:
    from millijoule.jobs.generate import GenerateOptions

log = logging.getLogger(__name__)

#: `--workers auto` on nodes yet to come asks for no more than this where the cluster does not say how many may come.
AUTO_WORKERS_TO_COME = 8


@dataclass(frozen=True)
class WorkerDevice:
    """What every worker asks Ray for, and `to_come`: workers that fit the nodes that may come (None: no matter)."""

    gpus: float
    why: str
    to_come: int | None = None

    def __str__(self) -> str:
        return f"{'gpu' if self.gpus else 'cpu'}, because {self.why}"


def check_device_options(options: GenerateOptions) -> None:
    """Refuse contradictions; raises InputError."""
    gpus = options.gpus_per_worker
    if gpus is not None and gpus < 0:
        raise InputError(f"--gpus-per-worker {gpus:g}: 0 or more")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise InputError(f"--gpus-per-worker {gpus:g}: above 1 whole GPUs only")
    if options.device == "cpu" and gpus:
        raise InputError(f"--device cpu and --gpus-per-worker {gpus:g} exclude each other: give one of them")
    if options.device == "gpu" and gpus == 0:
        raise InputError("--device gpu and --gpus-per-worker 0 exclude each other: give one of them")


def choose_device(
    options: GenerateOptions,
    resources: dict[str, float],
    *,
    has_work: Callable[[], bool] = lambda: True,
    ask: Callable[[dict[str, float]], Prospect] = prospect,
) -> WorkerDevice | None:
    """Decide for the cluster this process is connected to; None where that takes asking for a node nobody needs.

    Args:
        resources: what a worker asks for besides GPUs, by Ray's names.
        has_work: whether a node that starts for the question would find work.
        ask: `autoscaling.prospect`.

    Raises:
        InputError: there is no GPU, none can come, and one was asked for or is needed.
    """
    gpus = options.gpus_per_worker
    if options.device == "cpu":
        return WorkerDevice(0.0, "--device cpu")
    if gpus == 0:
        return WorkerDevice(0.0, "--gpus-per-worker 0")
    asked_by = "--device gpu" if options.device == "gpu" else f"--gpus-per-worker {gpus:g}" if gpus else None
    gpus = gpus or 1.0
    if have := ray_cluster.gpus():
        there = f"{have:g} GPU{'' if have == 1 else 's'}"
        return WorkerDevice(gpus, asked_by or f"{ray_cluster.place(options.ray_address)} has {there}")
    if not has_work():
        return None
    answer = ask({**resources, "GPU": gpus})
    if answer.may_come:
        why = f"{asked_by}, and {answer.why}" if asked_by else answer.why
        return WorkerDevice(gpus, why, answer.most or AUTO_WORKERS_TO_COME)
    reason = f"{ray_cluster.place(options.ray_address)} has no GPU, and {answer.why}"
    if asked_by:
        if answer.may_come is False:
            raise InputError(
                f"{asked_by}: {reason}. Add a node with a GPU or choose a cluster that has one (--ray-address); "
                "--device cpu runs without"
            )
        log.warning("%s: %s; waiting for one", asked_by, reason)
        return WorkerDevice(gpus, asked_by, AUTO_WORKERS_TO_COME)
    if needs_gpu(options.model):
        raise InputError(
            f"--model {options.model}: this pipeline needs a GPU in practice, but {reason}. Two ways out: a cluster "
            "with GPUs (--ray-address; --device gpu waits for nodes that may come), or --device cpu to run it "
            "anyway, slowly"
        )
    if answer.may_come is None:
        log.warning("no GPU is used: %s. --device gpu asks for GPUs, --device cpu ends this warning", reason)
    return WorkerDevice(0.0, reason)
