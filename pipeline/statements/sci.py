"""Software Carbon Intensity (ISO/IEC 21031:2024) of jobs: SCI = (E * I + M) per R, with R = one accepted image.

Each part that is missing stays missing, says why, and takes the result with it; the parts that are known are stated all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from millijoule.pipeline.report import words
from millijoule.pipeline.statements.declared import NODE, OPTION, Declared, Embodied
from millijoule.pipeline.statements.job_energy import CPU, JobEnergy
from millijoule.workers.counted import counted
from millijoule.workers.visible_text import visible

STANDARD = "ISO/IEC 21031:2024, Software Carbon Intensity"
FUNCTIONAL_UNIT = "one accepted image"

METHOD = (
    "SCI = (O + M) / R; O = E * I, times the declared PUE where there is one; R = one accepted image.",
    "E: measured energy alone, differences of the devices' cumulative counters from a worker's first read to its last, "
    "with loading, idling, lost attempts and unclaimed gaps; between two runs of a job a pause of up to half an hour is in it, and a "
    "longer one is not. All that used a device meanwhile is in its counter. No estimate is in E.",
    "I: location-based, as declared; a table is weighted by when the energy was used and has to cover all of that time.",
    "M: the sum over devices held of TE * (TiR / EL) * (RR / ToR): TE, EL and RR/ToR as declared, TiR the measured time "
    "for which workers held them. No market-based instrument or offset is in any part.",
)
EXCLUDED = (
    "energy that no counter of the devices sees: fans, power supplies, network, storage, the cluster's head; a declared PUE "
    "stands for the building, not for these",
    "training of the model, and machines of users",
)


@dataclass(frozen=True)
class EmbodiedPart:
    """M of one kind of device; `grams` is None where nothing was declared of it, or its hours are not known."""

    kind: str
    hours: float
    declared: Embodied | None
    grams: float | None


@dataclass(frozen=True)
class JobSci:
    """The parts of one job. Grams are CO2e; None is missing, and `missing` says why."""

    output: str
    fingerprint: str
    model: str
    location: str | None
    begin_utc: str
    end_utc: str
    evidence_class: str
    energy_methods: tuple[str, ...]
    included: tuple[str, ...]
    excluded: tuple[str, ...]
    r_images: int
    e_kwh: float | None
    e_kwh_per_image: float | None
    i_gco2e_per_kwh: float | None
    i_source: str | None
    pue: float | None
    o_grams: float | None
    m_grams: float | None
    m_parts: tuple[EmbodiedPart, ...]
    sci_grams_per_image: float | None
    missing: tuple[str, ...]


@dataclass(frozen=True)
class SciStatement:
    """What is filed: each job, and all of them together where none lacks anything."""

    jobs: tuple[JobSci, ...]
    r_images: int
    e_kwh: float | None
    o_grams: float | None
    m_grams: float | None
    sci_grams_per_image: float | None
    missing: tuple[str, ...]
    statement: str = "sci"
    standard: str = STANDARD
    functional_unit: str = FUNCTIONAL_UNIT
    method: tuple[str, ...] = METHOD
    schema_version: int = 1

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, allow_nan=False).encode() + b"\n"

    def to_text(self) -> str:
        return "\n".join(visible(line) for line in _lines(self)) + "\n"


def sci_statement(jobs: Sequence[JobEnergy], declared: Declared) -> SciStatement:
    """The statement over `jobs`."""
    stated = tuple(_job(job, declared) for job in jobs)
    images = sum(job.r_images for job in stated)
    energy, grams, embodied = (
        _sum_or_none([getattr(job, name) for job in stated]) for name in ("e_kwh", "o_grams", "m_grams")
    )
    per_image = (grams + embodied) / images if grams is not None and embodied is not None and images else None
    missing = tuple(f"{job.output}: {reason}" for job in stated for reason in job.missing)
    return SciStatement(stated, images, energy, grams, embodied, per_image, missing)


def _job(job: JobEnergy, declared: Declared) -> JobSci:
    parts = []
    for kind, hours in sorted(job.hours.items()):
        entry = declared.embodied_of(kind)
        grams = None if entry is None or job.hours_missing else entry.grams(hours)
        parts.append(EmbodiedPart(kind, hours, entry, grams))
    embodied = _sum_or_none([part.grams for part in parts])
    operational, images, kwh = job.measured.gco2e, job.images_ok, job.measured.kwh
    missing = [f"E: {reason}" for reason in job.missing]
    missing += [f"I: {reason}" for reason in job.carbon_missing]
    missing += [f"M: {reason}" for reason in job.hours_missing]
    missing += [
        f"M: nothing is declared of {part.kind!r} ({OPTION} {_example(part.kind)}=KG/YEARS)"
        for part in parts
        if part.declared is None
    ]
    if not images:
        missing.append("R: no image was accepted")
    known = operational is not None and embodied is not None and images
    return JobSci(
        output=job.output,
        fingerprint=job.fingerprint,
        model=job.model,
        location=declared.location,
        begin_utc=words.moment(job.begin_unix_s),
        end_utc=words.moment(job.end_unix_s),
        evidence_class=job.evidence_class,
        energy_methods=job.energy_methods,
        included=tuple(f"{k.devices} x {k.kind} ({k.device_type})" for k in job.kinds if k.is_own),
        excluded=(*_unread_processors(job), *EXCLUDED),
        r_images=images,
        e_kwh=kwh,
        e_kwh_per_image=kwh / images if kwh is not None and images else None,
        i_gco2e_per_kwh=job.measured.gco2e_per_kwh,
        i_source=job.carbon_source,
        pue=job.pue,
        o_grams=operational,
        m_grams=embodied,
        m_parts=tuple(parts),
        sci_grams_per_image=(operational + embodied) / images if known else None,  # type: ignore[operator]
        missing=tuple(missing),
    )


def _unread_processors(job: JobEnergy) -> Iterator[str]:
    if not any(k.device_type == CPU and k.is_own for k in job.kinds):
        yield "the hosts' processors and memory: no counter of them was read"


def _example(kind: str) -> str:
    return NODE if kind == NODE else (kind.split() or ["NAME"])[-1].replace("=", "")


def _sum_or_none(parts: Sequence[float | None]) -> float | None:
    return math.fsum(p for p in parts if p is not None) if None not in parts else None


def _lines(statement: SciStatement) -> Iterator[str]:
    yield f"{statement.standard}. Functional unit: {statement.functional_unit}"
    for line in statement.method:
        yield f"method: {line}"
    for job in statement.jobs:
        yield ""
        yield f"{job.model}  {job.output}"
        yield f"  period: {job.begin_utc} to {job.end_utc}; location: {job.location or words.NOT_GIVEN}"
        yield f"  evidence class: {job.evidence_class} ({', '.join(job.energy_methods) or words.NOT_MEASURED})"
        yield f"  boundary: {'; '.join(job.included)}"
        for line in job.excluded:
            yield f"  not in it: {line}"
        yield f"  R: {job.r_images:,} accepted images"
        yield f"  E: {_number(job.e_kwh, 'kWh')}, {_number(job.e_kwh_per_image, 'kWh per image')}"
        source = f" ({job.i_source})" if job.i_source else ""
        yield f"  I: {_number(job.i_gco2e_per_kwh, 'gCO2e/kWh')}{source}; PUE {job.pue or words.NOT_GIVEN}"
        yield f"  O: {_grams(job.o_grams)}"
        yield f"  M: {_grams(job.m_grams)}"
        for part in job.m_parts:
            of = part.declared
            said = "nothing declared"
            if of is not None:
                said = f"{of.kg:g} kg over {of.years:g} years, share {of.share:g} ({of.source})"
            yield f"    {part.kind}: {part.hours:.6g} device-hours, {said}: {_grams(part.grams)}"
        for reason in job.missing:
            yield f"  missing: {reason}"
        yield f"  SCI: {_grams(job.sci_grams_per_image)} per accepted image"
    yield ""
    together = f"all {len(statement.jobs)} jobs: " if len(statement.jobs) > 1 else ""
    yield f"{together}SCI = {_grams(statement.sci_grams_per_image)} per accepted image ({counted(statement.r_images, 'image')})"


def _number(value: float | None, unit: str) -> str:
    return "missing" if value is None else f"{value:.6g} {unit}"


def _grams(value: float | None) -> str:
    return _number(value, "gCO2e")
