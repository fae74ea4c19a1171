"""A few images on one worker, started as the job would start it: what they take, before the job is planned."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import ray

from millijoule.jobs.set_up.request import JobRequest
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.running.cluster import words
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.pool import CAPACITY_NOTICE_S
from millijoule.workers.actor import remote_worker_class
from millijoule.workers.lease import Calibration, WorkerConfig
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)

#: Enough images to see past start-up, few enough to wait for.
CALIBRATION_IMAGES = 64
#: A calibrated shard holds at least and at most this many images.
MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 16, 100_000


def calibrated_shard_size(request: JobRequest, seconds: float, pool: PoolOptions) -> int:
    """Images that take about `seconds` on one worker; raises InputError as `calibrate`."""
    made_up = [ImageRequest(f"calibration-{i}", 0, "", seed=i) for i in range(CALIBRATION_IMAGES)]
    result = calibrate(request, made_up, pool)
    per_image = result.seconds / max(1, result.images)
    return max(MIN_SHARD_IMAGES, min(MAX_SHARD_IMAGES, round(seconds / per_image)))


def calibrated_pools(
    request: JobRequest, seconds: float, pools: Sequence[Pool]
) -> tuple[int, tuple[Pool, ...]]:
    """Images that take about `seconds` on a worker of the slowest pool, and the pools with what they have shown.

    Only pools with room on the nodes that are there are tried; where none has, the first, which brings a node up.

    Raises:
        InputError: as `calibrate`.
    """
    tried = [pool for pool in pools if pool.options.at_once] or [pools[0]]
    known: dict[str, Pool] = {}
    for pool in tried:
        result = calibrate_pool(request, pool, CALIBRATION_IMAGES)
        known[pool.name] = with_calibration(pool, result)
        log.info("pool %s: %.3g images/s on one worker", pool.name, known[pool.name].images_per_s)
    slowest = min(pool.images_per_s or math.inf for pool in known.values())
    size = max(MIN_SHARD_IMAGES, min(MAX_SHARD_IMAGES, round(seconds * slowest)))
    return size, tuple(known.get(pool.name, pool) for pool in pools)


def calibrate_pool(request: JobRequest, pool: Pool, images: int | list[ImageRequest]) -> Calibration:
    """As `calibrate`, on a worker of `pool`."""
    if isinstance(images, int):
        images = [ImageRequest(f"calibration-{i}", 0, "", seed=i) for i in range(images)]
    if pool.model is not None:
        request = replace(request, source=replace(request.source, options=pool.model))
    return calibrate(request, images, pool.options)


def with_calibration(pool: Pool, result: Calibration) -> Pool:
    """`pool`, with what a calibration showed where nothing was stated."""
    drawn = max(1, result.images)
    mj = result.energy_mj if result.energy_mj is not None else result.energy_estimate_mj
    joules = pool.joules_per_image
    if joules is None and mj is not None:
        joules = mj / 1000 / drawn
    rate = pool.images_per_s or drawn / max(result.seconds, 1e-9)
    return replace(pool, images_per_s=rate, joules_per_image=joules)


def calibrate(request: JobRequest, images: list[ImageRequest], pool: PoolOptions) -> Calibration:
    """Start one worker with what `pool` says one asks for, draw `images`, end it.

    Raises:
        MillijouleError: the model cannot be loaded on the worker's node, or not used.
    """
    options = request.options
    config = WorkerConfig(
        output_url="",
        fingerprint="",
        job_seed=options.seed,
        output_format=options.format,
        model=request.source.model,
        model_sha256=request.identity.sha256,
        driver_epoch=0,
        options=request.model,
        image_format=request.image_format,
        copies=request.source.copies,
        cpu_threads=max(1, int(pool.cpus_per_worker)),
        telemetry=options.telemetry,
    )
    actor = remote_worker_class().options(**pool.actor_options()).remote("calibration", config)
    try:
        started = actor.start.remote()
        while not ray.wait([started], timeout=CAPACITY_NOTICE_S)[0]:
            log.warning("waiting for a worker to draw a few images on: it asks for %s", words(pool.asked))
        ray.get(started)
        return ray.get(actor.calibrate.remote(images))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if error.cause is not None else error from error
    finally:
        ray.kill(actor)
