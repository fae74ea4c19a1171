"""What a reader must know before quoting a figure of the report: what is missing, stands in or is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millijoule.pipeline.report import words
from millijoule.pipeline.report.energy import RateUsed
from millijoule.pipeline.report.gpu_time import OPTION, GpuPrices, GpuTime
from millijoule.workers.counted import counted

#: A flag names at most this many devices, or workers.
MAX_DEVICES_NAMED = 8

#: Energy without a worker is worth a word from this part of what the job used on.
UNCLAIMED_SHARE = 0.05


@dataclass(frozen=True)
class Flag:
    """`level` is "problem" (a figure is wrong or missing), "caution" (a stand-in was used) or "note"."""

    level: str
    name: str
    text: str


def flags_of(
    stats: Mapping[str, Any],
    unfinished: str | None,
    failed_checks: int | None,
    power_recorded: bool,
    short_share: float,
    unclaimed_share: float,
    carbon: RateUsed | None,
    price: RateUsed | None,
    pue: float | None,
    pue_source: str,
    gpu_time: GpuTime | None,
    gpu_prices: GpuPrices | None,
    unread_devices: Sequence[str],
) -> tuple[Flag, ...]:
    """All flags of a job, the worst first.

    Args:
        unfinished: why the books are not of all that the job did.
        failed_checks: of the closure table; None: it was not recorded.
        short_share: part of the measured segment rows near their counter's resolution.
        unclaimed_share: part of the measured energy that was counted and is no worker's.
        unread_devices: those that workers held and never read a counter of.
    """
    flags = [
        *(
            [Flag("problem", "not finished", f"{unfinished[0].upper()}{unfinished[1:]}.")]
            if unfinished
            else ()
        ),
        *_image_flags(stats),
        *_energy_flags(stats, short_share, unread_devices),
        *_unclaimed_flags(unclaimed_share),
        *_closure_flags(failed_checks),
        *_rate_flags(carbon, "carbon intensity", "--gco2-per-kwh (a number or a CSV file)"),
        *_rate_flags(price, "price", "--price-per-kwh (a number or a CSV file)"),
        *_gpu_flags(gpu_time, gpu_prices),
    ]
    if not isinstance(stats.get("evidence_class"), str):
        flags.append(Flag("note", "evidence class not computed", "This output records no evidence class."))
    if not power_recorded:
        text = "Power is energy counter differences over time, or not shown."
        flags.append(Flag("note", "power not recorded", text))
    if pue is None:
        name, text = "no PUE", "Grams and money are for the devices alone; --pue adds the building."
    else:
        name = "PUE declared"
        text = f"Grams and money are multiplied by a PUE of {pue:g}, {pue_source}. Joules are not."
    flags.append(Flag("note", name, text))
    return tuple(sorted(flags, key=lambda flag: ("problem", "caution", "note").index(flag.level)))


def _image_flags(stats: Mapping[str, Any]) -> list[Flag]:
    """What became of images that a reader might take to be there, or to be what was asked for."""
    flags = []
    if filtered := stats.get("images_filtered", 0):
        mj = (stats.get("rejected_mj") or {}).get("filtered")
        used = "" if mj is None else f" What they used, {words.energy(mj)}, counts as waste."
        text = f"The model's own safety checker hid {counted(filtered, 'image')}; no files are there of what it hid.{used}"
        flags.append(Flag("caution", "images filtered", text))
    if warned := stats.get("images_with_warnings", 0):
        text = f"{counted(warned, 'image')}; the kinds stand below, each image's own in manifest.parquet."
        flags.append(Flag("note", "images with warnings", text))
    return flags


def _energy_flags(stats: Mapping[str, Any], short_share: float, unread_devices: Sequence[str]) -> list[Flag]:
    energy = stats["energy"]
    flags = []
    not_measured, segments = energy.get("segments_not_measured", 0), energy.get("segments", 0)
    if not energy.get("domains"):
        text = (
            "No energy counter was read on any node: NVML and RAPL could not be, or --no-telemetry was given. What is shown is a "
            "model of CPU time."
        )
        flags.append(Flag("problem", "energy not measured", text))
    elif energy.get("total_mj") is None:
        text = (
            f"{not_measured} of {segments} segments have no complete measurement, so the totals are missing."
        )
        flags.append(Flag("problem", "energy measured in part", text))
    elif not_measured:
        text = f"{not_measured} of {segments} segments could not be read; their energy is in gaps."
        flags.append(Flag("caution", "segments not measured", text))
    flags += _account_flags(energy.get("unclosed", ()))
    if unread_devices and energy.get("domains"):
        more = len(unread_devices) - MAX_DEVICES_NAMED
        names = ", ".join(unread_devices[:MAX_DEVICES_NAMED]) + (f" and {more} more" if more > 0 else "")
        text = (
            f"Workers held devices whose energy counter they never read, so their energy is missing: {names}."
        )
        flags.append(Flag("problem", "devices not read", text))
    if missing := stats["energy_methods"].get("missing", 0):
        text = f"{counted(missing, 'image was', 'images were')} made by workers without a readable counter."
        flags.append(Flag("caution" if energy.get("domains") else "note", "images without counter", text))
    if resets := energy.get("counter_resets", 0):
        text = f"A counter was reset or misread {counted(resets, 'time')}; what was used meanwhile is lost."
        flags.append(Flag("caution", "counter resets", text))
    if short_share > 0:
        text = f"{short_share:.0%} of measured segment readings are short: near the counter's resolution."
        flags.append(Flag("caution", "short segments", text))
    return flags


def _account_flags(unclosed: Sequence[Mapping[str, Any]]) -> list[Flag]:
    flags = [
        Flag(
            "problem",
            "energy not read to the end",
            f"Worker {u['worker_id']} on {u['host']}: what {', '.join(u['devices'])} used from {u['since']} on is missing, and "
            f"so are all totals it belongs to: {u['reason']}.",
        )
        for u in unclosed[:MAX_DEVICES_NAMED]
    ]
    if (more := len(unclosed) - MAX_DEVICES_NAMED) > 0:
        text = f"The same holds for {more} more; stats.json lists all."
        flags.append(Flag("problem", "energy not read to the end", text))
    return flags


def _unclaimed_flags(share: float) -> list[Flag]:
    if share < UNCLAIMED_SHARE:
        return []
    text = (
        f"{share:.0%} of the energy is no worker's: counted in pauses of up to half an hour, between two runs of the job too, or where "
        "records were lost. Whoever used the devices meanwhile is in it, and full figures are higher by it."
    )
    return [Flag("caution", "energy of nobody", text)]


def _closure_flags(failed: int | None) -> list[Flag]:
    if failed is None:
        return [Flag("note", "closure not recorded", "This output has no closure table.")]
    text = f"{counted(failed, 'check')} found energy that does not add up."
    return [Flag("problem", "closure failed", text)] if failed else []


def _rate_flags(rate: RateUsed | None, name: str, option: str) -> list[Flag]:
    if rate is None:
        return [Flag("note", f"no {name}", f"Give {option} to see it per image.")]
    if not rate.fallback:
        return []
    if rate.fallback_share is None:
        return [Flag("caution", f"{name}: not applied", f"{rate.source}: no energy to multiply.")]
    if rate.is_constant:
        text = f"{rate.source}: one number stands for all times of the job."
    else:
        text = f"{rate.source}: {rate.fallback_share:.0%} of the energy lies outside the table; the nearest row was used."
    return [Flag("caution", f"{name}: fallback", text)]


def _gpu_flags(time: GpuTime | None, prices: GpuPrices | None) -> list[Flag]:
    if time is None:
        text = f"No worker held a GPU, so {OPTION} has no time to multiply."
        return [Flag("caution", "no GPU time", text)] if prices else []
    flags = []
    if time.workers_unknown:
        text = f"Which GPUs {counted(time.workers_unknown, 'worker')} held is not recorded; that time, and so the cost, is missing."
        flags.append(Flag("caution", "GPU time incomplete", text))
    if time.workers_unclosed:
        text = f"Until when {counted(time.workers_unclosed, 'worker')} held GPUs is not known; that time, and so the cost, is missing."
        flags.append(Flag("caution", "GPU time incomplete", text))
    if prices is None:
        return flags
    if missing := [m.model for m in time.models if m.price_per_hour is None]:
        text = f"{prices.source} has no price for {', '.join(missing)}, so the cost is missing. {OPTION} can say it."
        flags.append(Flag("caution", "GPU price missing", text))
    if not prices.exact and (
        unused := sorted(prices.by_model.keys() - {prices.name_of(m.model) for m in time.models})
    ):
        text = f"No GPU of this job is a {' or a '.join(unused)}."
        flags.append(Flag("caution", "GPU price not used", text))
    return flags
