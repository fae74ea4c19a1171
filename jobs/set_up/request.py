"""What a job is asked to be: options read and checked once, before Ray starts. Everything after takes the request."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace
from typing import Any

from millijoule.jobs.options.node_meters import parse_node_meters
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.pool_words import LEAST_SHARE, PoolWords, pools_identity, read_pools, with_models
from millijoule.pipeline.output.job import JobSpec, read_job, this_epoch
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.running.spending import Caps, parse_deadline
from millijoule.pipeline.telemetry.collector import check_endpoint
from millijoule.workers import factories
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import ModelIdentity
from millijoule.workers.generators.registry import PACKAGED, usual_shard_images
from millijoule.workers.images.formats import ImageFormat, read_image_format
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.ranks.check import check_ranks
from millijoule.workers.sources.obtain import ObtainedModel
from millijoule.workers.sources.words import find_place
from millijoule.workers.storage.inputs import InputFile, expand_inputs
from millijoule.workers.storage.open import open_store

#: Words for delimiters that are hard to type.
DELIMITER_WORDS = {"comma": ",", "semicolon": ";", "pipe": "|", "tab": "\t", "\\t": "\t"}


@dataclass(frozen=True)
class JobRequest:
    """One job, as asked for: the options, and what those that are text, or name something else, stand for.

    `files` are what the prompts stood for when the request was made, `source` what the model did, `image_format` what images are
    encoded as.
    Where `shard_seconds` is given, `plan.shard_size` only stands in until a calibration. `resources` are the custom ones a
    worker asks for, by Ray's names; `bounds` the (fewest, most) workers, None: auto.
    """

    options: GenerateOptions
    files: tuple[InputFile, ...]
    source: ObtainedModel
    image_format: ImageFormat
    plan: PlanOptions
    shard_seconds: float | None
    resources: dict[str, float]
    bounds: tuple[int, int] | None
    caps: Caps
    node_meters: tuple[NodeMeterConfig, ...]
    otlp_endpoint: str | None = None  # where metrics are sent, with its path
    pools: tuple[PoolWords, ...] = ()

    def as_begun(self, job: JobSpec) -> JobRequest:
        """To go on with `job`: what was left to the program is as it was chosen then."""
        if parse_shard_size(self.options.shard_size)[0] is not None:
            return self
        return replace(self, plan=replace(self.plan, shard_size=job.shard_size))

    @property
    def identity(self) -> ModelIdentity:
        """What tells the model from others."""
        return self.source.identity

    @property
    def model(self) -> GeneratorOptions:
        """How the model is loaded and run."""
        return self.source.options

    def model_identity(self) -> dict[str, Any]:
        """What of how the model is run, by any pool, tells the job apart."""
        return self.model.identity() | pools_identity(self.pools, self.model)


def request_of(options: GenerateOptions) -> JobRequest:
    """Read `options`.

    Raises:
        InputError: an option, or a variable of the environment that says which attempt this is, means nothing, no prompt file matches,
            or the model is not one; the message names it.
    """
    this_epoch(os.environ)  # refused before a model is fetched or a node asked for
    for name in ("images_per_prompt", "lease_seconds", "max_prompt_chars"):
        value = getattr(options, name)
        if value is not None and not 1 <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1")
    if not 0 <= options.part_seconds < float("inf"):
        raise UsageError(f"--part-seconds {options.part_seconds}: 0 or more")
    if not 0 <= options.seed < 2**63:
        raise UsageError(f"--seed {options.seed}: from 0 to 2**63 - 1")
    if options.node_meter is not None and not options.telemetry:
        raise UsageError("--node-meter and --no-telemetry exclude each other: give one of them")
    if options.otlp is not None and not options.telemetry:
        raise UsageError("--otlp and --no-telemetry exclude each other: give one of them")
    otlp_endpoint = None if options.otlp is None else check_endpoint(options.otlp)
    _check_workers(options)
    pools = read_pools(options)
    images, seconds = parse_shard_size(options.shard_size)
    files = tuple(expand_inputs(options.prompts))  # what costs nothing is refused first
    source = options.model_options.obtain(
        options.model, _begun_with(options), on_gpu={"cpu": False, "gpu": True}.get(options.device)
    )
    source = with_ranks(options, source)
    if pools and source.options.ranks > 1:
        raise InputError("--pool: a worker of a pool is one process; this model asks for several ranks")
    return JobRequest(
        options=options,
        resources=parse_resources(options.resources),
        bounds=parse_workers(options.workers),
        caps=caps_of(options),
        plan=PlanOptions(
            shard_size=images or usual_shard_images(source.model),
            images_per_prompt=options.images_per_prompt,
            duplicate_ids=options.duplicate_ids,
            prompt_column=options.prompt_column,
            delimiter=parse_delimiter(options.delimiter),
            max_prompt_chars=options.max_prompt_chars,
            loras=tuple((choice.name, choice.weight) for choice in source.options.loras),
        ),
        shard_seconds=seconds,
        node_meters=parse_node_meters(options.node_meter, options.node_rest),
        otlp_endpoint=otlp_endpoint,
        files=files,
        source=source,
        image_format=read_image_format(options.image_format, options.quality),
        pools=with_models(pools, options, source),
    )


def _begun_with(options: GenerateOptions) -> str | None:
    """The commit of the hub's model with which the job in the output began: a branch may have moved since."""
    if options.model in PACKAGED or options.model.startswith(factories.PREFIX):
        return None
    if options.model_options.revision or find_place("--model", options.model).kind != "hub":
        return None
    job = read_job(open_store(options.output))
    return job.model_revision if job is not None and job.model == options.model else None


