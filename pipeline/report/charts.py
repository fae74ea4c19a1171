"""The report's charts as Bokeh figures, each with the names by which the page's filters find their parts.

A chart's parts are named "class:<segment class>" or "lane:<number>"; colours that depend on light or dark are set by
the page. No CustomJS here: it would need `eval`, which the page's content security policy forbids.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    FactorRange,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
    PrintfTickFormatter,
    Range1d,
)
from bokeh.plotting import figure

from millijoule.pipeline.report import words
from millijoule.pipeline.report.data import JobReport
from millijoule.pipeline.report.energy import GROUPS
from millijoule.pipeline.report.timeline import ESTIMATE_SOURCE, Timeline
from millijoule.workers.schemas import SEGMENT_CLASSES

CLASS_COLOURS = {
    "shard": "#1f9e89",
    "load": "#d98c1f",
    "warmup": "#e6b45c",
    "idle": "#8a94a6",
    "loser": "#c8385a",
    "retry": "#e0745c",
    "gap": "#8f63d2",
}
GROUP_COLOURS = {GROUPS[c]: CLASS_COLOURS[c] for c in reversed(SEGMENT_CLASSES)}

#: Legible on white and on near black.
LANE_COLOURS = (
    *("#3b82c4", "#d9772b", "#2e9e5b", "#cc4b4b", "#8e6cc0", "#a0705a"),
    *("#d16ba5", "#7f8c8d", "#a3a02c", "#23a3b5"),
)

#: Of an axis label; the rest is in the tooltip. Longer ones leave no room for the chart on a phone.
LABEL_CHARS = 18
MAX_SHARE_BARS = 24


@dataclass(frozen=True)
class Lane:
    """A line or bar the page can hide by node and device.

    `label` is its place on a categorical axis; a lane with a `colour` is named in the chart's key.
    """

    name: str
    host: str
    device: str
    label: str
    colour: str | None = None


@dataclass(frozen=True)
class Chart:
    """A figure, its heading and what to say under it."""

    key: str
    title: str
    caption: str
    figure: figure
    lanes: tuple[Lane, ...] = ()


def job_charts(job: JobReport) -> list[Chart]:
    """Every chart of a job that has data."""
    charts = []
    if job.timeline is not None:
        if job.timeline.power:
            charts.append(power_chart(job.timeline))
        charts.append(work_chart(job.timeline))
        charts.append(throughput_chart(job.timeline))
    if job.devices:
        charts.append(share_chart(job))
    return charts


def power_chart(timeline: Timeline) -> Chart:
    """Power per device over time; modelled power is dashed and says so."""
    modelled = timeline.power[0].source == ESTIMATE_SOURCE
    unit, per_unit = _time_unit(timeline)
    plot = _figure(260, timeline, "W (estimate)" if modelled else "W")
    source = ColumnDataSource({"t": _times(timeline, per_unit)})
    lanes = []
    for number, lane in enumerate(timeline.power):
        name = f"lane:{number}"
        colour = LANE_COLOURS[number % len(LANE_COLOURS)]
        source.data[name] = [float("nan") if w is None else w for w in lane.watts]
        look: dict[str, Any] = {"color": colour, "line_dash": "dashed" if modelled else "solid"}
        line = plot.step("t", name, source=source, mode="after", line_width=2, name=name, **look)
        # @ and $ would be read as fields, and tooltips are HTML
        device = "".join(c for c in f"{lane.host} {lane.device}" if c.isalnum() or c in " -_.:/")
        at = ("at", f"@t{{0.[00]}} {unit}")
        tooltips = [(lane.source, f"@{{{name}}}{{0.[0]}} W"), at, ("device", device)]
        plot.add_tools(HoverTool(renderers=[line], tooltips=tooltips, line_policy="nearest", visible=False))
        label = f"{lane.host} {words.short_device(lane.device)}"
        lanes.append(Lane(name, lane.host, lane.device, label, colour))
    sources = Counter(lane.source for lane in timeline.power)
    caption = (
        "Nothing was measured here: CPU time at an assumed power, averaged over each step."
        if modelled
        else "Measured: " + ", ".join(f"{n} by {source}" for source, n in sources.items()) + "."
    )
    caption += f" Steps of {timeline.step_s:.3g} s."
    if timeline.power_lanes_not_shown:
        caption += f" {timeline.power_lanes_not_shown} more devices are not drawn."
    title = "Estimated power per device (not measured)" if modelled else "Power per device"
    return Chart("power", title, caption, plot, tuple(lanes))


def work_chart(timeline: Timeline) -> Chart:
    """What every worker did: one bar per segment."""
    unit, per_unit = _time_unit(timeline)
    marks = unique_labels([f"{lane.host} {words.short_device(lane.device)}" for lane in timeline.work])
    marked = list(zip(marks, timeline.work, strict=True))
    plot = _figure(90 + 22 * len(marks), timeline, marks=marks)
    for c in SEGMENT_CLASSES:
        spans = [(mark, lane, *span) for mark, lane in marked for span in lane.spans if span[2] == c]
        if not spans:
            continue
        columns: dict[str, list[Any]] = {
            "y": [s[0] for s in spans],
            "left": [s[2] / per_unit for s in spans],
            "right": [s[3] / per_unit for s in spans],
            "worker": [f"{s[1].worker} on {s[1].host} {s[1].device}" for s in spans],
        }
        tooltips = [(c, f"@left{{0.[00]}} to @right{{0.[00]}} {unit}"), ("worker", "@worker")]
        _bars(plot, f"class:{c}", columns, CLASS_COLOURS[c], tooltips, height=0.8, line_width=0.5)
    lanes = tuple(Lane(lane.worker, lane.host, lane.device, mark) for mark, lane in marked)
    caption = "Time by the monotonic clock, measured whether or not there is an energy counter."
    if timeline.work_is_stepped:
        caption += f" Busy lanes are drawn in steps of {timeline.step_s:.3g} s, each in the class that took most of it."
    if timeline.work_lanes_not_shown:
        caption += f" {timeline.work_lanes_not_shown} more workers are not drawn."
    return Chart("work", "What each worker did", caption, plot, lanes)


def throughput_chart(timeline: Timeline) -> Chart:
    """Images per second over time."""
    unit, per_unit = _time_unit(timeline)
    plot = _figure(180, timeline, "images/s")
    source = ColumnDataSource({"t": _times(timeline, per_unit), "rate": list(timeline.images_per_second)})
    line = plot.step("t", "rate", source=source, mode="after", line_width=2, color=CLASS_COLOURS["shard"])
    tooltips = [("images/s", "@rate{0.[00]}"), ("at", f"@t{{0.[00]}} {unit}")]
    plot.add_tools(HoverTool(renderers=[line], tooltips=tooltips, mode="vline", visible=False))
    caption = "Images of committed shards, spread evenly over the time each shard took."
    return Chart("throughput", "Throughput", caption, plot)


def share_chart(job: JobReport) -> Chart:
    """Parts of images, load, idle and waste: energy of the whole job, then worker time per device."""
    bars: list[tuple[str, str, str, dict[str, float]]] = []  # label, host, device, share per group
    energy, modelled = _shares(job, "energy_share"), _shares(job, "estimate_share")
    if energy:
        bars.append(("energy", "", "", energy))
    elif modelled:
        bars.append(("energy (estimate)", "", "", modelled))
    if times := _shares(job, "time_share"):
        bars.append(("worker time", "", "", times))
    bars += [
        (f"{r.host} {words.short_device(r.device)}", r.host, r.device, r.time_shares)
        for r in job.devices[:MAX_SHARE_BARS]
        if r.time_shares
    ]
    marks = unique_labels([bar[0] for bar in bars])
    plot = _figure(80 + 24 * len(bars), marks=marks)
    plot.x_range = Range1d(start=0, end=1)
    plot.xaxis.formatter = NumeralTickFormatter(format="0%")
    plot.xaxis.ticker = FixedTicker(ticks=[0, 0.25, 0.5, 0.75, 1])
    left = [0.0] * len(bars)
    for group in dict.fromkeys(GROUPS.values()):
        parts = [bar[3].get(group, 0.0) for bar in bars]
        if not any(parts):
            continue
        right = [a + b for a, b in zip(left, parts, strict=True)]
        columns: dict[str, list[Any]] = {"y": marks, "left": left, "right": right, "part": parts}
        tooltips = [(group, "@part{0.0%}"), ("of", "@y")]
        _bars(plot, f"group:{group}", columns, GROUP_COLOURS[group], tooltips, height=0.75, line_width=0)
        left = right
    what = "measured energy" if energy else "estimated energy (not measured)" if modelled else None
    caption = (f"First bar: {what} of the job. " if what else "") + "Other bars: worker time."
    if len(job.devices) > MAX_SHARE_BARS:
        caption += f" {len(job.devices) - MAX_SHARE_BARS} more devices are in the table only."
    lanes = tuple(
        Lane(mark, host, device, mark) for mark, (_, host, device, _) in zip(marks, bars, strict=True)
    )
    return Chart("shares", "Images, load, idle and waste", caption, plot, lanes)


def _bars(
    plot: figure,
    name: str,
    columns: Mapping[str, Sequence[Any]],
    colour: str,
    tooltips: list[tuple[str, str]],
    *,
    height: float,
    line_width: float,
) -> None:
    """Horizontal bars from `left` to `right` at `y`, and what they say when one points at them."""
    source = ColumnDataSource(dict(columns))
    look: dict[str, Any] = {"height": height, "color": colour, "line_width": line_width}
    bars = plot.hbar(y="y", left="left", right="right", source=source, name=name, **look)
    plot.add_tools(HoverTool(renderers=[bars], tooltips=tooltips, visible=False))


def _shares(job: JobReport, field: str) -> dict[str, float]:
    shares: dict[str, float] = defaultdict(float)
    for row in job.classes:
        if (value := getattr(row, field)) is not None:
            shares[row.group] += value
    return shares


def _figure(
    height: int, timeline: Timeline | None = None, y_label: str | None = None, marks: Sequence[str] = ()
) -> figure:
    """An empty chart: over time where there is a `timeline`, of bars at `marks`, or else of amounts, from 0 on."""
    amounts = DataRange1d(start=0, range_padding=0.15)
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        tools="xpan,xbox_zoom,reset,save",
        active_drag=None,  # a finger on a chart must still scroll the page
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=12,
        y_range=FactorRange(factors=marks[::-1], range_padding=0.05) if marks else amounts,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    if marks:
        plot.ygrid.grid_line_color = None
    plot.yaxis.axis_label = y_label
    if timeline is not None:
        unit, per_unit = _time_unit(timeline)
        plot.xaxis.formatter = PrintfTickFormatter(format=f"%.6g {unit}")  # since the start
        plot.x_range = Range1d(start=0, end=timeline.steps * timeline.step_s / per_unit)
    return plot


def _time_unit(timeline: Timeline) -> tuple[str, float]:
    length_s = timeline.steps * timeline.step_s
    if length_s < 300:
        return "s", 1.0
    return ("min", 60.0) if length_s < 3 * 3600 else ("h", 3600.0)


def _times(timeline: Timeline, per_unit: float) -> list[float]:
    return [float(f"{i * timeline.step_s / per_unit:.6g}") for i in range(timeline.steps)]


def unique_labels(texts: Sequence[str]) -> list[str]:
    """`texts` shortened, equal ones numbered: categories of an axis must differ."""
    labels: dict[str, None] = {}
    for text in texts:
        half = LABEL_CHARS // 2 - 1
        short = text if len(text) <= LABEL_CHARS else f"{text[:half]}..{text[-half:]}"
        label, number = short, 1
        while label in labels:
            number += 1
            label = f"{short} #{number}"
        labels[label] = None
    return list(labels)
