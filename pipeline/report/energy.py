"""A job's energy in figures: per image, per class, and as grams and money where a rate was given.

Totals come from `stats.json`, which knows what is missing; segments only say when energy was used, which is what a
rate over time needs. What was not measured stays None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from millijoule.pipeline.energy.carbon import MJ_PER_KWH, Rate, RateMean, Rates, mean_rate
from millijoule.pipeline.report.timeline import Work
from millijoule.workers.meters.meter import ESTIMATE_METHOD
from millijoule.workers.schemas import SEGMENT_CLASSES

#: How modelled figures are labelled, so that nobody takes them for measurements.
ESTIMATE = f"estimate ({ESTIMATE_METHOD.replace('cpu-time', 'CPU time')})"

#: What a segment class means to somebody who pays for it.
GROUPS = {
    "shard": "images",
    "load": "load",
    "warmup": "load",
    "idle": "idle",
    "loser": "waste",
    "retry": "waste",
    "gap": "gap",
}

#: Statuses of images that nobody got: their part of the energy of shards is shown beside the classes of segments.
REJECTED = ("filtered", "quarantined")
SHARD = "shard"


@dataclass(frozen=True)
class RateUsed:
    """A rate as it was applied: mean over the energy of the whole job, None where no energy is known."""

    source: str
    is_constant: bool
    mean_per_kwh: float | None
    fallback: bool
    fallback_share: float | None
    weighted_by: str  # "measured energy" or "estimate"


@dataclass(frozen=True)
class EnergyFigures:
    """Energy, and what follows from it, by one method.

    `direct` is what the accepted images used while they were made; `full` adds an equal share of loading, idling, waste
    and gaps. Null: not measured, or no price or intensity was given.
    """

    method: str
    direct_mj_per_image: float | None
    full_mj_per_image: float | None
    direct_images_per_kwh: float | None
    full_images_per_kwh: float | None
    direct_gco2e_per_image: float | None
    full_gco2e_per_image: float | None
    direct_cost_per_image: float | None
    full_cost_per_image: float | None
    total_mj: int | None
    total_gco2e: float | None
    total_cost: float | None


@dataclass(frozen=True)
class ClassShare:
    """What one class of segments took, or the images of a status in `REJECTED` took of the shards.

    `worker_seconds` is None for gaps without a worker, and for images: the time of a shard is not divided.
    """

    segment_class: str
    group: str
    worker_seconds: float | None
    time_share: float | None
    energy_mj: int | None
    energy_share: float | None
    estimate_mj: int | None
    estimate_share: float | None


def energy_figures(stats: Mapping[str, Any], work: Work, rates: Rates, *, measured: bool) -> EnergyFigures:
    """What the counters say where `measured`, else what the model of CPU time says."""
    infix, total_mj = "", stats["energy"].get("total_mj" if measured else "estimate_total_mj")
    if measured:
        methods = sorted(m for m in stats["energy_methods"] if m != "missing")
        method = f"measured ({', '.join(methods)})" if methods else "not measured"
    else:
        infix, method = "estimate_", ESTIMATE
    direct, full = (stats.get(f"{share}_{infix}mj_per_image") for share in ("direct", "full"))

    def amount(rate: Rate | None, mj: float | None, is_direct: bool) -> float | None:
        if rate is None or mj is None:
            return None
        mean = mean_rate(rate, *_energy_over_time(work, measured, is_direct))
        return None if mean is None else mj / MJ_PER_KWH * mean.per_kwh * (rates.pue or 1.0)

    return EnergyFigures(
        method=method,
        direct_mj_per_image=direct,
        full_mj_per_image=full,
        direct_images_per_kwh=MJ_PER_KWH / direct if direct else None,
        full_images_per_kwh=MJ_PER_KWH / full if full else None,
        direct_gco2e_per_image=amount(rates.carbon, direct, True),
        full_gco2e_per_image=amount(rates.carbon, full, False),
        direct_cost_per_image=amount(rates.price, direct, True),
        full_cost_per_image=amount(rates.price, full, False),
        total_mj=total_mj,
        total_gco2e=amount(rates.carbon, total_mj, False),
        total_cost=amount(rates.price, total_mj, False),
    )


def _energy_over_time(
    work: Work, measured: bool, is_direct: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Begin, end and energy of every stretch that counts; gaps too, where the whole job is meant."""
    energy = work.energy_mj if measured else work.estimate_mj
    if is_direct:
        rows = work.of_class("shard")
        return work.begin_s[rows], work.end_s[rows], energy[rows]
    if not measured:
        return work.begin_s, work.end_s, energy
    kept = np.array([c != "off" for c in work.gap_classes], dtype=bool) & np.isfinite(work.gap_begin_s)
    return (
        np.concatenate([work.begin_s, work.gap_begin_s[kept]]),
        np.concatenate([work.end_s, work.gap_end_s[kept]]),
        np.concatenate([energy, work.gap_energy_mj[kept]]),
    )


def rate_used(rate: Rate, work: Work, is_measured: bool, *, constant_is_fallback: bool) -> RateUsed:
    """How `rate` was applied to the whole job.

    Args:
        constant_is_fallback: whether one number for all times is a stand-in: for the grid's carbon it is, a flat tariff
            is a tariff.
    """
    mean: RateMean | None = mean_rate(rate, *_energy_over_time(work, is_measured, False))
    return RateUsed(
        source=rate.source,
        is_constant=rate.is_constant,
        mean_per_kwh=None if mean is None else mean.per_kwh,
        fallback=mean is None or (mean.fallback_share > 0 and (constant_is_fallback or not rate.is_constant)),
        fallback_share=None if mean is None else mean.fallback_share,
        weighted_by="measured energy" if is_measured else "estimate",
    )


def class_shares(work: Work, stats: Mapping[str, Any]) -> tuple[ClassShare, ...]:
    """One row per class that occurs, in the order of `SEGMENT_CLASSES`, images that nobody got after the shards."""
    energy = stats["energy"]
    seconds = {c: float((work.end_s - work.begin_s)[work.of_class(c)].sum()) for c in work.classes}
    total_mj, estimate_mj = energy.get("total_mj"), energy.get("estimate_total_mj")
    measured = {} if total_mj is None else _divided(energy.get("measured_mj", {}), stats.get("rejected_mj"))
    estimates = (
        {}
        if estimate_mj is None
        else _divided(energy.get("estimate_mj", {}), stats.get("rejected_estimate_mj"))
    )

    def share(part: float | None, whole: float | None) -> float | None:
        return part / whole if part is not None and whole else None

    return tuple(
        ClassShare(
            segment_class=c,
            group="waste" if c in REJECTED else GROUPS[c],
            worker_seconds=seconds.get(c),
            time_share=share(seconds.get(c), sum(seconds.values())),
            energy_mj=measured.get(c),
            energy_share=share(measured.get(c), total_mj),
            estimate_mj=estimates.get(c),
            estimate_share=share(estimates.get(c), estimate_mj),
        )
        for c in (SHARD, *REJECTED, *(c for c in SEGMENT_CLASSES if c != SHARD))
        if c in measured or seconds.get(c) or c in estimates
    )


def _divided(
    mj_by_class: Mapping[str, int | None], rejected_mj: Mapping[str, int | None] | None
) -> dict[str, int | None]:
    """Energy by class, with what shards used for images that nobody got as classes of their own."""
    divided = dict(mj_by_class)
    for status, mj in (rejected_mj or {}).items():
        shard_mj = divided.get(SHARD)
        if mj and shard_mj is not None and status in REJECTED:
            divided |= {SHARD: shard_mj - mj, status: mj}
    return divided