def _check_workers(options: GenerateOptions) -> None:
    """Refuse what contradicts itself."""
    gpus, cpus = options.gpus_per_worker, options.cpus_per_worker
    if gpus is not None and not 0 <= gpus < float("inf"):
        raise UsageError(f"--gpus-per-worker {gpus:g}: 0 or more")
    if gpus and gpus < LEAST_SHARE:
        raise UsageError(f"--gpus-per-worker {gpus:g}: 0, or {LEAST_SHARE:g} or more")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise UsageError(f"--gpus-per-worker {gpus:g}: above 1 whole GPUs only")
    if options.device == "cpu" and gpus:
        raise UsageError(f"--device cpu and --gpus-per-worker {gpus:g} exclude each other: give one of them")
    if options.device == "gpu" and gpus == 0:
        raise UsageError("--device gpu and --gpus-per-worker 0 exclude each other: give one of them")
    if (ranks := options.ranks_per_worker) is not None:
        if ranks < 1:
            raise UsageError(f"--ranks-per-worker {ranks}: at least 1")
        if gpus and ranks > 1 and gpus != ranks:
            raise UsageError(
                f"--ranks-per-worker {ranks} and --gpus-per-worker {gpus:g}: each rank has one GPU of its own; "
                "give the same number"
            )
        if (options.device == "cpu" or gpus == 0) and 1 < ranks > cpus:
            raise too_few_cpus(ranks)
    if cpus != 0 and not LEAST_SHARE <= cpus < float("inf"):
        raise UsageError(f"--cpus-per-worker {cpus:g}: 0, or {LEAST_SHARE:g} or more")
    if cpus == 0 and not gpus and options.device != "gpu":
        raise UsageError("--cpus-per-worker 0: a worker needs a CPU or a GPU")


def too_few_cpus(ranks: int) -> InputError:
    """Of a worker on CPUs with so many ranks."""
    return UsageError(
        f"--ranks-per-worker {ranks}: on CPUs each rank needs one; give --cpus-per-worker {ranks}"
    )


def with_ranks(options: GenerateOptions, source: ObtainedModel) -> ObtainedModel:
    """`source`, to be spread over the ranks that `options` ask for.

    Raises:
        InputError: it cannot be spread, or not with these options.
    """
    ranks = options.ranks_per_worker
    if ranks is None:
        ranks = max(1, int(options.gpus_per_worker or 0))
        if options.model.startswith(factories.PREFIX):
            ranks = 1  # it may use several devices in its own way
    source = replace(source, options=replace(source.options, ranks=ranks))
    check_ranks(source.model, source.options)
    return source


def caps_of(options: GenerateOptions) -> Caps:
    """The limits that `options` set, a deadline's duration counting from now; raises InputError."""
    for name in ("max_kwh", "max_cost", "max_gco2"):
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} {value}: a number, 0 or more")
    rates = options.rates.read()
    if options.max_cost is not None and rates.price is None:
        raise UsageError("--max-cost needs --price-per-kwh")
    if options.max_gco2 is not None and rates.carbon is None:
        raise UsageError("--max-gco2 needs --gco2-per-kwh")
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
    """`"256"` -> (256, None) images; `"60s"` -> (None, 60.0) seconds; `"auto"` -> (None, None); raises InputError."""
    if text == "auto":
        return None, None
    match = re.fullmatch(r"([0-9]+)|([0-9]+(?:\.[0-9]+)?)s", text)
    if match and match[1] and int(match[1]) >= 1:
        return int(match[1]), None
    if match and match[2] and float(match[2]) > 0:
        return None, float(match[2])
    raise UsageError(f"--shard-size {text}: a number of images such as 256, a duration such as 60s, or auto")


def parse_workers(text: str) -> tuple[int, int] | None:
    """`"4"` -> (4, 4); `"0:8"` -> (0, 8); `"auto"` -> None; raises InputError."""
    if text == "auto":
        return None
    if match := re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text):
        fewest = int(match[1])
        most = int(match[2] or fewest)
        if most >= max(1, fewest):
            return fewest, most
    raise UsageError(f"--workers {text}: a number such as 4, a range such as 0:8, or auto")


def parse_resources(pairs: tuple[str, ...]) -> dict[str, float]:
    """`("spot=1",)` -> {"spot": 1.0}; raises InputError."""
    resources = {}
    for pair in pairs:
        name, _, amount = pair.partition("=")
        if name in ("CPU", "GPU"):
            raise UsageError(f"--resources {pair}: give --{name.lower()}s-per-worker instead")
        if name in ("memory", "object_store_memory"):
            raise UsageError(f"--resources {pair}: Ray takes only custom resources here, such as spot=1")
        try:
            resources[name] = float(amount)
        except ValueError:
            resources[name] = 0.0
        if not name or not LEAST_SHARE <= resources[name] < float("inf"):
            raise UsageError(
                f"--resources {pair}: NAME=AMOUNT with an amount of {LEAST_SHARE:g} or more, such as spot=1"
            )
    return resources


def parse_delimiter(text: str | None) -> str | None:
    """`"semicolon"` or `";"` -> ";"; raises InputError."""
    if text is None or len(text) == 1:
        return text
    if text.lower() in DELIMITER_WORDS:
        return DELIMITER_WORDS[text.lower()]
    raise UsageError(f"--delimiter {text}: one character, or {', '.join(DELIMITER_WORDS)}")
