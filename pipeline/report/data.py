"""Everything the report shows, as one plain value: `--json` writes it, the page and the terminal table draw it.

An output's `stats.json`, energy tables and manifest go in. Measured and modelled energy have separate figures, what
was not measured is None, and grams and money follow from joules only where an intensity or a price was given.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.output.job import JobSpec, require_job
from millijoule.pipeline.output.kept_rates import AS_GIVEN, with_kept_rates
from millijoule.pipeline.planning.retry_rounds import count_shards
from millijoule.pipeline.report.devices import (
    DeviceRow,
    Speed,
    device_rows,
    devices_of_workers,
    gpu_models,
    measure_speed,
    unread_devices,
)
from millijoule.pipeline.report.energy import (
    ClassShare,
    EnergyFigures,
    RateUsed,
    class_shares,
    energy_figures,
    rate_used,
)
from millijoule.pipeline.report.flags import Flag, flags_of
from millijoule.pipeline.report.gallery import Sample, read_samples
from millijoule.pipeline.report.gpu_time import GpuPrices, GpuTime, measure_gpu_time, prices_of_pools
from millijoule.pipeline.report.node_meters import NodeMeterRow, node_meter_rows
from millijoule.pipeline.report.tables import labels, read_energy_table
from millijoule.pipeline.report.timeline import Timeline, Work, build_timeline, read_work
from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.layout import STATS_KEY, SUCCESS_KEY
from millijoule.workers.storage.protocol import Store

REPORT_SCHEMA_VERSION = 1

MAX_CLOSURE_ROWS = 200
MAX_DEVICE_ROWS = 500
MAX_MESSAGES = 20

#: What `stats.json` has had since its first version.
_NEEDED = (
    *("model", "model_sha256", "millijoule_version", "images_ok", "images_quarantined", "encoded_bytes"),
    *("input_rows_rejected", "shards", "errors", "warnings", "energy_methods", "images_per_second"),
    *("direct_mj_per_image", "full_mj_per_image", "seconds_first_to_last_commit"),
)
_TAKEN_OVER = _NEEDED[:7]


@dataclass(frozen=True)
class Closure:
    """The closure table; `rows` is None where it was not recorded. Failed checks come first."""

    rows: tuple[dict[str, Any], ...] | None
    checks: int
    failed: int


@dataclass(frozen=True)
class JobReport:
    """One output."""

    output: str
    fingerprint: str
    model: str
    model_sha256: str
    millijoule_version: str
    images_ok: int
    images_filtered: int
    images_quarantined: int
    images_with_warnings: int | None  # None: the output does not say
    input_rows_rejected: int
    encoded_bytes: int
    evidence_class: str  # "E0".."E4", or "not computed"
    is_measured: bool
    domains: tuple[str, ...]
    measured: EnergyFigures
    estimate: EnergyFigures
    carbon: RateUsed | None
    price: RateUsed | None
    pue: float | None
    gpu_time: GpuTime | None  # None: no worker held a GPU
    classes: tuple[ClassShare, ...]
    devices: tuple[DeviceRow, ...]
    devices_not_shown: int
    nodes: tuple[DeviceRow, ...]
    nodes_not_shown: int
    models: tuple[DeviceRow, ...]
    speed: Speed
    timeline: Timeline | None
    software: tuple[dict[str, str], ...]  # one per set of versions its workers had
    closure: Closure
    node_meters: tuple[NodeMeterRow, ...]  # failed ones first; empty: no node's own meter was read
    node_meters_not_shown: int
    flags: tuple[Flag, ...]
    errors: dict[str, int]
    filter_reasons: dict[str, int]
    warnings: dict[str, int]  # by kind, where the output says it
    samples: tuple[Sample, ...]
    pools: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `stats.json` has them; empty: none


@dataclass(frozen=True)
class Report:
    """What `--json` writes."""

    jobs: tuple[JobReport, ...]
    schema_version: int = REPORT_SCHEMA_VERSION

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, allow_nan=False).encode() + b"\n"


def collect_report(stores: Sequence[Store], rates: Rates, gpu_prices: GpuPrices | None = None) -> Report:
    """Read what finished jobs left in their outputs.

    Raises:
        InputError: an output has no job, or its job has not finished.
        StoreError: storage failed.
    """
    return Report(tuple(collect_job(store, rates, gpu_prices) for store in stores))


def collect_job(store: Store, rates: Rates, gpu_prices: GpuPrices | None = None) -> JobReport:
    """Read one output; see `collect_report`. Rates and prices that are not given are those that the job was run with, if any."""
    job = require_job(store)
    is_pue_given, rates = rates.pue is not None, with_kept_rates(store, rates)
    stats = read_stats(store)
    read = partial(read_energy_table, store, run_id=job.fingerprint)
    segments, attempts, env, power = (read(table) for table in ("segment", "attempt", "env", "power"))
    if segments is None or attempts is None:
        raise InputError(
            f"{store.url}: has no energy tables; run the same `millijoule generate` again to finish it"
        )
    work = read_work(segments)
    devices_of = devices_of_workers(work, attempts, env)
    timeline = build_timeline(work, devices_of, attempts, read("counter"), power)
    closure_table = read("closure")
    closure = _closure(closure_table)
    node_meters = node_meter_rows(closure_table, read("node_energy"))
    models = gpu_models(env)
    rows_by = partial(device_rows, work, devices_of, attempts, models)
    devices, nodes = rows_by("device"), rows_by("node")
    gpu_prices = gpu_prices or prices_of_pools(env)
    energy = stats["energy"]
    unclosed = {account["worker_id"] for account in energy.get("unclosed", ())}
    gpu_time = measure_gpu_time(work, devices_of, env, models, stats["images_ok"], gpu_prices, unclosed)

    is_measured = energy.get("total_mj") is not None
    carbon_used, price_used = (
        rate_used(rate, work, is_measured, constant_is_fallback=rate is rates.carbon)
        if rate is not None
        else None
        for rate in (rates.carbon, rates.price)
    )
    evidence = stats.get("evidence_class")
    return JobReport(
        output=store.url,
        fingerprint=job.fingerprint,
        **{name: stats[name] for name in _TAKEN_OVER},
        images_filtered=stats.get("images_filtered", 0),
        images_with_warnings=stats.get("images_with_warnings"),
        evidence_class=evidence if isinstance(evidence, str) else "not computed",
        is_measured=is_measured,
        domains=tuple(energy.get("domains", ())),
        measured=energy_figures(stats, work, rates, measured=True),
        estimate=energy_figures(stats, work, rates, measured=False),
        carbon=carbon_used,
        price=price_used,
        pue=rates.pue,
        gpu_time=gpu_time,
        classes=class_shares(work, stats),
        devices=tuple(devices[:MAX_DEVICE_ROWS]),
        devices_not_shown=max(0, len(devices) - MAX_DEVICE_ROWS),
        nodes=tuple(nodes[:MAX_DEVICE_ROWS]),
        nodes_not_shown=max(0, len(nodes) - MAX_DEVICE_ROWS),
        models=tuple(rows_by("model")),
        speed=measure_speed(stats, devices_of, attempts),
        timeline=timeline,
        software=_software(env),
        closure=closure,
        node_meters=tuple(node_meters[:MAX_DEVICE_ROWS]),
        node_meters_not_shown=max(0, len(node_meters) - MAX_DEVICE_ROWS),
        flags=flags_of(
            stats,
            unfinished(store, job, stats),
            None if closure.rows is None else closure.failed,
            power is not None and power.num_rows > 0,
            _short_share(segments),
            _unclaimed_share(work, energy.get("total_mj")),
            carbon_used,
            price_used,
            rates.pue,
            "declared" if is_pue_given else AS_GIVEN,
            gpu_time,
            gpu_prices,
            unread_devices(env),
        ),
        errors=_first(stats["errors"]),
        filter_reasons=_first(stats.get("filter_reasons", {})),
        warnings=_first(stats.get("warning_kinds", stats["warnings"])),
        samples=read_samples(store),
        pools=stats.get("pools", {}),
    )


def read_stats(store: Store) -> dict[str, Any]:
    try:
        stats = json.loads(store.get(STATS_KEY))
        if not isinstance(stats, dict) or not isinstance(stats.get("energy"), dict):
            raise ValueError("no energy in it")
        if missing := [key for key in _NEEDED if key not in stats]:
            raise ValueError(f"no {', '.join(missing)} in it")
        return stats
    except NotFoundError:
        raise InputError(
            f"{store.url}: the job has not finished (it has no {STATS_KEY}); unless a run is at work on it, give its command again"
            " to finish it"
        ) from None
    except ValueError as error:
        raise InputError(f"{store.url}/{STATS_KEY}: not a job's statistics: {error}") from error


def _unclaimed_share(work: Work, total_mj: int | None) -> float:
    if not total_mj:
        return 0.0
    counts = [c != "off" for c in work.gap_classes]
    return float(np.nansum(work.gap_energy_mj[np.array(counts, dtype=bool)])) / total_mj


def unfinished(store: Store, job: JobSpec, stats: Mapping[str, Any]) -> str | None:
    """Why tables and totals are not of all that the job did, or None: a retry that has begun writes them at its end."""
    if (left := count_shards(store, job) - stats["shards"]) > 0:
        return (
            f"a retry of {left} shards has begun and not finished: what it made and used is in no table yet"
        )
    return None if store.exists(SUCCESS_KEY) else f"it has no {SUCCESS_KEY}, which a finished job writes last"


def _closure(table: pa.Table | None) -> Closure:
    if table is None:
        return Closure(None, 0, 0)
    rows = table.to_pylist()
    rows.sort(key=lambda row: row["passed"] is not False)
    failed = sum(row["passed"] is False for row in rows)
    clean = [{k: _finite(v) for k, v in row.items()} for row in some_of_each_check(rows, MAX_CLOSURE_ROWS)]
    return Closure(tuple(clean), len(rows), failed)


def some_of_each_check(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` rows of the closure table, in their order: failed ones, then the first of each check.

    A job of many devices has so many rows of one check that those of the others would never be seen.
    """
    seen: Counter[str] = Counter()
    ranks = []
    for number, row in enumerate(rows):
        ranks.append((row["passed"] is not False, seen[row["check"]], number))
        seen[row["check"]] += 1
    return [rows[number] for number in sorted(number for *_, number in sorted(ranks)[:limit])]


def _software(env: pa.Table | None) -> tuple[dict[str, str], ...]:
    if env is None:
        return ()
    names = ("driver_version", "torch_version", "python_version")
    found = dict.fromkeys(
        tuple((n, row[n]) for n in names if row[n]) for row in env.select(names).to_pylist()
    )
    return tuple(dict(versions) for versions in found if versions)[:MAX_MESSAGES]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short_share(segments: pa.Table) -> float:
    quality = labels(segments["quality"])
    measured = quality.where(["measured", "short"]).sum()
    return float(quality.where(["short"]).sum() / measured) if measured else 0.0


def _first(messages: Mapping[str, int]) -> dict[str, int]:
    return dict(list(messages.items())[:MAX_MESSAGES])
