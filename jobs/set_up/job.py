"""From options to a planned job: checks, model, plan or resume."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from millijoule.jobs.node_meter_options import parse_node_meters
from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.autoscaling import words
from millijoule.jobs.set_up.worker_device import WorkerDevice, check_device_options, choose_device
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import (
    JobSpec,
    check_same_job,
    publish_job,
    read_job,
    software_version,
)
from millijoule.pipeline.planning.plan import PlanOptions, compute_fingerprint, plan_job
from millijoule.pipeline.planning.retry import load_job_shards, plan_retry
from millijoule.pipeline.running.pool import PoolOptions
from millijoule.pipeline.running.run import PlannedJob
from millijoule.pipeline.running.spending import Caps, parse_deadline
from millijoule.workers.errors import InputError, StoreError
from millijoule.workers.generators.protocol import ModelIdentity, describe_model
from millijoule.workers.layout import BAD_ROWS_KEY, SUCCESS_KEY
from millijoule.workers.storage.inputs import expand_inputs
from millijoule.workers.storage.protocol import Store

if TYPE_CHECKING:
    from millijoule.jobs.generate import GenerateOptions

log = logging.getLogger(__name__)

#: Words for delimiters that are hard to type.
DELIMITER_WORDS = {"comma": ",", "semicolon": ";", "pipe": "|", "tab": "\t", "\\t": "\t"}

#: A calibrated shard holds at least and at most this many images.
MIN_SHARD_IMAGES, MAX_SHARD_IMAGES = 16, 100_000


def validate(options: GenerateOptions) -> None:
    """Refuse what cannot work, before Ray starts.

    Raises:
        InputError: an option means nothing, no prompt file matches, or the model is not one; the message names it.
    """
    if options.images_per_prompt < 1:
        raise InputError(f"--images-per-prompt {options.images_per_prompt}: at least 1")
    if not 0 <= options.seed < 2**63:
        raise InputError(f"--seed {options.seed}: from 0 to 2**63 - 1")
    check_device_options(options)
    if options.cpus_per_worker < 0:
        raise InputError(f"--cpus-per-worker {options.cpus_per_worker:g}: 0 or more")
    if options.cpus_per_worker == 0 and not options.gpus_per_worker and options.device != "gpu":
        raise InputError("--cpus-per-worker 0: a worker needs a CPU or a GPU")
    if options.lease_seconds < 1:
        raise InputError(f"--lease-seconds {options.lease_seconds}: at least 1")
    if options.batch_size is not None and options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: at least 1")
    if options.node_meter is not None and not options.telemetry:
        raise InputError("--node-meter and --no-telemetry exclude each other: give one of them")
    caps(options)
    images, _ = parse_shard_size(options.shard_size)
    plan_options(options, images or MIN_SHARD_IMAGES)
    parse_workers(options.workers)
    parse_resources(options.resources)
    parse_node_meters(options.node_meter, options.node_rest)
    expand_inputs(options.prompts)
    describe_model(options.model)


def caps(options: GenerateOptions) -> Caps:
    """The limits that `options` set; raises InputError."""
    for name in ("max_kwh", "max_cost", "max_gco2"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value}: a number, 0 or more")
    rates = options.rates.read()
    if options.max_cost is not None and rates.price is None:
        raise InputError("--max-cost needs --price-per-kwh")
    if options.max_gco2 is not None and rates.carbon is None:
        raise InputError("--max-gco2 needs --gco2-per-kwh")
    return Caps(
        max_kwh=options.max_kwh,
        max_cost=options.max_cost,
        max_gco2=options.max_gco2,
        deadline_unix=None if options.deadline is None else parse_deadline(options.deadline, time.time()),
        price=rates.price,
        carbon=rates.carbon,
        pue=rates.pue or 1.0,
    )


def parse_shard_size(text: str) -> tuple[int | None, float | None]:
    """`"256"` -> (256, None) images; `"60s"` -> (None, 60.0) seconds; raises InputError."""
    if re.fullmatch(r"[0-9]+", text) and int(text) >= 1:
        return int(text), None
    if match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)s", text):
        seconds = float(match[1])
        if seconds > 0:
            return None, seconds
    raise InputError(f"--shard-size {text}: a number of images such as 256, or a duration such as 60s")


def parse_workers(text: str) -> tuple[int, int] | None:
    """`"4"` -> (4, 4); `"0:8"` -> (0, 8); `"auto"` -> None; raises InputError."""
    if text == "auto":
        return None
    if match := re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text):
        least = int(match[1])
        most = int(match[2]) if match[2] is not None else least
        if most >= max(1, least):
            return least, most
    raise InputError(f"--workers {text}: a number such as 4, a range such as 0:8, or auto")


def parse_resources(pairs: tuple[str, ...]) -> dict[str, float]:
    """`("spot=1",)` -> {"spot": 1.0}; raises InputError."""
    resources = {}
    for pair in pairs:
        name, _, amount = pair.partition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            resources[name] = 0.0
        if name in ("CPU", "GPU"):
            raise InputError(f"--resources {pair}: give --{name.lower()}s-per-worker instead")
        if not name or resources[name] <= 0:
            raise InputError(f"--resources {pair}: NAME=AMOUNT with an amount over 0, such as spot=1")
    return resources


class WorkerRequest:
    """What workers ask the cluster for. Decided once, so that a calibration and its job run on the same kind of device.

    `device` is None until it is decided.
    """

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.device: WorkerDevice | None = None
        self.resources = parse_resources(options.resources)

    def decide(self, has_work: Callable[[], bool] = lambda: True) -> PoolOptions:
        """How many workers and what each asks for, given the cluster this process is connected to.

        Args:
            has_work: whether a node that the question starts (`autoscaling.prospect`) would have something to do; without
                work what cannot be known unasked stays undecided, and no worker will ask for anything.

        Raises:
            InputError: see `choose_device`.
        """
        options = self.options
        cpus = {"CPU": options.cpus_per_worker}
        if self.device is None:
            self.device = choose_device(options, {**cpus, **self.resources}, has_work=has_work)
            if self.device is None:
                return PoolOptions(0, 1, options.cpus_per_worker, 0.0, self.resources)
            log.info("device: %s", self.device)
        gpus = self.device.gpus
        room = ray_cluster.room({**cpus, **self.resources, "GPU": gpus})
        if not room and ray_cluster.is_own(options.ray_address):
            asked = {**cpus, **self.resources, "GPU": gpus}
            raise InputError(
                f"this machine has no room for a worker that asks for {words(asked)}; lower --cpus-per-worker, "
                "--gpus-per-worker or --resources, or give --ray-address of a larger cluster"
            )
        bounds = parse_workers(options.workers)
        if bounds is None:
            bounds = (0, self.device.to_come or max(1, room))
            if self.device.to_come:
                log.info(
                    "workers: up to %d on nodes to come, as far as there is work; --workers 0:N sets another bound",
                    bounds[1],
                )
        return PoolOptions(*bounds, options.cpus_per_worker, gpus, self.resources, at_once=room)


def has_work(store: Store, planned: PlannedJob) -> bool:
    """Whether shards of the job are left to do."""
    return not list_committed(store, len(planned.shards)).all()


def parse_delimiter(text: str | None) -> str | None:
    """`"semicolon"` or `";"` -> ";"; raises InputError."""
    if text is None or len(text) == 1:
        return text
    if text.lower() in DELIMITER_WORDS:
        return DELIMITER_WORDS[text.lower()]
    raise InputError(f"--delimiter {text}: one character, or {', '.join(DELIMITER_WORDS)}")


def plan_options(options: GenerateOptions, shard_size: int) -> PlanOptions:
    return PlanOptions(
        shard_size=shard_size,
        images_per_prompt=options.images_per_prompt,
        duplicate_ids=options.duplicate_ids,
        prompt_column=options.prompt_column,
        delimiter=parse_delimiter(options.delimiter),
        max_prompt_chars=options.max_prompt_chars,
    )


def open_or_plan(options: GenerateOptions, store: Store, request: WorkerRequest) -> PlannedJob:
    """The job in `store`: the one that is there if it is the same, else a newly planned one. `request` is for a calibration.

    Raises:
        InputError: the inputs or the model cannot be used, or the output holds another job.
        StoreError: storage failed.
    """
    files = expand_inputs(options.prompts)
    info = describe_model(options.model)
    existing = read_job(store)
    images, seconds = parse_shard_size(options.shard_size)
    if images is None and existing is not None:
        images = existing.shard_size  # a calibration would not repeat; the first one counts
    if images is None:
        images = calibrated_shard_size(options, info, seconds or 0.0, request)
    wanted = plan_options(options, images)
    extra = {
        "model_sha256": info.sha256,
        "job_seed": options.seed,
        "output_format": options.format,
    }
    fingerprint = compute_fingerprint(files, wanted, extra)
    asked = {
        **extra,
        "model": options.model,
        "images_per_prompt": options.images_per_prompt,
        "shard_size": images,
        "duplicate_ids": options.duplicate_ids,
    }
    exclusive = _probe(store)
    if existing is not None:
        check_same_job(existing, fingerprint, asked, store.url)
        job = existing
    else:
        _refuse_foreign_output(store)
        began = time.monotonic()
        plan = plan_job(files, wanted, store, extra, fingerprint=fingerprint)
        log.info(
            "planned: %d images of %d prompts, shards: %d (%.1f s)",
            plan.n_images,
            plan.n_rows,
            plan.n_shards,
            time.monotonic() - began,
        )
        if plan.n_bad_rows:
            log.warning("%d input rows rejected; %s says which and why", plan.n_bad_rows, BAD_ROWS_KEY)
        if plan.n_bad_rows:
            store.put(BAD_ROWS_KEY, store.get(plan.bad_rows_key))
        job = publish_job(
            store,
            JobSpec(
                fingerprint=fingerprint,
                model=options.model,
                model_name=info.name,
                model_sha256=info.sha256,
                job_seed=options.seed,
                images_per_prompt=options.images_per_prompt,
                output_format=options.format,
                shard_size=images,
                duplicate_ids=options.duplicate_ids,
                prompts=options.prompts,
                rows=plan.n_rows,
                images=plan.n_images,
                shards=plan.n_shards,
                bad_rows=plan.n_bad_rows,
                created_unix=time.time(),
                millijoule_version=software_version(),
            ),
        )
    if options.retry_failed:
        if existing is None:
            raise InputError(f"--retry-failed: {store.url} holds no job yet")
        rows = plan_retry(store, job)
        log.info("retrying %d quarantined images", rows)
    shards = load_job_shards(store, job)
    if existing is not None:
        log.info("continuing the job in %s", store.url)
    return PlannedJob(job, shards, exclusive)


def calibrated_shard_size(
    options: GenerateOptions, info: ModelIdentity, seconds: float, request: WorkerRequest
) -> int:
    """Images that take about `seconds` on one worker, by a short run on a worker of this cluster."""
    from millijoule.jobs.set_up.dry_run import calibrate

    result = calibrate(options, info, request.decide())
    per_image = result.seconds / max(1, result.images)
    return max(MIN_SHARD_IMAGES, min(MAX_SHARD_IMAGES, round(seconds / per_image)))


def _probe(store: Store) -> bool:
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


def _refuse_foreign_output(store: Store) -> None:
    """An output with results but without a job description is somebody's data; planning over it would mix them."""
    if store.exists(SUCCESS_KEY):
        raise InputError(f"{store.url}: has a {SUCCESS_KEY} but no job description; choose another --output")
