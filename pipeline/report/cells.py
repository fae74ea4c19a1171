"""What stands in the report's tables, in words: the same cells on the page and on the terminal, which choose among them."""

from __future__ import annotations

from typing import Any

from millijoule.pipeline.report import words
from millijoule.pipeline.report.data import JobReport
from millijoule.pipeline.report.devices import STRAGGLER_FACTOR, DeviceRow, Speed, Straggler
from millijoule.pipeline.report.energy import ClassShare, EnergyFigures
from millijoule.pipeline.report.gpu_time import GpuTime
from millijoule.pipeline.report.node_meters import NodeMeterRow
from millijoule.pipeline.report.words import count, energy, grams, money, seconds, share
from millijoule.workers.counted import counted

FIGURE_HEADS = ("", "direct", "full", "whole job")
CLASS_HEADS = ("class", "counts as", "worker time", "share", "measured", "share", "estimate", "share")

#: What became of a closure check.
VERDICTS = {True: "passed", False: "FAILED", None: "not applicable"}


def not_made(job: JobReport) -> list[str]:
    """How many images nobody got, by status."""
    counts = {"filtered": job.images_filtered, "quarantined": job.images_quarantined}
    return [f"{n:,} {status}" for status, n in counts.items() if n]


def messages(job: JobReport) -> list[tuple[str, dict[str, int]]]:
    """Why images are not there, and what was said of those that are: title, and images by message."""
    every = [
        ("Errors", job.errors),
        ("Filtered by the model", job.filter_reasons),
        ("Warnings", job.warnings),
    ]
    return [(title, found) for title, found in every if found]


