"""`--dry-run` and calibration: plan without touching the output, draw a few images on a real worker, extrapolate."""

from __future__ import annotations

import logging
import tempfile
import time
from typing import TYPE_CHECKING

import ray

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.node_meter_options import parse_node_meters
from millijoule.jobs.set_up.autoscaling import words
from millijoule.pipeline.energy.carbon import MJ_PER_KWH
from millijoule.pipeline.planning.plan import compute_fingerprint, load_shard_index, plan_job
from millijoule.pipeline.running.node_recorders import look_once
from millijoule.pipeline.running.pool import CAPACITY_NOTICE_S, PoolOptions
from millijoule.pipeline.running.progress import clock, joules
from millijoule.workers.actor import remote_worker_class
from millijoule.workers.generators.protocol import ModelIdentity, describe_model
from millijoule.workers.lease import Calibration, WorkerConfig
from millijoule.workers.node_meters.meter import MW_PER_W
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.shard_rows import read_shard_rows, shard_requests
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.open import open_store
from millijoule.workers.storage.protocol import Store
from millijoule.workers.visible_text import visible_lines

if TYPE_CHECKING:
    from millijoule.jobs.generate import GenerateOptions

log = logging.getLogger(__name__)

#: Enough images to see past start-up, few enough to wait for.
CALIBRATION_IMAGES = 64

#: Nodes whose meters a dry run lists.
MAX_NODES_SHOWN = 32

#: Shard size a dry run plans with where the real one would follow from the calibration.
PLANNING_SHARD_SIZE = 256


def dry_run(options: GenerateOptions, store: Store) -> int:
    """Print what the job would be and take. Writes nothing to the output; returns the exit code."""
    from millijoule.jobs.set_up.job import WorkerRequest, parse_shard_size, plan_options

    images_per_shard, seconds_per_shard = parse_shard_size(options.shard_size)
    identity = describe_model(options.model)
    files = expand_inputs(options.prompts)
    wanted = plan_options(options, images_per_shard or PLANNING_SHARD_SIZE)
    with tempfile.TemporaryDirectory(prefix="millijoule-dry-run-") as scratch:
        plan_store = open_store(scratch)
        plan = plan_job(files, wanted, plan_store, {})
        index = load_shard_index(plan_store, compute_fingerprint(files, wanted, {}))
        requests: list[ImageRequest] = []
        for shard in index:
            requests += shard_requests(read_shard_rows(plan_store, shard), options.seed)
            if len(requests) >= CALIBRATION_IMAGES:
                break
    request = WorkerRequest(options)
    pool = request.decide()
    result = run_calibration(options, identity, requests[:CALIBRATION_IMAGES], pool)
    workers = max(1, min(pool.max_workers, plan.n_shards))
    per_image = result.seconds / max(1, result.images)
    total_s = plan.n_images * per_image / workers
    lines = [
        f"prompts     {plan.n_rows} usable, {plan.n_bad_rows} rejected",
        f"images      {plan.n_images} in {plan.n_shards} shards",
        f"model       {identity.name} ({identity.sha256[:12]})",
        f"device      {request.device}",
        f"calibrated  {result.images} images in {result.seconds:.2f} s on one worker",
        f"time        about {clock(total_s)} on {workers} workers, start-up not counted",
        f"bytes       about {plan.n_images * result.encoded_bytes // max(1, result.images)} of images in {store.url}",
        *_energy_lines(options, result, plan.n_images),
        *_node_meter_lines(options),
    ]
    if seconds_per_shard is not None:
        lines.append(f"shard size  about {max(1, round(seconds_per_shard / per_image))} images")
    print(visible_lines("\n".join(lines)))
    return COMPLETE


def _energy_lines(options: GenerateOptions, result: Calibration, n_images: int) -> list[str]:
    from millijoule.jobs.set_up.job import caps

    measured = result.energy_mj is not None
    energy_mj = result.energy_mj if measured else result.energy_estimate_mj
    if energy_mj is None or not result.images:
        return ["energy      unknown: no counter and no estimate on the worker's node"]
    how = f"measured, {result.energy_method}" if measured else "modelled from CPU time, not measured"
    per_image = energy_mj / result.images
    kwh = per_image * n_images / MJ_PER_KWH
    lines = [f"energy      about {joules(per_image)} per image, {kwh:.3g} kWh in all ({how})"]
    limits = caps(options)
    if limits.price is not None:
        cost = kwh * limits.pue * limits.price.at(time.time())
        lines.append(f"cost        about {cost:.3g} for electricity, at today's price and PUE {limits.pue:g}")
    else:
        lines.append("cost        give --price-per-kwh for an estimate")
    return lines


def _node_meter_lines(options: GenerateOptions) -> list[str]:
    """Each node's meter, asked once."""
    configs = parse_node_meters(options.node_meter, options.node_rest)
    if not configs:
        return []
    lines = []
    for look in look_once(configs)[:MAX_NODES_SHOWN]:
        said = [
            f"{r.value / MW_PER_W:,.0f} W"
            if r.quantity == "power"
            else f"{r.value / MJ_PER_KWH:,.3f} kWh so far"
            for r in {r.source: r for r in look.readings}.values()
        ]
        answer = ", ".join(said) or f"cannot be read: {look.failure}"
        lines.append(f"node meter  {look.host}{f' ({look.meter})' if look.meter else ''}: {answer}")
    if any(c.rest is None for c in configs):
        lines.append("            rest of the node not declared: no node with such a meter can close (C3)")
    return lines


def calibrate(options: GenerateOptions, identity: ModelIdentity, pool: PoolOptions) -> Calibration:
    """A calibration on requests made up for it, for callers that have no plan yet."""
    requests = [ImageRequest(f"calibration-{i}", 0, "", seed=i) for i in range(CALIBRATION_IMAGES)]
    return run_calibration(options, identity, requests, pool)


def run_calibration(
    options: GenerateOptions, identity: ModelIdentity, requests: list[ImageRequest], pool: PoolOptions
) -> Calibration:
    """Start one worker as the job would, with what `pool` says one asks for, draw `requests`, end it.

    Raises:
        InputError: the model cannot be loaded on the worker's node.
    """
    config = WorkerConfig(
        output_url="",
        fingerprint="",
        job_seed=options.seed,
        output_format=options.format,
        model=options.model,
        model_sha256=identity.sha256,
        driver_epoch=0,
        batch_size=options.batch_size,
        cpu_threads=max(1, int(pool.cpus_per_worker)),
        telemetry=options.telemetry,
    )
    actor = (
        remote_worker_class()
        .options(
            num_cpus=pool.cpus_per_worker, num_gpus=pool.gpus_per_worker, resources=pool.resources or None
        )
        .remote("calibration", config)
    )
    try:
        started = actor.start.remote()
        asked = {"CPU": pool.cpus_per_worker, "GPU": pool.gpus_per_worker, **pool.resources}
        while not ray.wait([started], timeout=CAPACITY_NOTICE_S)[0]:
            log.warning("waiting for a worker to draw a few images on: it asks for %s", words(asked))
        ray.get(started)
        return ray.get(actor.calibrate.remote(requests))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if error.cause is not None else error from error
    finally:
        ray.kill(actor)
