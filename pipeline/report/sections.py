"""The parts of the report page, one function per part, as HTML. Every text goes through `html.escape` on its way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from millijoule.pipeline.energy import evidence
from millijoule.pipeline.energy.closure import CHECKS
from millijoule.pipeline.report import cells, words
from millijoule.pipeline.report.charts import CLASS_COLOURS, Chart
from millijoule.pipeline.report.data import JobReport
from millijoule.pipeline.report.devices import DeviceRow
from millijoule.pipeline.report.energy import REJECTED, SHARD, ClassShare, RateUsed
from millijoule.pipeline.report.gallery import Sample
from millijoule.pipeline.report.markup import Row, search_box, table
from millijoule.workers.counted import counted

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
            _soft(
                ", ".join(f"{name.removesuffix('_version')} {version}" for name, version in versions.items())
                for versions in job.software
            ),
            _cards(job),
            _flags(job),
            "<h3>Energy, carbon and money</h3>",
            _figures_table(job),
            "<h3>Over time</h3>",
            _filters(job),
            *(_chart(number, chart) for chart in charts),
            "<h3>Where the energy and the time went</h3>",
            table(
                cells.CLASS_HEADS,
                [Row(cells.class_cells(row), {"class": _segments_of(row)}) for row in job.classes],
                numbers=range(2, 8),
            ),
            "<h3>Nodes</h3>",
            _work_table(
                ("node", "devices", "kind"),
                [_work_row(r, r.host, r.device, r.model, host=r.host, device="") for r in job.nodes],
            )
            + _more(job.nodes_not_shown, " nodes"),
            "<h3>Devices</h3>",
            search_box(f"devices-{number}", "filter devices"),
            _work_table(
                ("node", "device", "kind"),
                [_work_row(r, r.host, r.device, r.model, host=r.host, device=r.device) for r in job.devices],
                f"devices-{number}",
            )
            + _more(job.devices_not_shown, " devices"),
            "<h3>Kinds of device</h3>",
            _work_table(
                ("kind", "nodes", "devices"), [_work_row(r, r.model, r.host, r.device) for r in job.models]
            ),
            *(
                [
                    "<h3>Pools</h3>",
                    table(
                        cells.POOL_HEADS,
                        map(Row, cells.pool_cells(job)),
                        numbers=range(1, len(cells.POOL_HEADS)),
                    ),
                ]
                if job.pools
                else []
            ),
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


def _cards(job: JobReport) -> str:
    cards = [
        _figure_card(job, "Energy per image", "mj_per_image", words.energy),
        _figure_card(job, "Images per kWh", "images_per_kwh", words.count),
    ]
    if job.carbon is not None:
        cards.append(_figure_card(job, "CO2e per image", "gco2e_per_image", words.grams))
    if job.price is not None:
        cards.append(_figure_card(job, "Electricity per image", "cost_per_image", words.money))
    if job.gpu_time is not None and job.gpu_time.total_cost is not None:
        gpu = job.gpu_time
        full = f"direct; {words.money(gpu.full_cost_per_image)} full, with loading, idling and waste"
        cards.append(_card("GPU time per image", words.money(gpu.direct_cost_per_image), full))
    rest = [words.byte_count(job.encoded_bytes)]
    rest += cells.not_made(job)
    if job.input_rows_rejected:
        rest.append(f"{counted(job.input_rows_rejected, 'input row')} rejected")
    took = f"{words.seconds(job.speed.seconds)} from first start to last commit"
    meaning = evidence.MEANINGS.get(job.evidence_class, "this output records none")
    cards += [
        _card("Made", counted(job.images_ok, "image"), ", ".join(rest)),
        _card("Throughput", words.rate(job.speed.images_per_second), took),
        _card("Evidence class", job.evidence_class, meaning),
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _figure_card(job: JobReport, title: str, name: str, say: Callable[[float | None, str], str]) -> str:
    """Direct large, full below; the estimate only where nothing was measured, and labelled."""
    (direct, full), (about, about_full) = (
        (getattr(f, f"direct_{name}"), getattr(f, f"full_{name}")) for f in (job.measured, job.estimate)
    )

    def joined(figure: float | None) -> str:
        """A figure that is not torn from its unit at the end of a line."""
        return escape(say(figure, words.NOT_MEASURED)).replace(" ", "&nbsp;")

    if direct is not None or full is not None:
        inside = (
            f'<div class="value">{joined(direct)}</div><div class="soft">direct; {joined(full)} full</div>'
            f'<span class="badge measured">{escape(job.measured.method)}</span>'
        )
    else:
        inside = f'<div class="value missing">{words.NOT_MEASURED}</div>'
        if about is not None or about_full is not None:
            inside += (
                f'<div class="estimate soft">about {joined(about)} direct, {joined(about_full)} full<br>'
                f'<span class="badge modelled">{escape(job.estimate.method)}</span></div>'
            )
    return f'<div class="card"><h4>{escape(title)}</h4>{inside}</div>'


def _card(title: str, value: str, below: str) -> str:
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
    for title, figures in cells.figure_sections(job):
        rows += [Row((title,), is_section=True), *(Row(figure) for figure in figures)]
    notes = [
        "Direct: used while images were made. Full: direct and an equal share of loading, idling, waste and gaps.",
        _rate_words("Carbon intensity, location-based", "gCO2e/kWh", job.carbon),
        _rate_words("Electricity price", "per kWh", job.price),
        f"PUE: {f'{job.pue:g}, declared; it multiplies grams and money, never joules' if job.pue else 'not given'}.",
    ]
    if job.gpu_time is not None:
        notes.append(cells.gpu_prices(job.gpu_time))
    return table(cells.FIGURE_HEADS, rows, numbers=(1, 2, 3)) + _soft(notes)


def _soft(lines: Iterable[str]) -> str:
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


def _rate_words(name: str, unit: str, used: RateUsed | None) -> str:
    if used is None:
        return f"{name}: not given."
    mean = "not applied" if used.mean_per_kwh is None else f"{used.mean_per_kwh:.4g} {unit}"
    share = words.share(used.fallback_share, "unknown")
    fallback = f"yes, {share} of the energy" if used.fallback else "none"
    return f"{name}: {mean}, weighted by {used.weighted_by}; source: {used.source}; fallback: {fallback}."


def _filters(job: JobReport) -> str:
    pairs = {(row.host, row.device) for row in job.devices}
    if job.timeline is not None:
        pairs |= {(lane.host, lane.device) for lane in job.timeline.power}
    nodes, devices = sorted({p[0] for p in pairs}), sorted({p[1] for p in pairs})
    boxes = "".join(
        f'<label><input type="checkbox" checked data-class="{escape(row.segment_class)}" '
        f'data-group="{escape(row.group)}"><span class="swatch" style="background:{CLASS_COLOURS[row.segment_class]}">'
        f"</span>{escape(row.segment_class)}</label>"
        for row in job.classes
        if row.segment_class == _segments_of(row)
    )
    return (
        f'<div class="filters">{_select("node", nodes)}{_select("device", devices)}</div>'
        f'<div class="filters" role="group" aria-label="segment classes">{boxes}</div>'
    )


def _segments_of(row: ClassShare) -> str:
    """The class of the segments that hold the energy of `row`."""
    return SHARD if row.segment_class in REJECTED else row.segment_class


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


def _work_table(heads: Sequence[str], rows: Iterable[Row], name: str = "") -> str:
    figures = (
        *("workers", "images", "images/s per worker", "time: images", "load", "idle", "waste"),
        *("direct per image", "full per image", "estimate direct", "estimate full"),
    )
    return table((*heads, *figures), rows, numbers=range(3, 14), name=name)


def _work_row(row: DeviceRow, *names: str, **attributes: str) -> Row:
    shares = (words.share(row.time_shares.get(g, 0.0)) for g in ("images", "load", "idle", "waste"))
    speed = words.count(row.images_per_worker_second, "-")
    figures = (f"{row.workers:,}", f"{row.images:,}", speed, *shares, *cells.energy_cells(row))
    return Row((*names, *figures), attributes)


def _more(hidden: int, what: str = "") -> str:
    return f'<p class="soft">{hidden} more{what}.</p>' if hidden else ""


def _speed(job: JobReport) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in cells.speed(job.speed))
    if not job.speed.slowest:
        return lines
    rows = []
    for r in job.speed.slowest:
        texts = (str(r.shard_id), r.worker, r.host, r.device, *cells.straggler_cells(r))
        rows.append(Row(texts, {"host": r.host, "device": r.device}))
    heads = ("shard", "worker", "node", "device", "images", "took", "times the median")
    return lines + table(heads, rows, numbers=(0, 4, 5, 6))


def _node_meters(job: JobReport) -> str:
    if not job.node_meters:
        return '<p class="soft">No node\'s own meter was read.</p>'
    rows = []
    for r in job.node_meters:
        residual = words.residual(r.residual_mj, r.residual_share, None)
        tolerance = words.residual(None, r.tolerance_share, None)
        figures = (words.seconds(r.seconds), *cells.meter_cells(r), residual, tolerance)
        rows.append(Row((r.scope, *figures, cells.VERDICTS[r.passed], r.note)))
    heads = (
        *("node and meter", "both known for", "the node's meter", "its devices", "declared rest"),
        *("residual", "tolerance", "result", "note"),
    )
    note = "<p>Residual: devices and declared rest minus the node's meter. It is stated, never spread.</p>"
    return note + table(heads, rows, numbers=range(1, 7)) + _more(job.node_meters_not_shown)


def _closure(number: int, job: JobReport) -> str:
    closure = job.closure
    if closure.rows is None:
        return '<p class="soft">Not recorded in this output.</p>'
    rows = [
        Row((r["check"], CHECKS.get(r["check"], ""), r["scope"], *cells.check_cells(r), r["note"]))
        for r in closure.rows
    ]
    text = f"{counted(closure.checks, 'check')}, {closure.failed:,} failed."
    if closure.checks > len(rows):
        text += f" The first {len(rows)} are listed."
    heads = ("check", "of what", "scope", "expected", "found", "residual", "tolerance", "result", "note")
    name = f"closure-{number}"
    listed = table(heads, rows, numbers=range(3, 7), name=name)
    return f"<p>{text}</p>{search_box(name, 'filter checks')}{listed}"


def _messages(job: JobReport) -> str:
    parts = []
    for title, messages in cells.messages(job):
        rows = [Row((f"{n:,}", text)) for text, n in messages.items()]
        parts.append(f"<h3>{escape(title)}</h3>" + table(("images", "message"), rows, numbers=(0,)))
    return "".join(parts)


def _gallery(number: int, samples: Sequence[Sample]) -> str:
    if not samples:
        return '<p class="soft">No images in the manifest.</p>'
    name = f"gallery-{number}"
    items = "".join(map(_sample, samples))
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
        made = (job.model, job.output, f"{job.images_ok:,}", words.rate(job.speed.images_per_second))
        measured = (words.energy(mj) for mj in (m.direct_mj_per_image, m.full_mj_per_image))
        estimated = (words.energy(mj, "-") for mj in (e.direct_mj_per_image, e.full_mj_per_image))
        rows.append(Row((*made, *measured, *estimated, job.evidence_class)))
    heads = (
        *("model", "output", "images", "throughput", "measured direct", "measured full"),
        *("estimate direct", "estimate full", "evidence"),
    )
    note = '<p class="soft">Jobs of different runs: not a controlled comparison.</p>'
    return f"<h2>{len(jobs)} jobs</h2>{table(heads, rows, numbers=range(2, 8))}{note}"
