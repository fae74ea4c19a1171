"""`--pool` and `--prefer`: what their words mean, before anything is known of a cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, get_args

from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.options import EngineName, GeneratorOptions
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.sources.obtain import ObtainedModel

#: Ray's label of an accelerator's type: a pool that names one gives each worker a GPU.
ACCELERATOR = "ray.io/accelerator-type"
FORM = "NAME:label=value,...:workers=MIN:MAX, then any of batch=N engine=NAME optimize=PRESET|FILE gpus=X cpus=X price=X images_per_s=X joules=X, with : between"
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
#: As Kubernetes and Ray have them.
_LABEL = re.compile(r"([A-Za-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
#: Ray counts in ten-thousandths of a CPU or a GPU.
LEAST_SHARE = 0.0001
_WORDS = ("batch", "engine", "optimize")
_NUMBERS = ("gpus", "cpus", "price", "images_per_s", "joules")


@dataclass(frozen=True)
class PoolWords:
    """One `--pool`, read; what is None is as for the job.

    `selectors` are sets of labels in order of preference, `optimize` a preset or its file, `model` what all that comes to (`with_models`).
    """

    name: str
    selectors: tuple[dict[str, str], ...]
    min_workers: int
    max_workers: int
    batch: int | None = None
    engine: EngineName | None = None
    optimize: str | None = None
    gpus: float | None = None
    cpus: float | None = None
    price: float | None = None
    images_per_s: float | None = None
    joules: float | None = None
    model: GeneratorOptions | None = None


def parse_pool(text: str) -> PoolWords:
    """`"spot:ray.io/accelerator-type=L4,ray.io/market-type=spot|on-demand:workers=0:8:batch=16"`; raises InputError."""

    def refuse(why: str) -> InputError:
        return UsageError(f"--pool {text}: {why}. The form is {FORM}")

    name, _, rest = text.partition(":")
    labels, _, rest = rest.partition(":")
    if not _NAME.fullmatch(name):
        raise refuse(
            f"{name!r} is no name: at most 40 small letters, digits and -, the first and the last no -"
        )
    if labels.partition("=")[0] in ("workers", *_WORDS, *_NUMBERS):
        raise refuse(f"{labels!r} stands where labels do; without any it is {name}::{labels}")
    selectors = _selectors(labels, refuse)
    fields: dict[str, str] = {}
    last = ""
    for part in rest.split(":") if rest else ():
        key, equals, value = part.partition("=")
        if not equals and last == "workers" and ":" not in fields["workers"]:
            fields["workers"] += f":{part}"
            continue
        if not equals or key not in ("workers", *_WORDS, *_NUMBERS):
            raise refuse(f"{part!r} is none of its parts")
        if key in fields:
            raise refuse(f"{key} stands twice")
        fields[key], last = value, key
    if "workers" not in fields:
        raise refuse("workers=MIN:MAX is missing")
    match = re.fullmatch(r"([0-9]{1,9})(?::([0-9]{1,9}))?", fields.pop("workers"))
    if match is None:
        raise refuse("workers is a number such as 4, or a range such as 0:8, of at most nine digits each")
    least, most = int(match[1]), int(match[2] or match[1])
    if most < max(1, least):
        raise refuse(f"workers={least}:{most} is empty")
    found: dict[str, float] = {}
    for key in _NUMBERS:
        if (given := fields.pop(key, None)) is not None:
            found[key] = _number(given)
            if not 0 <= found[key] < float("inf") or (key in ("images_per_s", "joules") and not found[key]):
                raise refuse(f"{key}={given} is no amount")
    for key in ("gpus", "cpus"):
        if 0 < found.get(key, 0) < LEAST_SHARE:
            raise refuse(f"{key}={found[key]:g} is less than {LEAST_SHARE:g}, the least that Ray counts")
    if found.get("gpus", 0) > 1:
        raise refuse("a worker of a pool has one GPU or a part of one")
    batch = fields.pop("batch", None)
    if batch is not None and not re.fullmatch(r"0*[1-9][0-9]{0,8}", batch):
        raise refuse(f"batch={batch} is no number of images from 1 to 999999999")
    engine = fields.pop("engine", None)
    if engine is not None and engine not in get_args(EngineName):
        raise refuse(f"engine={engine} is none of {', '.join(get_args(EngineName))}")
    optimize = fields.pop("optimize", None)
    if optimize == "":
        raise refuse("optimize= names no preset")
    return PoolWords(
        name,
        selectors,
        least,
        most,
        None if batch is None else int(batch),
        engine,  # type: ignore[arg-type]
        optimize,
        **found,  # type: ignore[arg-type]
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _selectors(labels: str, refuse: Callable[[str], InputError]) -> tuple[dict[str, str], ...]:
    """`"a=b|c,d=e"`: with a=b and d=e, else with a=c and d=e."""
    selectors: list[dict[str, str]] = [{}]
    for pair in labels.split(",") if labels else ():
        label, equals, values = pair.partition("=")
        options = values.split("|")
        if not equals or not _LABEL.fullmatch(label) or not all(map(_VALUE.fullmatch, options)):
            raise refuse(f"{pair!r} is no label=value (or label=first|else)")
        if any(label in selector for selector in selectors):
            raise refuse(f"the label {label} stands twice")
        selectors = [{**selector, label: value} for value in options for selector in selectors]
    return tuple(selectors) if labels else ()


def read_pools(options: GenerateOptions) -> tuple[PoolWords, ...]:
    """The pools that `options` name, and nothing that contradicts them; none where there is no `--pool`.

    Raises:
        InputError: an option means nothing, or excludes another one; the message names it.
    """
    if not options.pool:
        if options.prefer is not None:
            raise UsageError(
                f"--prefer {options.prefer}: needs --pool: there is something to choose between pools only"
            )
        return ()
    pools = tuple(map(parse_pool, options.pool))
    names = [pool.name for pool in pools]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--pool {twice[0]}: two pools have this name")
    for option, given in (
        ("--workers", options.workers != "auto"),
        ("--device", options.device != "auto"),
        ("--ranks-per-worker", options.ranks_per_worker is not None),
    ):
        if given:
            raise UsageError(f"--pool and {option} exclude each other: each pool says its own")
    if (options.gpus_per_worker or 0) > 1:
        raise UsageError("--pool: its workers have one GPU or a part of one; drop --gpus-per-worker")
    if options.prefer == "cost":
        for pool in pools:
            if pool.price is None:
                raise UsageError(
                    f"--prefer cost: --pool {pool.name} has no price=X, the price of an hour of its device"
                )
    for pool in pools:
        if not pool_gpus(pool, options) and pool.cpus == 0:
            raise UsageError(f"--pool {pool.name}: a worker needs a CPU or a GPU")
    return pools


def pool_gpus(pool: PoolWords, options: GenerateOptions) -> float:
    """GPUs of each of its workers: what it says, else one where it names an accelerator, else what the job says, else none."""
    if pool.gpus is not None:
        return pool.gpus
    if any(ACCELERATOR in selector for selector in pool.selectors):
        return 1.0
    return options.gpus_per_worker or 0.0


def with_models(
    pools: tuple[PoolWords, ...], options: GenerateOptions, source: ObtainedModel
) -> tuple[PoolWords, ...]:
    """`pools`, each with how its workers load and run the model, where that is another way than the job's, `source.options`.

    Raises:
        InputError: a preset is none, or its rungs are not for the model or the pool's devices; the message names the pool.
    """
    found = []
    for pool in pools:
        model = source.options
        if pool.optimize is not None:
            on_gpu = bool(pool_gpus(pool, options))
            try:
                model = options.model_options.optimized(source, options.model, pool.optimize, on_gpu=on_gpu)
            except InputError as error:
                raise InputError(f"--pool {pool.name}: optimize={pool.optimize}: {error}") from error
        model = replace(model, batch_size=pool.batch or model.batch_size, engine=pool.engine or model.engine)
        found.append(replace(pool, model=model if model != source.options else None))
    return tuple(found)


def pools_identity(pools: Iterable[PoolWords], model: GeneratorOptions) -> dict[str, Any]:
    """What tells jobs apart whose pools run the model in ways that change images: their engines, and their rungs, where these are not
    all the job's own, `model`."""
    models = [pool.model or model for pool in pools]
    identity: dict[str, Any] = {}
    engines: list[str] = sorted({m.engine for m in models})
    if set(engines) - {model.engine}:
        identity["pool_engines"] = engines
    for name in ("rungs", "cuda_graphs", "fused_modules"):
        ways = {json.dumps(_json(getattr(m, name)), sort_keys=True) for m in models}
        if ways - {json.dumps(_json(getattr(model, name)), sort_keys=True)}:
            identity[f"pool_{name}"] = [json.loads(way) for way in sorted(ways)]
    return identity


def _json(value: Rungs | bool) -> dict[str, Any] | bool:
    return value.identity() if isinstance(value, Rungs) else value