def figure_sections(job: JobReport) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Measured figures, estimates and, where GPUs were held, their time: title, and rows under `FIGURE_HEADS`."""
    sections = [(f.method, _figures(f)) for f in (job.measured, job.estimate)]
    if job.gpu_time is not None:
        kinds = ", ".join(f"{m.gpus} x {m.model}" for m in job.gpu_time.models)
        sections.append((f"time in which GPUs were held ({kinds})", _gpu_rows(job.gpu_time)))
    return sections


def _figures(f: EnergyFigures) -> list[tuple[str, ...]]:
    missing = words.NOT_MEASURED if f.direct_mj_per_image is None else words.NOT_GIVEN
    grams_of = (f.direct_gco2e_per_image, f.full_gco2e_per_image, f.total_gco2e)
    costs = (f.direct_cost_per_image, f.full_cost_per_image, f.total_cost)
    return [
        ("energy per image", *map(energy, (f.direct_mj_per_image, f.full_mj_per_image, f.total_mj))),
        ("images per kWh", count(f.direct_images_per_kwh), count(f.full_images_per_kwh), ""),
        ("CO2e per image", *(grams(g, missing) for g in grams_of)),
        ("electricity cost per image", *(money(c, missing) for c in costs)),
    ]


def _gpu_rows(time: GpuTime) -> list[tuple[str, ...]]:
    no_cost = words.NOT_KNOWN if all(m.price_per_hour is not None for m in time.models) else words.NOT_GIVEN
    per_image = (time.direct_seconds_per_image, time.full_seconds_per_image)
    hours = words.NOT_KNOWN if time.workers_unknown else f"{count(time.hours)} GPU-hours"
    costs = (time.direct_cost_per_image, time.full_cost_per_image, time.total_cost)
    return [
        ("GPU time per image", *(seconds(s, words.NOT_KNOWN) for s in per_image), hours),
        ("GPU time cost per image", *(money(c, no_cost) for c in costs)),
    ]


def gpu_prices(time: GpuTime) -> str:
    """How the GPU time was priced and divided."""
    given = [f"{money(m.price_per_hour)} for {m.model}" for m in time.models if m.price_per_hour is not None]
    prices = (
        f"price per GPU-hour ({time.priced_by}): {', '.join(given)}"
        if given
        else "price per GPU-hour: not given"
    )
    hours = time.hours or 1.0
    parts = ", ".join(f"{name} {share(part / hours)}" for name, part in time.hours_by_group.items())
    return f"GPU time: {parts}; {prices}. PUE plays no part."


def class_cells(row: ClassShare) -> tuple[str, ...]:
    """Under `CLASS_HEADS`."""
    return (
        *(row.segment_class, row.group, seconds(row.worker_seconds), share(row.time_share)),
        *(energy(row.energy_mj), share(row.energy_share)),
        *(energy(row.estimate_mj, "-"), share(row.estimate_share)),
    )


def energy_cells(row: DeviceRow) -> tuple[str, ...]:
    """Direct and full energy per image, measured and then estimated."""
    return (
        *(energy(mj) for mj in (row.direct_mj_per_image, row.full_mj_per_image)),
        *(energy(mj, "-") for mj in (row.direct_estimate_mj_per_image, row.full_estimate_mj_per_image)),
    )


POOL_HEADS = (
    *("pool", "workers", "shards", "images", "direct per image", "estimate direct"),
    *("device time per shard", "energy per shard", "estimate per shard", "device cost per shard"),
)
#: Those of the pool as a whole; the others say what a shard of its takes.
POOL_HEADS_IN_ALL = 6


def pool_cells(job: JobReport) -> list[tuple[str, ...]]:
    """A row per pool, under `POOL_HEADS`; what a shard costs is that of as many images of the pool as a mean shard has."""

    def each(pool: dict[str, Any], of: str, key: str) -> float | None:
        value, n = pool.get(key), pool.get(of)  # an earlier version has fewer
        return value / n if value is not None and n else None

    return [
        (
            name,
            *(f"{pool[key]:,}" for key in ("workers", "shards", "images_ok")),
            energy(each(pool, "images_ok", "shard_mj")),
            energy(each(pool, "images_ok", "shard_estimate_mj"), "-"),
            seconds(each(pool, "shards_made", "shard_s")),
            energy(each(pool, "shards_made", "shard_mj")),
            energy(each(pool, "shards_made", "shard_estimate_mj"), "-"),
            money(each(pool, "shards_made", "device_cost")),
        )
        for name, pool in job.pools.items()
    ]


def straggler_cells(row: Straggler) -> tuple[str, ...]:
    """Images, how long they took, and how that is to the median."""
    return f"{row.images:,}", seconds(row.seconds), f"{row.times_median:.2f} x"


def meter_cells(row: NodeMeterRow) -> tuple[str, ...]:
    """What the node's meter counted, its devices, and the declared rest."""
    return tuple(energy(mj, "-") for mj in (row.node_mj, row.devices_mj, row.rest_mj))


def check_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Of a row of the closure table: expected, found, residual, tolerance, and the verdict."""
    return (
        energy(row["expected_mj"], "-"),
        energy(row["found_mj"], "-"),
        words.residual(row["residual_mj"], row["residual_share"], row["residual_ns"]),
        words.residual(None, row["tolerance_share"], row["tolerance_ns"]),
        VERDICTS[row["passed"]],
    )


def speed(s: Speed) -> tuple[str, str]:
    """Throughput, and whether there are stragglers, in a sentence each."""
    made = (
        f"{words.rate(s.images_per_second)} over {seconds(s.seconds)}, {counted(s.shards, 'shard')}. Per image in a shard: "
        f"median {seconds(s.median_seconds_per_image)}, 95 % below {seconds(s.p95_seconds_per_image)}, "
        f"slowest {seconds(s.slowest_seconds_per_image)}."
    )
    if not s.slowest:
        return made, f"No stragglers: no shard took more than {STRAGGLER_FACTOR:g} times the median."
    return (
        made,
        f"{counted(s.stragglers, 'straggler')} took more than {STRAGGLER_FACTOR:g} times the median; the slowest:",
    )
