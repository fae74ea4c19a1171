"""The report as tables on a terminal: the page's figures without its charts and pictures.

Names and messages come from the job and are untrusted: they are shown as plain text, control characters replaced, so
that nothing in them can colour, move or clear the terminal.
"""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from millijoule.pipeline import evidence
from millijoule.pipeline.report import words
from millijoule.pipeline.report.data import JobReport, Report

#: Rows of a table before the rest is left to the page.
MAX_ROWS = 12

_LEVEL_STYLES = {"problem": "bold red", "caution": "yellow", "note": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Print every job of `report`."""
    for job in report.jobs:
        _print_job(job, console)


def _print_job(job: JobReport, console: Console) -> None:
    console.print(_plain(f"{job.model}  {job.output}", "bold"))
    made = f"{job.images_ok:,} images, {words.rate(job.speed.images_per_second)}"
    if job.images_quarantined:
        made += f", {job.images_quarantined:,} quarantined"
    meaning = evidence.MEANINGS.get(job.evidence_class)
    why = f" ({meaning})" if meaning else ""
    console.print(_plain(f"{made}; evidence class: {job.evidence_class}{why}"))
    console.print(_figures(job))
    console.print(_classes(job))
    console.print(_devices(job))
    if job.node_meters:
        console.print(_node_meters(job))
    for flag in job.flags:
        console.print(_plain(f"{flag.level}: {flag.name}: {flag.text}", _LEVEL_STYLES.get(flag.level, "")))
    for text, n in [*job.errors.items(), *job.warnings.items()][:MAX_ROWS]:
        console.print(_plain(f"{n:,} x {text}"))


def _figures(job: JobReport) -> Table:
    table = _table("", "direct", "full", "whole job", numbers=3)
    for f in (job.measured, job.estimate):
        if f.direct_mj_per_image is None and f.full_mj_per_image is None and f is job.estimate:
            continue
        missing = words.NOT_MEASURED if f.direct_mj_per_image is None else words.NOT_GIVEN
        table.add_row(_plain(f.method, "bold"))
        table.add_row(
            "  energy per image",
            words.energy(f.direct_mj_per_image),
            words.energy(f.full_mj_per_image),
            words.energy(f.total_mj),
        )
        table.add_row(
            "  images per kWh", words.count(f.direct_images_per_kwh), words.count(f.full_images_per_kwh)
        )
        table.add_row(
            "  CO2e per image",
            words.grams(f.direct_gco2e_per_image, missing),
            words.grams(f.full_gco2e_per_image, missing),
            words.grams(f.total_gco2e, missing),
        )
        table.add_row(
            "  electricity cost per image",
            words.money(f.direct_cost_per_image, missing),
            words.money(f.full_cost_per_image, missing),
            words.money(f.total_cost, missing),
        )
    if job.gpu_time is not None:
        table.add_row(_plain(words.gpus_held(job.gpu_time), "bold"))
        for row in words.gpu_rows(job.gpu_time):
            table.add_row(f"  {row[0]}", *row[1:])
    return table


def _classes(job: JobReport) -> Table:
    table = _table("class", "worker time", "share", "measured", "share", "estimate", "share", numbers=6)
    for row in job.classes:
        table.add_row(
            _plain(row.segment_class),
            words.seconds(row.worker_seconds),
            words.share(row.time_share),
            words.energy(row.energy_mj),
            words.share(row.energy_share),
            words.energy(row.estimate_mj, "-"),
            words.share(row.estimate_share),
        )
    return table


def _devices(job: JobReport) -> Table:
    table = _table("node", "device", "kind", "images", "idle", "direct per image", "estimate", numbers=4)
    for row in job.devices[:MAX_ROWS]:
        table.add_row(
            *(_plain(text) for text in (row.host, words.short_device(row.device), row.model)),
            f"{row.images:,}",
            words.share(row.time_shares.get("idle", 0.0)),
            words.energy(row.direct_mj_per_image),
            words.energy(row.direct_estimate_mj_per_image, "-"),
        )
    left = len(job.devices) + job.devices_not_shown - MAX_ROWS
    if left > 0:
        table.add_row(f"... {left} more")
    return table


def _node_meters(job: JobReport) -> Table:
    table = _table("node and meter", "its meter", "devices", "rest", "residual", "tolerance", "C3", numbers=6)
    for row in job.node_meters[:MAX_ROWS]:
        table.add_row(
            _plain(row.scope),
            *(words.energy(mj, "-") for mj in (row.node_mj, row.devices_mj, row.rest_mj)),
            words.signed_share(row.residual_share),
            words.share(row.tolerance_share),
            words.VERDICTS[row.passed],
        )
        if row.passed is None:
            table.add_row(_plain(f"  {row.note}", "dim"))
    left = len(job.node_meters) + job.node_meters_not_shown - MAX_ROWS
    if left > 0:
        table.add_row(f"... {left} more")
    return table


def _table(*heads: str, numbers: int) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, justify="right" if i >= len(heads) - numbers else "left", overflow="fold")
    return table


def _plain(text: str, style: str = "") -> Text:
    return Text(words.printable(text), style=style)
