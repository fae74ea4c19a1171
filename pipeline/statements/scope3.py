"""Energy of jobs for who reports scope 3 of the GHG Protocol: one row per job and kind of device, as CSV.

What was measured and what was estimated have columns of their own; they are of the same use and never added to one another. An
empty cell is missing, and the row says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from millijoule.pipeline.energy.carbon import MJ_PER_KWH
from millijoule.pipeline.energy.schemas import run_id_of
from millijoule.pipeline.report.energy import ESTIMATE
from millijoule.pipeline.statements.csv_cells import as_csv
from millijoule.pipeline.statements.declared import Declared
from millijoule.pipeline.statements.job_energy import JobEnergy

HEADS = (
    *("run_id", "output", "model", "images_accepted", "device_type", "device_kind", "devices"),
    *("location", "period_begin_utc", "period_end_utc", "evidence_class", "in_boundary"),
    *("measured_kwh", "measured_by", "counted_kwh", "estimated_kwh", "estimated_by"),
    *("gco2e_per_kwh_location_based", "intensity_source", "pue"),
    *("measured_kgco2e", "estimated_kgco2e", "missing", "millijoule_version"),
)


def scope3_statement(jobs: Sequence[JobEnergy], declared: Declared) -> str:
    """The CSV over `jobs`. `counted_kwh` is what was counted, in full or not; `measured_kwh` is empty unless it is all."""
    return as_csv(HEADS, (row for job in jobs for row in _rows(job, declared)))


def _rows(job: JobEnergy, declared: Declared) -> Iterator[tuple[Any, ...]]:
    for kind in job.kinds:
        measured, estimate = kind.measured, kind.estimate
        is_estimated = estimate.energy_mj is not None
        reasons = list(kind.missing)
        if measured.energy_mj is not None and measured.gco2e is None:
            reasons += job.carbon_missing
        if kind.is_own and not kind.missing and job.missing:
            reasons.append(f"of the job: {'; '.join(job.missing)}")
        per_kwh = measured.gco2e_per_kwh if measured.energy_mj is not None else estimate.gco2e_per_kwh
        yield (
            *(run_id_of(job.fingerprint), job.output, job.model, job.images_ok),
            *(kind.device_type, kind.kind, kind.devices or None),
            *(declared.location, _iso(job.begin_unix_s), _iso(job.end_unix_s)),
            job.evidence_class if measured.energy_mj is not None else "E0",
            "yes" if kind.is_own else "no",
            *(measured.kwh, ", ".join(job.energy_methods) if kind.counted_mj else None),
            kind.counted_mj / MJ_PER_KWH if kind.counted_mj else None,
            *(estimate.kwh, ESTIMATE if is_estimated else None),
            *(per_kwh, job.carbon_source, job.pue),
            *(_kilograms(measured.gco2e), _kilograms(estimate.gco2e)),
            *("; ".join(reasons) or None, job.millijoule_version),
        )


def _kilograms(grams: float | None) -> float | None:
    return None if grams is None else grams / 1000


def _iso(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")
