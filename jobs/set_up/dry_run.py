"""`--dry-run`: plan without touching the output, draw a few images on a real worker, extrapolate."""

from __future__ import annotations

import tempfile
import time

from millijoule.jobs.models import describe_obtained, words_of
from millijoule.jobs.set_up.calibration import CALIBRATION_IMAGES, calibrate
from millijoule.jobs.set_up.job import check_is_asked_for, no_job_to_retry
from millijoule.jobs.set_up.pools import pools_on
from millijoule.jobs.set_up.pools_forecast import pool_lines
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import JobRequest
from millijoule.jobs.set_up.worker_device import choose_device, pool_options
from millijoule.pipeline.energy.carbon import MJ_PER_KWH
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import read_job
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan import Plan, load_plan
from millijoule.pipeline.planning.retry_rounds import JobShards, foresee_retry, load_job_shards
from millijoule.pipeline.running.node_recorders import look_once
from millijoule.pipeline.running.progress import clock, joules
from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError
from millijoule.workers.layout import SUCCESS_KEY
from millijoule.workers.lease import Calibration
from millijoule.workers.node_meters.meter import MW_PER_W
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.shard_rows import read_shard_rows, shard_requests
from millijoule.workers.storage.open import open_store
from millijoule.workers.visible_text import visible_lines

#: Nodes whose meters a dry run lists.
MAX_NODES_SHOWN = 32


def dry_run(request: JobRequest, cluster: Cluster) -> Plan:
    """Print what the job would be and take. Writes nothing to the output; returns the plan."""
    plan, images, made = (_retried if request.options.retry_failed else _planned)(request)
    head = [f"prompts     {plan.n_rows} usable, {plan.n_bad_rows} rejected", made, *_model_lines(request)]
    if not images:
        print(visible_lines("\n".join([*head, f"output      {_output_words(request)}"])))
        return plan
    if pools := pools_on(request, cluster):
        lines = pool_lines(request, pools, images[:CALIBRATION_IMAGES], plan.n_images, plan.n_shards)
        lines.append(f"output      {_output_words(request)}")
        print(visible_lines("\n".join([*head, *lines, *_node_meter_lines(request)])))
        return plan
    device = choose_device(request, cluster)
    pool = pool_options(request, device, cluster)
    result = calibrate(request, images[:CALIBRATION_IMAGES], pool)
    workers = max(1, min(pool.max_workers, plan.n_shards))
    drawn, ranks = max(1, result.images), request.model.ranks
    per_image = result.seconds / drawn
    lines = [
        *head,
        f"device      {device}",
        *(
            [f"ranks       {ranks} in each worker" + (", one per GPU" if pool.gpus_per_worker else "")]
            if ranks > 1
            else []
        ),
        f"calibrated  {counted(result.images, 'image')} in {result.seconds:.2f} s on one worker",
        f"time        about {clock(plan.n_images * per_image / workers)} on {counted(workers, 'worker')}, start-up not counted",
        f"bytes       about {plan.n_images * result.encoded_bytes // drawn} of images in {request.options.output}",
        f"output      {_output_words(request)}",
        *_energy_lines(request, result, plan.n_images),
        *_node_meter_lines(request),
    ]
    if request.shard_seconds is not None:
        lines.append(
            f"shard size  about {counted(max(1, round(request.shard_seconds / per_image)), 'image')}"
        )
    print(visible_lines("\n".join(lines)))
    return plan


def _planned(request: JobRequest) -> tuple[Plan, list[ImageRequest], str]:
    """The whole job, planned in a scratch folder, its first images, and what would be made in words."""
    with tempfile.TemporaryDirectory(prefix="millijoule-dry-run-") as scratch:
        store = open_store(scratch)
        plan = plan_job(request.files, request.plan, store, {})
        _, table = load_plan(store, plan.fingerprint)
        images: list[ImageRequest] = []
        shards = JobShards(plan.fingerprint, table)
        for shard in shards:
            images += shard_requests(read_shard_rows(store, shard), request.options.seed)
            if len(images) >= CALIBRATION_IMAGES:
                break
    return plan, images, f"images      {plan.n_images:,} in {counted(plan.n_shards, 'shard')}"


