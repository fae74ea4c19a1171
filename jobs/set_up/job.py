"""From a request to a planned job and its workers' options: model, plan or resume, device."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from importlib.metadata import version

from millijoule.jobs.set_up.calibration import calibrated_pools, calibrated_shard_size
from millijoule.jobs.set_up.model_rungs import check_device
from millijoule.jobs.set_up.pools import pools_on, together
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import JobRequest
from millijoule.jobs.set_up.worker_device import choose_device, pool_options
from millijoule.pipeline.fleet.pools import Pool
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import (
    JobSpec,
    check_not_superseded,
    check_same_job,
    publish_job,
    read_job,
    this_epoch,
)
from millijoule.pipeline.planning.make_plan import plan_job
from millijoule.pipeline.planning.plan_options import compute_fingerprint
from millijoule.pipeline.planning.retry_rounds import load_job_shards, plan_retry_round
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.run import PlannedJob
from millijoule.workers.counted import counted
from millijoule.workers.errors import InputError, StoreError
from millijoule.workers.factories import check_importable
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.layout import BAD_ROWS_KEY, SUCCESS_KEY, plan_bad_rows_key
from millijoule.workers.sources.copies import put_copy
from millijoule.workers.sources.obtain import ObtainedModel
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)


def set_up_job(
    request: JobRequest, store: Store, cluster: Cluster
) -> tuple[PlannedJob, PoolOptions, tuple[Pool, ...]]:
    """The job in `store`, planned if it is not there yet, what its workers ask for, and its pools if it has any.

    A new job is described last, once nothing is left that this side could refuse: until then the output holds none, and a
    command that was mistyped can be corrected.

    Raises:
        InputError: as `open_or_plan` and `choose_device`.
        SupersededError: this is a scheduler's retry, and another run has taken the job over since.
        StoreError: storage failed.
    """
    existing, device = read_job(store), None
    if existing is not None:
        check_not_superseded(store, this_epoch(os.environ))  # before anything is asked of the cluster
    pools = pools_on(request, cluster)
    if existing is not None:
        request = request.as_begun(existing)
    elif cluster.own:
        check_importable("--model", request.source.model)
    if existing is None and (seconds := request.shard_seconds) is not None:
        request = replace(request, source=within_reach(request.source, store, cluster))
        if pools:
            images, pools = calibrated_pools(request, seconds, pools)
        else:
            device = choose_device(request, cluster)
            images = calibrated_shard_size(request, seconds, pool_options(request, device, cluster))
        request = replace(request, plan=replace(request.plan, shard_size=images))
    planned = open_or_plan(request, store, existing)
    if pools:
        for pool in pools:
            check_device(request.source, pool.model, on_gpu=bool(pool.options.gpus_per_worker))
        workers = together(pools)
    else:
        if device is None:  # a calibration and its job run on the same kind of device
            device = choose_device(
                request, cluster, has_work=lambda: not list_committed(store, len(planned.shards)).all()
            )
        if device is not None:  # what a model cannot do on it is said before a worker starts
            check_device(request.source, on_gpu=bool(device.gpus))
        workers = pool_options(request, device, cluster)
    if existing is None:
        # what may take long, and may be stopped, comes before, too
        within_reach(request.source, store, cluster)
        planned = begin(store, planned)
    return planned, workers, pools


def within_reach(source: ObtainedModel, store: Store, cluster: Cluster) -> ObtainedModel:
    """`source` with its files in the job's output, unless all workers run on this machine or fetch them elsewhere.

    Raises:
        StoreError: storage failed.
    """
    if cluster.own:
        return source
    return replace(source, copies=tuple(c if c.url else put_copy(store, c) for c in source.copies))


def open_or_plan(request: JobRequest, store: Store, existing: JobSpec | None) -> PlannedJob:
    """The job in `store`: `existing` if it is the one that `request` asks for, else a newly planned one, which `begin` begins.

    Raises:
        InputError: the prompt files cannot be used, or the output holds another job.
        StoreError: storage failed.
    """
    options = request.options
    extra = _identity(request)
    fingerprint = compute_fingerprint(request.files, request.plan, extra)
    exclusive = _probe(store)
    if existing is not None:
        check_is_asked_for(request, existing, store)
        log.info("continuing the job in %s", store.url)
        job = existing
        if job.bad_rows and not store.exists(BAD_ROWS_KEY):  # its driver was killed when it began the job
            _show_bad_rows(store, job)
    else:
        if store.exists(SUCCESS_KEY):  # somebody's data: planning over it would mix them
            raise InputError(
                f"{store.url}: has a {SUCCESS_KEY} but no job description; choose another --output"
            )
        if options.retry_failed:
            raise no_job_to_retry(store)
        job = _plan(request, store, extra, fingerprint)
    if options.retry_failed:
        retry_failed(store, job)
    return PlannedJob(job, load_job_shards(store, job), exclusive)


def begin(store: Store, planned: PlannedJob) -> PlannedJob:
    """Describe a new job in its output, which holds it from then on.

    Raises:
        InputError: another job was put there meanwhile.
        StoreError: storage failed.
    """
    job = publish_job(store, planned.job)
    if job.bad_rows:
        _show_bad_rows(store, job)
    return replace(planned, job=job)


def _show_bad_rows(store: Store, job: JobSpec) -> None:
    """Put the rejected rows where people look for them."""
    store.put(BAD_ROWS_KEY, store.get(plan_bad_rows_key(job.fingerprint)))


def retry_failed(store: Store, job: JobSpec) -> None:
    """Begin a round for quarantined images where the job is finished, and say what it comes to."""
    retry = plan_retry_round(store, job)
    if retry.unfinished:
        # not an error: a scheduler starts the same command again when a round was interrupted
        log.warning(
            "--retry-failed: %d of %d shards, of the job or of an earlier retry, are not done yet: this run goes on with them and retries "
            "nothing else. When it is complete, the same command retries what then stands quarantined",
            *(retry.unfinished, retry.shards),
        )
    elif retry.images:
        log.info("retrying %s", counted(retry.images, "quarantined image"))
    else:
        log.info("--retry-failed: no image stands quarantined, so there is nothing to retry")


def no_job_to_retry(store: Store) -> InputError:
    return InputError(f"--retry-failed: {store.url} holds no job yet")


def check_is_asked_for(request: JobRequest, existing: JobSpec, store: Store) -> None:
    """Raise InputError, which names what differs, where `existing` is another job than `request` asks for."""
    extra = _identity(request)
    asked = {
        **extra,
        "model_options": request.model_identity(),
        "image_format": request.image_format.name,
        "image_quality": request.image_format.quality,
        "model": request.options.model,
        "model_name": request.identity.name,
        "images_per_prompt": request.plan.images_per_prompt,
        "shard_size": request.plan.shard_size,
        "duplicate_ids": request.plan.duplicate_ids,
    }
    check_same_job(existing, compute_fingerprint(request.files, request.plan, extra), asked, store)


def _identity(request: JobRequest) -> dict[str, object]:
    """What tells the job apart besides prompts and plan."""
    extra: dict[str, object] = {
        "model_sha256": request.identity.sha256,
        "job_seed": request.options.seed,
        "output_format": request.options.format,
    }
    # a job from before there were such options goes on
    if (images := request.image_format) != ImageFormat():
        extra |= {"image_format": images.name, "image_quality": images.quality}
    if said := request.model_identity():
        extra["model_options"] = said
    return extra


def _plan(request: JobRequest, store: Store, extra: dict[str, object], fingerprint: str) -> JobSpec:
    began = time.monotonic()
    options = request.options
    plan = plan_job(request.files, request.plan, store, extra, fingerprint=fingerprint)
    log.info(
        "planned: %s of %s, in %s (%.1f s)",
        *(counted(plan.n_images, "image"), counted(plan.n_rows, "prompt")),
        *(counted(plan.n_shards, "shard"), time.monotonic() - began),
    )
    if plan.n_bad_rows:
        log.warning("%s rejected; %s says which and why", counted(plan.n_bad_rows, "input row"), BAD_ROWS_KEY)
    return JobSpec(
        fingerprint=fingerprint,
        model=options.model,
        model_name=request.identity.name,
        model_sha256=request.identity.sha256,
        job_seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        output_format=options.format,
        image_format=request.image_format.name,
        image_quality=request.image_format.quality,
        model_options=request.model_identity(),
        model_revision=request.source.commit,
        shard_size=request.plan.shard_size,
        duplicate_ids=options.duplicate_ids,
        prompts=options.prompts,
        rows=plan.n_rows,
        images=plan.n_images,
        shards=plan.n_shards,
        bad_rows=plan.n_bad_rows,
        created_unix=time.time(),
        millijoule_version=version("millijoule"),
    )


def _probe(store: Store) -> bool:
    """Whether `store` has exclusive create; raises InputError where nothing can be written."""
    try:
        exclusive = store.probe_exclusive_create()
    except StoreError as error:
        if error.transient:
            raise
        raise InputError(f"--output {store.url}: nothing can be written there: {error}") from error
    if not exclusive:
        log.warning(
            "%s: this store has no exclusive create, so only the driver commits. Results stay exactly-once as long "
            "as one driver at a time works on this output: do not start a second one",
            store.url,
        )
    return exclusive
