"""What the GPUs of a job cost by the hour: the time its workers held them, whether they made images or not.

A worker holds its GPUs from its first counter read to its last. A GPU that several workers share is held once. Money
follows only where a price was given for the GPU's model, and only where it is known which GPUs every worker held;
neither energy nor a power usage effectiveness plays a part.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from millijoule.pipeline.energy.intervals import merged
from millijoule.pipeline.report.devices import model_of
from millijoule.pipeline.report.energy import GROUPS
from millijoule.pipeline.report.timeline import HostDevice, Work
from millijoule.workers.errors import UsageError

OPTION = "--price-per-gpu-hour"

#: Where prices are from that `report` was not given.
POOLS = "price= of the job's pools"

#: Where workers that share a GPU do different things at once, its time counts for the first of these.
_ORDER = ("images", "load", "waste", "idle")

Span = tuple[float, float]


@dataclass(frozen=True)
class GpuPrices:
    """Money per GPU-hour: `by_model` for GPUs whose model's name contains the key (is it, where `exact`), `other` for the rest.

    `source` says where they are from, for people.
    """

    other: float | None = None
    by_model: Mapping[str, float] = field(default_factory=dict)
    exact: bool = False
    source: str = OPTION

    def name_of(self, model: str) -> str | None:
        """The key of `by_model` that names `model`, in upper or lower case; of several the longest."""
        if self.exact:
            return model if model in self.by_model else None
        return max((n for n in self.by_model if n.lower() in model.lower()), key=len, default=None)

    def of(self, model: str) -> float | None:
        """The price for a GPU of `model`; None: not given."""
        name = self.name_of(model)
        return self.other if name is None else self.by_model[name]


@dataclass(frozen=True)
class GpuModelTime:
    """The GPUs of one model; `price_per_hour` None: not given."""

    model: str
    gpus: int
    hours: float
    direct_hours: float
    price_per_hour: float | None


@dataclass(frozen=True)
class GpuTime:
    """GPU-hours of a job and what they cost.

    Direct is the time in which images were made that count, full all time; `hours_by_group` divides it as the timeline
    does (images, load, waste, idle). Costs are None where a price is missing or `workers_unknown` workers did not say
    which GPUs they held, whose hours are missing too, and where of `workers_unclosed` it is not known until when they
    held them.
    """

    gpus: int
    hours: float
    direct_hours: float
    hours_by_group: dict[str, float]
    direct_seconds_per_image: float | None
    full_seconds_per_image: float | None
    models: tuple[GpuModelTime, ...]
    workers_unknown: int
    direct_cost_per_image: float | None
    full_cost_per_image: float | None
    total_cost: float | None
    workers_unclosed: int = 0
    priced_by: str | None = None  # where prices are from


def parse_gpu_prices(texts: Sequence[str]) -> GpuPrices | None:
    """`("2", "H200=3.5")` as prices; None where there are none.

    Raises:
        InputError: a text is neither a price nor MODEL=PRICE, or something is priced twice.
    """
    prices: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.rpartition("=")
        try:
            price = float(amount)
        except ValueError:
            price = math.nan
        if not (math.isfinite(price) and price >= 0) or ("=" in text and not name.strip()):
            raise UsageError(f"{OPTION} {text}: a price such as 2.5, or MODEL=PRICE such as H200=3.5")
        if name.strip().lower() in {n.lower() for n in prices}:
            raise UsageError(f"{OPTION} {text}: {name.strip() or 'all GPUs'} is priced twice")
        prices[name.strip()] = price
    return GpuPrices(prices.pop("", None), prices) if prices else None


def prices_of_pools(env: pa.Table | None) -> GpuPrices | None:
    """What the job's pools stated for an hour of their GPUs; a model with two prices has none here. None: nothing was stated.

    Args:
        env: the environment table.
    """
    columns = () if env is None else (env[c].to_pylist() for c in ("gpus", "device_name", "price_per_hour"))
    stated: dict[str, set[float]] = defaultdict(set)
    for gpus, model, price in zip(*columns, strict=True):
        if gpus and model and price is not None:
            stated[model].add(price)
    by_model = {model: prices.pop() for model, prices in stated.items() if len(prices) == 1}
    return GpuPrices(by_model=by_model, exact=True, source=POOLS) if stated else None


def measure_gpu_time(
    work: Work,
    devices_of: Mapping[str, HostDevice],
    env: pa.Table | None,
    models: Mapping[tuple[str, str], str],
    images: int,
    prices: GpuPrices | None,
    unclosed: Collection[str] = (),
) -> GpuTime | None:
    """The GPU time of one job; None where no worker held a GPU, as far as the output says.

    Args:
        devices_of: of the workers, for outputs in which they did not say what they held.
        models: (host, device) -> product name.
        unclosed: workers whose end is not known.
        images: that the job made and kept.
    """
    held = _held_gpus(work, devices_of, env)
    spans: dict[tuple[str, HostDevice], list[Span]] = defaultdict(list)  # by group of GROUPS and GPU
    columns = (work.worker, work.segment_class, work.begin_s, work.end_s)
    for worker, code, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        for gpu in held[work.workers[worker]] or ():
            spans[GROUPS.get(work.classes[code], ""), gpu].append((begin, end))
    for number, worker in enumerate(work.workers):
        mine = work.worker == number
        for gpu in (held[worker] or ()) if mine.any() else ():
            # what lies between two segments that arrived was held too
            spans["idle", gpu].append((work.begin_s[mine].min(), work.end_s[mine].max()))
    every = sorted({gpu for _, gpu in spans}, key=lambda gpu: (gpu.host, gpu.device))
    if not every:
        return None
    kinds = {gpu: model_of(devices_of[worker], models) for worker, gpus in held.items() for gpu in gpus or ()}
    hours_of: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(_ORDER))  # by model, in `_ORDER`
    for gpu in every:
        so_far: list[Span] = []
        before = 0.0
        for n, group in enumerate(_ORDER):
            so_far = merged([*so_far, *spans[group, gpu]])
            seconds = math.fsum(end - begin for begin, end in so_far)
            hours_of[kinds[gpu]][n] += (seconds - before) / 3600
            before = seconds
    gpus_of = Counter(kinds[gpu] for gpu in every)
    by_model = tuple(
        GpuModelTime(model, gpus_of[model], math.fsum(hours), hours[0], prices.of(model) if prices else None)
        for model, hours in sorted(hours_of.items())
    )
    hours = math.fsum(m.hours for m in by_model)
    direct = math.fsum(m.direct_hours for m in by_model)
    unknown = sum(gpus is None for gpus in held.values())
    endless = sum(1 for worker in set(unclosed) if held.get(worker))
    is_known = not unknown and not endless
    total, direct_cost = None, None
    if is_known and all(m.price_per_hour is not None for m in by_model):
        total = math.fsum(m.hours * (m.price_per_hour or 0.0) for m in by_model)
        direct_cost = math.fsum(m.direct_hours * (m.price_per_hour or 0.0) for m in by_model)

    def per_image(amount: float | None) -> float | None:
        return amount / images if images and amount is not None else None

    return GpuTime(
        gpus=len(every),
        hours=hours,
        direct_hours=direct,
        hours_by_group={g: math.fsum(h[n] for h in hours_of.values()) for n, g in enumerate(_ORDER)},
        direct_seconds_per_image=per_image(direct * 3600),
        full_seconds_per_image=per_image(hours * 3600 if is_known else None),
        models=by_model,
        workers_unknown=unknown,
        direct_cost_per_image=per_image(direct_cost),
        full_cost_per_image=per_image(total),
        total_cost=total,
        workers_unclosed=endless,
        priced_by=prices.source if prices else None,
    )


def _held_gpus(
    work: Work, devices_of: Mapping[str, HostDevice], env: pa.Table | None
) -> dict[str, tuple[HostDevice, ...] | None]:
    """The GPUs of each worker: what it stated, else the one its commits name; None: not known."""
    columns = () if env is None else (env["worker_id"].to_pylist(), env["gpus"].to_pylist())
    stated = {worker: gpus for worker, gpus in zip(*columns, strict=True) if gpus is not None}
    held: dict[str, tuple[HostDevice, ...] | None] = {}
    for worker in work.workers:
        on = devices_of[worker]
        if worker in stated:
            held[worker] = tuple(HostDevice(on.host, gpu) for gpu in stated[worker].split(",") if gpu)
        elif on.device == "unknown":
            held[worker] = None
        else:
            held[worker] = () if on.device == "cpu" else (on,)
    return held