def _retried(request: JobRequest) -> tuple[Plan, list[ImageRequest], str]:
    """The same of what `--retry-failed` would make of the job in the output; it may be nothing.

    Raises:
        InputError: there is no job, or another one.
    """
    store = open_store(request.options.output)
    job = read_job(store)
    if job is None:
        raise no_job_to_retry(store)
    check_is_asked_for(request.as_begun(job), job, store)
    ahead = foresee_retry(store, job, CALIBRATION_IMAGES)
    plan = Plan(job.fingerprint, job.rows, ahead.images, job.bad_rows, ahead.shards, n_parts=0)
    made = f"retry       {_amount(plan) if plan.n_images else 'no image stands quarantined'}"
    if ahead.unfinished:
        made = f"to finish   {_amount(plan)}; nothing is retried before that is done"
    return plan, shard_requests(ahead.rows, job.job_seed), made


def _amount(plan: Plan) -> str:
    return f"{counted(plan.n_images, 'image')} in {counted(plan.n_shards, 'shard')}"


def _output_words(request: JobRequest) -> str:
    """What is in the output already."""
    url = request.options.output
    try:
        store = open_store(url)
        existing = read_job(store)
        if existing is None:
            other = store.exists(SUCCESS_KEY)
            return (
                f"{url} has a {SUCCESS_KEY} but no job: generate will refuse it"
                if other
                else f"{url}, no job yet"
            )
        check_is_asked_for(request.as_begun(existing), existing, store)
    except InputError as error:
        return f"generate will refuse it: {error}"
    shards = load_job_shards(store, existing)
    return f"{url} holds this job: {int(list_committed(store, len(shards)).sum())} of {len(shards)} shards are done"


def _model_lines(request: JobRequest) -> list[str]:
    """What the model is, and what of it will not work."""
    return words_of(describe_obtained(request.source))


def _energy_lines(request: JobRequest, result: Calibration, n_images: int) -> list[str]:
    measured = result.energy_mj is not None
    energy_mj = result.energy_mj if measured else result.energy_estimate_mj
    if energy_mj is None or not result.images:
        return ["energy      unknown: no counter and no estimate on the worker's node"]
    how = f"measured, {result.energy_method}" if measured else "modelled from CPU time, not measured"
    per_image = energy_mj / result.images
    kwh = per_image * n_images / MJ_PER_KWH
    lines = [f"energy      about {joules(per_image)} per image, {kwh:.3g} kWh in all ({how})"]
    price, pue = request.caps.price, request.caps.pue
    if price is None:
        return [*lines, "cost        give --price-per-kwh for an estimate"]
    cost = kwh * pue * price.at(time.time())
    return [*lines, f"cost        about {cost:.3g} for electricity, at today's price and PUE {pue:g}"]


def _node_meter_lines(request: JobRequest) -> list[str]:
    """Each node's meter, asked once."""
    if not request.node_meters:
        return []
    lines = []
    for look in look_once(request.node_meters)[:MAX_NODES_SHOWN]:
        said = [
            f"{r.value / MW_PER_W:,.0f} W"
            if r.quantity == "power"
            else f"{r.value / MJ_PER_KWH:,.3f} kWh so far"
            for r in {r.source: r for r in look.readings}.values()
        ]
        answer = ", ".join(said) or f"cannot be read: {look.failure}"
        lines.append(f"node meter  {look.host}{f' ({look.meter})' if look.meter else ''}: {answer}")
    if any(meter.rest is None for meter in request.node_meters):
        lines.append("            rest of the node not declared: no node with such a meter can close (C3)")
    return lines
