"""What a job's workers run on, GPU or CPU, and how many there may be: decided once, and said with the reason.

A person's word counts first (`--device`, `--gpus-per-worker`), then GPUs that the cluster has, then GPUs that may come.
A model that needs a GPU in practice never ends up on CPUs unasked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.autoscaling import prospect
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import JobRequest, too_few_cpus
from millijoule.pipeline.running.cluster import words
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import needs_gpu

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


def choose_device(
    request: JobRequest, cluster: Cluster, *, has_work: Callable[[], bool] = lambda: True
) -> WorkerDevice | None:
    """Decide and say so; None where that takes asking for a node that nobody needs.

    Args:
        has_work: whether a node that starts for the question would find work.

    Raises:
        InputError: there is no GPU, none can come, and one was asked for or is needed.
    """
    options = request.options
    if options.device == "cpu":
        return _decided(0.0, "--device cpu")
    if options.gpus_per_worker == 0:
        return _decided(0.0, "--gpus-per-worker 0")
    gpus = options.gpus_per_worker or float(request.model.ranks)
    asked_by = None
    if options.device == "gpu":
        asked_by = "--device gpu"
    elif options.gpus_per_worker:
        asked_by = f"--gpus-per-worker {gpus:g}"
    if have := ray_cluster.gpus():
        return _decided(gpus, asked_by or f"{cluster.name} has {have:g} GPU{'' if have == 1 else 's'}")
    if not has_work():
        return None
    answer = prospect({"CPU": options.cpus_per_worker, **request.resources, "GPU": gpus})
    if answer.may_come:
        why = f"{asked_by}, and {answer.why}" if asked_by else answer.why
        return _decided(gpus, why, answer.most or AUTO_WORKERS_TO_COME)
    reason = f"{cluster.name} has no GPU, and {answer.why}"
    if asked_by:
        if answer.may_come is False:
            raise InputError(
                f"{asked_by}: {reason}. Add a node with a GPU or choose a cluster that has one (--ray-address); "
                "--device cpu runs without"
            )
        log.warning("%s: %s; waiting for one", asked_by, reason)
        return _decided(gpus, asked_by, AUTO_WORKERS_TO_COME)
    if needs_gpu(request.source.model, request.model):
        raise InputError(
            f"--model {options.model}: this pipeline needs a GPU in practice, but {reason}. Two ways out: a cluster "
            "with GPUs (--ray-address; --device gpu waits for nodes that may come), or --device cpu to run it "
            "anyway, slowly"
        )
    if answer.may_come is None:
        log.warning("no GPU is used: %s. --device gpu asks for GPUs, --device cpu ends this warning", reason)
    return _decided(0.0, reason)


def _decided(gpus: float, why: str, to_come: int | None = None) -> WorkerDevice:
    device = WorkerDevice(gpus, why, to_come)
    log.info("device: %s", device)
    return device


def pool_options(request: JobRequest, device: WorkerDevice | None, cluster: Cluster) -> PoolOptions:
    """How many workers and what each asks for, as the cluster is now; without a device there is nothing to do for any.

    Raises:
        InputError: the cluster, which nobody will ever join, has no room for a worker; or a worker asks for too few CPUs.
    """
    cpus = request.options.cpus_per_worker
    if device is None:
        return PoolOptions(0, 1, cpus, 0.0, request.resources)
    if not device.gpus and 1 < request.model.ranks > cpus:
        raise too_few_cpus(request.model.ranks)
    resources = {"CPU": cpus, "GPU": device.gpus, **request.resources}
    room = ray_cluster.room(resources)
    if not room and cluster.own:
        raise InputError(
            f"this machine has no room for a worker that asks for {words(resources)}; lower --cpus-per-worker, "
            "--gpus-per-worker or --resources, or give --ray-address of a larger cluster"
        )
    bounds = request.bounds
    if bounds is None:
        bounds = (0, device.to_come or max(1, room))
        if device.to_come:
            log.info(
                "workers: up to %d on nodes to come, as far as there is work; --workers 0:N sets another bound",
                bounds[1],
            )
    return PoolOptions(*bounds, cpus, device.gpus, request.resources, at_once=room)
