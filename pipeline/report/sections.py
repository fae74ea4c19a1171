"""The parts of the report page, one function per part, as HTML. Every text goes through `html.escape` on its way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from millijoule.pipeline.energy import evidence
from millijoule.pipeline.report import words
from millijoule.pipeline.report.charts import CLASS_COLOURS, Chart
from millijoule.pipeline.report.data import JobReport
from millijoule.pipeline.report.devices import DeviceRow
from millijoule.pipeline.report.energy import EnergyFigures, RateUsed
from millijoule.pipeline.report.gallery import Sample
from millijoule.pipeline.report.markup import Row, search_box, table

#: Pictures up to this size are enlarged with hard edges, as they are.
SMALL_PIXELS = 64
#: A chart with more lines has its key folded.
MAX_OPEN_KEY = 12


def job_section(number: int, job: JobReport, charts: Sequence[Chart]) -> str:
    """Everything about one job."""
    return "\n".join(
        [
            f'<section class="job" id="job-{number}">',
            f"<h2>{escape(job.model)}</h2>",
            f'<p class="soft">{escape(job.output)} &middot; job {escape(job.fingerprint[:12])} &middot; weights '
            f"{escape(job.model_sha256[:12])} &middot; millijoule {escape(job.millijoule_version)}"
            + (f" &middot; began {words.moment(job.timeline.start_unix_s)}" if job.timeline else "")
            + "</p>",
            "".join(f'<p class="soft">{escape(_versions(v))}</p>' for v in job.software),
            _cards(job),
            _flags(job),
            "<h3>Energy, carbon and money</h3>",
            _figures_table(job),
            "<h3>Over time</h3>",
            _filters(job),
            *(_chart(number, chart) for chart in charts),
            "<h3>Where the energy and the time went</h3>",
            _classes_table(job),
            "<h3>Nodes</h3>",
            _nodes_table(job),
            "<h3>Devices</h3>",
            search_box(f"devices-{number}", "filter devices"),
            _devices_table(f"devices-{number}", job),
            "<h3>Kinds of device</h3>",
            _models_table(job),
            "<h3>Speed and stragglers</h3>",
            _speed(job),
            "<h3>Node meters beside devices</h3>",
            _node_meters(job),
            "<h3>Closure: does the energy add up?</h3>",
            _closure(number, job),
            _messages(job),
            "<h3>First images</h3>",
            _gallery(number, job.samples),
            "</section>",
        ]
    )


def _versions(software: dict[str, str]) -> str:
    return ", ".join(f"{name.removesuffix('_version')} {version}" for name, version in software.items())


def _cards(job: JobReport) -> str:
    m, e = job.measured, job.estimate
    cards = [
        _card("Energy per image", *_pair(m, e, "mj_per_image", words.energy), m, e),
        _card("Images per kWh", *_pair(m, e, "images_per_kwh", words.count), m, e),
    ]
    if job.carbon is not None:
        cards.append(_card("CO2e per image", *_pair(m, e, "gco2e_per_image", words.grams), m, e))
    if job.price is not None:
        cards.append(_card("Electricity per image", *_pair(m, e, "cost_per_image", words.money), m, e))
    if job.gpu_time is not None and job.gpu_time.total_cost is not None:
        gpu = job.gpu_time
        full = f"direct; {words.money(gpu.full_cost_per_image)} full, with loading, idling and waste"
        cards.append(_plain_card("GPU time per image", words.money(gpu.direct_cost_per_image), full))
    made = f"{job.images_ok:,} images"
    rest = [words.byte_count(job.encoded_bytes)]
    if job.images_quarantined:
        rest.append(f"{job.images_quarantined:,} quarantined")
    if job.input_rows_rejected:
        rest.append(f"{job.input_rows_rejected:,} input rows rejected")
    cards.append(_plain_card("Made", made, ", ".join(rest)))
    speed = words.rate(job.speed.images_per_second)
    cards.append(
        _plain_card(
            "Throughput", speed, f"{words.seconds(job.speed.seconds)} from first start to last commit"
        )
    )
    meaning = evidence.MEANINGS.get(job.evidence_class, "this output records none")
    cards.append(_plain_card("Evidence class", job.evidence_class, meaning))
    return f'<div class="cards">{"".join(cards)}</div>'


def _pair(
    m: EnergyFigures, e: EnergyFigures, name: str, say: Any
) -> tuple[tuple[str, str] | None, tuple[str, str] | None]:
    """(direct, full) in words, measured and estimated; None where there is neither."""

    def both(figures: EnergyFigures) -> tuple[str, str] | None:
        direct, full = getattr(figures, f"direct_{name}"), getattr(figures, f"full_{name}")
        missing = words.NOT_MEASURED
        return None if direct is None and full is None else (say(direct, missing), say(full, missing))

    return both(m), both(e)


def _card(
    title: str,
    measured: tuple[str, str] | None,
    estimate: tuple[str, str] | None,
    m: EnergyFigures,
    e: EnergyFigures,
) -> str:
    """Direct large, full below; the estimate only where nothing was measured, and labelled."""
    if measured is not None:
        inside = (
            f'<div class="value">{_joined(measured[0])}</div><div class="soft">direct; {_joined(measured[1])} full</div>'
            f'<span class="badge measured">{escape(m.method)}</span>'
        )
    else:
        inside = f'<div class="value missing">{words.NOT_MEASURED}</div>'
        if estimate is not None:
            inside += (
                f'<div class="estimate soft">about {_joined(estimate[0])} direct, {_joined(estimate[1])} full<br>'
                f'<span class="badge modelled">{escape(e.method)}</span></div>'
            )
    return f'<div class="card"><h4>{escape(title)}</h4>{inside}</div>'


def _joined(figure: str) -> str:
    """A figure that is not torn from its unit at the end of a line."""
    return escape(figure).replace(" ", "&nbsp;")


def _plain_card(title: str, value: str, below: str) -> str:
    return (
        f'<div class="card"><h4>{escape(title)}</h4><div class="value">{escape(value)}</div>'
        f'<div class="soft">{escape(below)}</div></div>'
    )


def _flags(job: JobReport) -> str:
    """Problems and cautions in the open, notes folded."""
    items = {True: "", False: ""}
    for f in job.flags:
        item = f'<li class="flag {escape(f.level)}"><strong>{escape(f.name)}</strong>: {escape(f.text)}</li>'
        items[f.level == "note"] += item
    notes = sum(f.level == "note" for f in job.flags)
    folded = f'<details><summary>notes: {notes}</summary><ul class="flags">{items[True]}</ul></details>'
    return f'<ul class="flags">{items[False]}</ul>' + (folded if notes else "")


def _figures_table(job: JobReport) -> str:
    rows: list[Row] = []
    for figures in (job.measured, job.estimate):
        missing = words.NOT_MEASURED if figures.direct_mj_per_image is None else words.NOT_GIVEN
        f = figures
        rows += [
            Row((f.method,), is_section=True),
            Row.of(
                "energy per image",
                words.energy(f.direct_mj_per_image),
                words.energy(f.full_mj_per_image),
                words.energy(f.total_mj),
            ),
            Row.of(
                "images per kWh", words.count(f.direct_images_per_kwh), words.count(f.full_images_per_kwh), ""
            ),
            Row.of(
                "CO2e per image",
                words.grams(f.direct_gco2e_per_image, missing),
                words.grams(f.full_gco2e_per_image, missing),
                words.grams(f.total_gco2e, missing),
            ),
            Row.of(
                "electricity cost per image",
                words.money(f.direct_cost_per_image, missing),
                words.money(f.full_cost_per_image, missing),
                words.money(f.total_cost, missing),
            ),
        ]
    if job.gpu_time is not None:
        rows.append(Row((words.gpus_held(job.gpu_time),), is_section=True))
        rows += [Row.of(*row) for row in words.gpu_rows(job.gpu_time)]
    heads = ("", "direct", "full", "whole job")
    notes = [
        "Direct: used while images were made. Full: direct and an equal share of loading, idling, waste and gaps.",
        _rate_words("Carbon intensity, location-based", "gCO2e/kWh", job.carbon),
        _rate_words("Electricity price", "per kWh", job.price),
        f"PUE: {job.pue:g}, declared; it multiplies grams and money, never joules."
        if job.pue
        else "PUE: not given.",
        *([] if job.gpu_time is None else [words.gpu_prices(job.gpu_time)]),
    ]
    return table(heads, rows, numbers=(1, 2, 3)) + "".join(f'<p class="soft">{escape(n)}</p>' for n in notes)


def _rate_words(name: str, unit: str, used: RateUsed | None) -> str:
    if used is None:
        return f"{name}: not given."
    mean = "not applied" if used.mean_per_kwh is None else f"{used.mean_per_kwh:.4g} {unit}"
    fallback = (
        "none" if not used.fallback else f"yes, {words.share(used.fallback_share, 'unknown')} of the energy"
    )
    return f"{name}: {mean}, weighted by {used.weighted_by}; source: {used.source}; fallback: {fallback}."


def _filters(job: JobReport) -> str:
    places = {(row.host, row.device) for row in job.devices}
    if job.timeline is not None:
        places |= {(lane.host, lane.device) for lane in job.timeline.power}
    nodes, devices = sorted({p[0] for p in places}), sorted({p[1] for p in places})
    boxes = "".join(
        f'<label><input type="checkbox" checked data-class="{escape(row.segment_class)}" '
        f'data-group="{escape(row.group)}"><span class="swatch" style="background:{CLASS_COLOURS[row.segment_class]}">'
        f"</span>{escape(row.segment_class)}</label>"
        for row in job.classes
    )
    return (
        f'<div class="filters">{_select("node", nodes)}{_select("device", devices)}</div>'
        f'<div class="filters" role="group" aria-label="segment classes">{boxes}</div>'
    )


def _select(name: str, values: Iterable[str]) -> str:
    options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
    return (
        f'<label>{name} <select data-filter="{name}"><option value="">all</option>{options}</select></label>'
    )


def _chart(number: int, chart: Chart) -> str:
    named = "".join(
        f'<li data-host="{escape(lane.host)}" data-device="{escape(lane.device)}">'
        f'<span class="swatch" style="background:{lane.colour}"></span>{escape(lane.label)}</li>'
        for lane in chart.lanes
        if lane.colour
    )
    key = f'<ul class="key">{named}</ul>' if named else ""
    if named and len(chart.lanes) > MAX_OPEN_KEY:
        key = f"<details><summary>{len(chart.lanes)} lines</summary>{key}</details>"
    return (
        f'<figure><strong>{escape(chart.title)}</strong><div class="chart" id="chart-{number}-{chart.key}"></div>'
        f"{key}<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _classes_table(job: JobReport) -> str:
    rows = [
        Row.of(
            row.segment_class,
            row.group,
            words.seconds(row.worker_seconds),
            words.share(row.time_share),
            words.energy(row.energy_mj),
            words.share(row.energy_share),
            words.energy(row.estimate_mj, "-"),
            words.share(row.estimate_share),
            attributes={"class": row.segment_class},
        )
        for row in job.classes
    ]
    heads = ("class", "counts as", "worker time", "share", "measured", "share", "estimate", "share")
    return table(heads, rows, numbers=range(2, 8))


def _devices_table(name: str, job: JobReport) -> str:
    rows = [
        Row.of(r.host, r.device, r.model, *_device_cells(r), attributes={"host": r.host, "device": r.device})
        for r in job.devices
    ]
    more = f'<p class="soft">{job.devices_not_shown} more devices.</p>' if job.devices_not_shown else ""
    return table(("node", "device", "kind", *_DEVICE_HEADS), rows, numbers=range(3, 14), name=name) + more


def _nodes_table(job: JobReport) -> str:
    rows = [
        Row.of(r.host, r.device, r.model, *_device_cells(r), attributes={"host": r.host, "device": ""})
        for r in job.nodes
    ]
    more = f'<p class="soft">{job.nodes_not_shown} more nodes.</p>' if job.nodes_not_shown else ""
    return table(("node", "devices", "kind", *_DEVICE_HEADS), rows, numbers=range(3, 14)) + more


def _models_table(job: JobReport) -> str:
    rows = [Row.of(r.model, r.host, r.device, *_device_cells(r)) for r in job.models]
    return table(("kind", "nodes", "devices", *_DEVICE_HEADS), rows, numbers=range(3, 14))


_DEVICE_HEADS = (
    *("workers", "images", "images/s per worker", "time: images", "load", "idle", "waste"),
    *("direct per image", "full per image", "estimate direct", "estimate full"),
)


def _device_cells(row: DeviceRow) -> tuple[str, ...]:
    return (
        f"{row.workers:,}",
        f"{row.images:,}",
        words.count(row.images_per_worker_second, "-"),
        *(words.share(row.time_shares.get(g, 0.0)) for g in ("images", "load", "idle", "waste")),
        words.energy(row.direct_mj_per_image),
        words.energy(row.full_mj_per_image),
        words.energy(row.direct_estimate_mj_per_image, "-"),
        words.energy(row.full_estimate_mj_per_image, "-"),
    )


def _speed(job: JobReport) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in words.speed(job.speed))
    if not job.speed.slowest:
        return lines
    rows = [
        Row.of(
            str(r.shard_id),
            r.worker,
            r.host,
            r.device,
            f"{r.images:,}",
            words.seconds(r.seconds),
            f"{r.times_median:.2f} x",
            attributes={"host": r.host, "device": r.device},
        )
        for r in job.speed.slowest
    ]
    heads = ("shard", "worker", "node", "device", "images", "took", "times the median")
    return lines + table(heads, rows, numbers=(0, 4, 5, 6))


def _node_meters(job: JobReport) -> str:
    if not job.node_meters:
        return '<p class="soft">No node\'s own meter was read.</p>'
    rows = [
        Row.of(
            r.scope,
            words.seconds(r.seconds),
            words.energy(r.node_mj, "-"),
            words.energy(r.devices_mj, "-"),
            words.energy(r.rest_mj, "-"),
            words.residual(r.residual_mj, r.residual_share, None),
            words.residual(None, r.tolerance_share, None),
            words.VERDICTS[r.passed],
            r.note,
        )
        for r in job.node_meters
    ]
    heads = (
        *("node and meter", "both known for", "the node's meter", "its devices", "declared rest"),
        *("residual", "tolerance", "result", "note"),
    )
    more = f'<p class="soft">{job.node_meters_not_shown} more.</p>' if job.node_meters_not_shown else ""
    return (
        "<p>Residual: devices and declared rest minus the node's meter. It is stated, never spread.</p>"
        + table(heads, rows, numbers=range(1, 7))
        + more
    )


def _closure(number: int, job: JobReport) -> str:
    closure = job.closure
    if closure.rows is None:
        return '<p class="soft">Not recorded in this output.</p>'
    rows = [
        Row.of(
            r["check"],
            words.CHECKS.get(r["check"], ""),
            r["scope"],
            words.energy(r["expected_mj"], "-"),
            words.energy(r["found_mj"], "-"),
            words.residual(r["residual_mj"], r["residual_share"], r["residual_ns"]),
            words.residual(None, r["tolerance_share"], r["tolerance_ns"]),
            words.VERDICTS[r["passed"]],
            r["note"],
        )
        for r in closure.rows
    ]
    text = f"{closure.checks:,} checks, {closure.failed:,} failed."
    if closure.checks > len(rows):
        text += f" The first {len(rows)} are listed."
    heads = ("check", "of what", "scope", "expected", "found", "residual", "tolerance", "result", "note")
    name = f"closure-{number}"
    return (
        f"<p>{text}</p>"
        + search_box(name, "filter checks")
        + table(heads, rows, numbers=range(3, 7), name=name)
    )


def _messages(job: JobReport) -> str:
    parts = []
    for title, messages in (("Errors", job.errors), ("Warnings", job.warnings)):
        if messages:
            rows = [Row.of(f"{n:,}", text) for text, n in messages.items()]
            parts.append(f"<h3>{title}</h3>" + table(("images", "message"), rows, numbers=(0,)))
    return "".join(parts)


def _gallery(number: int, samples: Sequence[Sample]) -> str:
    if not samples:
        return '<p class="soft">No images in the manifest.</p>'
    name = f"gallery-{number}"
    items = "".join(_sample(sample) for sample in samples)
    intro = f'<p class="soft">The first {len(samples)} images of the manifest, not picked.</p>'
    return f'{intro}{search_box(name, "filter prompts")}<ul class="gallery" id="{name}">{items}</ul>'


def _sample(sample: Sample) -> str:
    small = max(sample.width or 0, sample.height or 0) <= SMALL_PIXELS
    picture = (
        f'<img{" class=small" if small else ""} src="{escape(sample.picture)}" alt="">'
        if sample.picture
        else '<span class="blank">not shown</span>'
    )
    energy = "" if sample.energy_mj is None else f" &middot; {words.energy(sample.energy_mj)}"
    warnings = "".join(f'<span class="soft">{escape(w)}</span>' for w in sample.warnings[:3])
    size = f"{sample.width}x{sample.height}" if sample.width and sample.height else ""
    return (
        f'<li>{picture}<span class="prompt" dir="auto">{escape(sample.prompt)}</span>'
        f'<span class="soft">{size}{energy}</span>{warnings}</li>'
    )


def comparison_section(jobs: Sequence[JobReport]) -> str:
    """The table that stands above several jobs."""
    rows = []
    for job in jobs:
        m, e = job.measured, job.estimate
        rows.append(
            Row.of(
                job.model,
                job.output,
                f"{job.images_ok:,}",
                words.rate(job.speed.images_per_second),
                words.energy(m.direct_mj_per_image),
                words.energy(m.full_mj_per_image),
                words.energy(e.direct_mj_per_image, "-"),
                words.energy(e.full_mj_per_image, "-"),
                job.evidence_class,
            )
        )
    heads = (
        *("model", "output", "images", "throughput", "measured direct", "measured full"),
        *("estimate direct", "estimate full", "evidence"),
    )
    note = '<p class="soft">Jobs of different runs: not a controlled comparison.</p>'
    return f"<h2>{len(jobs)} jobs</h2>{table(heads, rows, numbers=range(2, 8))}{note}"
