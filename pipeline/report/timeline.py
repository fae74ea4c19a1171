"""A job over time, in a bounded number of points: what every worker did, what every device drew, how fast images came.

The energy tables go in; lanes over a common grid of time steps come out, so that a page of an hour and one of a month
are equally large. Nothing is invented between readings: power is energy over time, null where no counter was read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pyarrow as pa

from millijoule.pipeline.report.tables import floats, labels, rows_of_each
from millijoule.workers.schemas import SEGMENT_CLASSES

#: Steps of the grid, and lanes that are drawn: 6,400 points of power at most.
STEPS = 200
MAX_LANES = 32
#: Spans of the work chart in all; lanes with more are drawn step by step.
MAX_SPANS = 3000
#: Below this a grid would be finer than the clocks of two hosts agree.
MIN_STEP_SECONDS = 0.001

ESTIMATE_SOURCE = "estimate"
COUNTER_SOURCE = "counter"
POWER_SOURCE = "power reading"


@dataclass(frozen=True)
class HostDevice:
    """Where a worker ran."""

    host: str
    device: str


@dataclass(frozen=True)
class Work:
    """Every segment once, as arrays `[n]`; times are seconds since 1970.

    `energy_mj` is NaN unless all domains of the segment were measured. `gap_*` are the energies nobody can be
    charged with.
    """

    workers: tuple[str, ...]
    worker: np.ndarray
    classes: tuple[str, ...]
    segment_class: np.ndarray
    begin_s: np.ndarray
    end_s: np.ndarray
    energy_mj: np.ndarray
    estimate_mj: np.ndarray
    boot_of_worker: Mapping[str, str]
    clock_offset_s: Mapping[str, float]  # wall minus monotonic clock, per boot
    gap_classes: tuple[str, ...]
    gap_begin_s: np.ndarray
    gap_end_s: np.ndarray
    gap_energy_mj: np.ndarray

    def of_class(self, *names: str) -> np.ndarray:
        """bool `[n]`."""
        return np.isin(self.segment_class, [i for i, c in enumerate(self.classes) if c in names])

    def seconds_per_step(self, rows: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """Seconds of the segments `rows`, a mask, in each step: `[len(edges) - 1]`."""
        begin, end = self.begin_s[rows], self.end_s[rows]
        return spread(begin, end, end - begin, edges)


@dataclass(frozen=True)
class PowerLane:
    """Mean power of one device per step, watts; null where it was not read.

    `source` is "counter" (differences of an energy counter), "power reading" (the device's own average) or
    "estimate" (modelled, not measured).
    """

    host: str
    device: str
    source: str
    watts: tuple[float | None, ...]


#: Host, device, and what draws their lane: of a large fleet few are shown.
UndrawnLane = tuple[str, str, Callable[[], PowerLane]]


@dataclass(frozen=True)
class WorkLane:
    """What one worker did: `[begin, end, class]` in seconds since the timeline's start."""

    worker: str
    host: str
    device: str
    spans: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True)
class Timeline:
    """All lanes over one grid: step i begins at `start_unix_s + i * step_s`."""

    start_unix_s: float
    step_s: float
    steps: int
    power: tuple[PowerLane, ...]
    power_lanes_not_shown: int
    work: tuple[WorkLane, ...]
    work_lanes_not_shown: int
    work_is_stepped: bool
    images_per_second: tuple[float, ...]


def read_work(segments: pa.Table) -> Work:
    """The segment table as `Work`."""
    is_gap = segments["segment_id"].is_null().to_numpy(zero_copy_only=False)
    ids = np.nan_to_num(floats(segments["segment_id"]), nan=-1).astype(np.int64)
    begin, end = floats(segments["t_open_mono_ns"]) / 1e9, floats(segments["t_close_mono_ns"]) / 1e9
    wall = floats(segments["t_open_wall_ns"]) / 1e9
    energy, estimate = floats(segments["energy_mj"]), floats(segments["energy_estimate_mj"])
    boots, workers = labels(segments["boot_id"]), labels(segments["worker_id"])
    kinds = labels(segments["segment_class"])
    difference = wall - begin
    offsets = {
        boot: float(np.median(offset[np.isfinite(offset)]))
        for boot, rows in zip(boots.names, rows_of_each(boots.codes, len(boots.names)), strict=True)
        if np.isfinite(offset := difference[rows]).any()
    }
    shift = np.array([offsets.get(boot, np.nan) for boot in boots.names])[boots.codes]

    _, first, inverse = np.unique(ids[~is_gap], return_index=True, return_inverse=True)
    rows = np.flatnonzero(~is_gap)[first]
    total = np.bincount(inverse, weights=energy[~is_gap], minlength=len(rows)) if len(rows) else np.zeros(0)
    modelled = np.isfinite(estimate[~is_gap])  # on one row of a segment
    estimates = np.full(len(rows), np.nan)
    estimates[inverse[modelled]] = estimate[~is_gap][modelled]
    return Work(
        workers=workers.names,
        worker=workers.codes[rows],
        classes=kinds.names,
        segment_class=kinds.codes[rows],
        begin_s=wall[rows],
        end_s=wall[rows] + (end - begin)[rows],
        energy_mj=total,
        estimate_mj=estimates,
        boot_of_worker={
            workers.names[w]: boots.names[b]
            for w, b in zip(workers.codes[rows], boots.codes[rows], strict=True)
        },
        clock_offset_s=offsets,
        gap_classes=tuple(kinds.names[c] for c in kinds.codes[is_gap]),
        gap_begin_s=(begin + shift)[is_gap],
        gap_end_s=(end + shift)[is_gap],
        gap_energy_mj=energy[is_gap],
    )


def build_timeline(
    work: Work,
    devices_of: Mapping[str, HostDevice],
    attempts: pa.Table,
    counters: pa.Table | None,
    power: pa.Table | None,
) -> Timeline | None:
    """Everything over one grid; None for a job without segments."""
    if not len(work.begin_s):
        return None
    start, stop = float(work.begin_s.min()), float(work.end_s.max())
    step = max((stop - start) / STEPS, MIN_STEP_SECONDS)
    edges = start + step * np.arange(STEPS + 1)
    lanes = _power_lanes(work, devices_of, counters, power, edges) or _estimate_lanes(work, devices_of, edges)
    # as the lanes of work, so that both show the same nodes
    lanes.sort(key=lambda lane: (lane[0], lane[1]))
    done, stepped, hidden = _work_lanes(work, devices_of, edges)
    return Timeline(
        start_unix_s=start,
        step_s=step,
        steps=STEPS,
        power=tuple(draw() for _, _, draw in lanes[:MAX_LANES]),
        power_lanes_not_shown=max(0, len(lanes) - MAX_LANES),
        work=done,
        work_lanes_not_shown=hidden,
        work_is_stepped=stepped,
        images_per_second=_throughput(attempts, edges),
    )


def spread(begin: np.ndarray, end: np.ndarray, amount: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """`amount[i]` spread evenly over [begin[i], end[i]], summed per step of `edges`: `[len(edges) - 1]`.

    What lies outside the edges is left out. Unknown amounts (NaN) count nothing.
    """
    known = np.isfinite(amount)
    origin = edges[0]
    begin, amount = begin[known] - origin, amount[known]
    end = np.maximum(end[known] - origin, begin + 1e-6)
    rate = amount / (end - begin)
    at = np.concatenate([begin, end])
    change = np.concatenate([rate, -rate])
    order = np.argsort(at, kind="stable")
    at, slope = at[order], np.cumsum(change[order])
    if not len(at):
        return np.zeros(len(edges) - 1)
    total = np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(at))])
    return np.maximum(np.diff(np.interp(edges - origin, at, total)), 0)


def _throughput(attempts: pa.Table, edges: np.ndarray) -> tuple[float, ...]:
    won = labels(attempts["outcome"]).where(["committed"])
    begin, end = floats(attempts["t_start_wall_ns"])[won] / 1e9, floats(attempts["t_end_wall_ns"])[won] / 1e9
    images = spread(begin, end, floats(attempts["images_ok"])[won], edges)
    return tuple(_rounded(v) for v in (images / np.diff(edges)).tolist())


def _power_lanes(
    work: Work,
    devices_of: Mapping[str, HostDevice],
    counters: pa.Table | None,
    power: pa.Table | None,
    edges: np.ndarray,
) -> list[UndrawnLane]:
    hosts = hosts_of_boots(work, devices_of)
    lanes = _read_power(power, hosts, edges) if power is not None else []
    seen = {(host, device) for host, device, _ in lanes}
    if counters is None or not counters.num_rows:
        return lanes
    boots, domains = labels(counters["boot_id"]), labels(counters["domain"])
    epochs = floats(counters["epoch"])
    at, value = floats(counters["t_mono_ns"]) / 1e9, floats(counters["energy_mj"])

    @cache
    def busy_of(boot: str) -> np.ndarray:
        mine = np.array([work.boot_of_worker.get(w) == boot for w in work.workers])[work.worker]
        return work.seconds_per_step(mine, edges) > 0

    def drawn(boot: str, device: str, rows: np.ndarray) -> PowerLane:
        energy, covered = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1)
        for epoch in np.unique(epochs[rows]):
            now = rows[epochs[rows] == epoch]
            now = now[np.lexsort((value[now], at[now]))]
            t = at[now] + work.clock_offset_s[boot]
            inside = np.clip(edges, t[0], t[-1])
            energy += np.diff(np.interp(inside, t, value[now]))
            covered += np.diff(inside)
        # a sliver of a step says nothing about the step
        known = busy_of(boot) & (covered > 0.05 * np.diff(edges)) & (energy >= 0)
        watts = energy / np.maximum(covered, 1e-9) / 1000
        return PowerLane(hosts[boot], device, COUNTER_SOURCE, _nullable(watts, known))

    for b, d, rows in _by_pair(boots.codes, domains.codes):
        boot, device = boots.names[b], domains.names[d].removeprefix("gpu:")
        if boot in work.clock_offset_s and (hosts[boot], device) not in seen:
            lanes.append((hosts[boot], device, partial(drawn, boot, device, rows)))
    return lanes


def _by_pair(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Every pair of codes that rows have, in order, and those rows, in order; a negative code is none."""
    order = np.lexsort((second, first))
    order = order[(first[order] >= 0) & (second[order] >= 0)]
    if not len(order):
        return
    ends = np.flatnonzero((np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)) + 1
    for rows in np.split(order, ends):
        yield int(first[rows[0]]), int(second[rows[0]]), rows


def _read_power(power: pa.Table, hosts_of: Mapping[str, str], edges: np.ndarray) -> list[UndrawnLane]:
    """The mean of a device's own power readings per step: its one-second average where it gives one."""
    hosts, devices = labels(power["boot_id"]), labels(power["device"])
    average, instant = floats(power["power_average_mw"]), floats(power["power_instant_mw"])
    at, watts = floats(power["t_wall_ns"]) / 1e9, np.where(np.isfinite(average), average, instant) / 1000
    bins = np.searchsorted(edges, at, side="right") - 1
    usable = np.isfinite(watts) & (bins >= 0) & (bins < len(edges) - 1)

    def drawn(host: str, device: str, rows: np.ndarray) -> PowerLane:
        count = np.bincount(bins[rows], minlength=len(edges) - 1)
        total = np.bincount(bins[rows], weights=watts[rows], minlength=len(edges) - 1)
        mean = total / np.maximum(count, 1)
        return PowerLane(host, device, POWER_SOURCE, _nullable(mean, count > 0))

    lanes: list[UndrawnLane] = []
    for h, d, rows in _by_pair(np.where(usable, hosts.codes, -1), devices.codes):
        host = hosts_of.get(hosts.names[h], unknown_host(hosts.names[h]))
        name = devices.names[d].removeprefix("gpu:")
        lanes.append((host, name, partial(drawn, host, name, rows)))
    return lanes


def _estimate_lanes(work: Work, devices_of: Mapping[str, HostDevice], edges: np.ndarray) -> list[UndrawnLane]:
    """For jobs without any counter: the modelled energy of the workers of each device over the step."""
    by_device: dict[HostDevice, list[int]] = defaultdict(list)
    for i, worker in enumerate(work.workers):
        by_device[devices_of[worker]].append(i)
    known = np.isfinite(work.estimate_mj)
    has_any = np.bincount(work.worker[known], minlength=len(work.workers)) > 0

    def drawn(on: HostDevice, members: list[int]) -> PowerLane:
        rows = np.isin(work.worker, members) & known
        mj = spread(work.begin_s[rows], work.end_s[rows], work.estimate_mj[rows], edges)
        watts, busy = mj / np.diff(edges) / 1000, work.seconds_per_step(rows, edges) > 0
        return PowerLane(on.host, on.device, ESTIMATE_SOURCE, _nullable(watts, busy))

    return [
        (on.host, on.device, partial(drawn, on, members))
        for on, members in by_device.items()
        if has_any[members].any()
    ]


def hosts_of_boots(work: Work, devices_of: Mapping[str, HostDevice]) -> dict[str, str]:
    """The host of each boot, from the workers that said theirs; the boot's id where none did."""
    hosts = {boot: unknown_host(boot) for boot in work.boot_of_worker.values()}
    for worker, boot in work.boot_of_worker.items():
        if worker in devices_of and devices_of[worker].host != unknown_host(boot):
            hosts[boot] = devices_of[worker].host
    return hosts


def unknown_host(boot: str) -> str:
    """What a machine is called whose workers finished no shard, and so never said where they are."""
    return f"boot {boot[:8]}"


def _work_lanes(
    work: Work, devices_of: Mapping[str, HostDevice], edges: np.ndarray
) -> tuple[tuple[WorkLane, ...], bool, int]:
    names = sorted(work.workers, key=lambda w: (devices_of[w].host, devices_of[w].device, w))
    shown = names[:MAX_LANES]
    begin_s, end_s = work.begin_s - edges[0], work.end_s - edges[0]
    stepped = False
    lanes = []
    for name in shown:
        mine = work.worker == work.workers.index(name)
        if mine.sum() > MAX_SPANS // len(shown):
            stepped = True
            spans = _stepped_spans(work, mine, edges)
        else:
            rows = np.flatnonzero(mine)
            rows = rows[np.argsort(begin_s[rows], kind="stable")]
            classes = [work.classes[c] for c in work.segment_class[rows].tolist()]
            spans = list(zip(begin_s[rows].tolist(), end_s[rows].tolist(), classes, strict=True))
        spans = [(round(b, 4), round(e, 4), c) for b, e, c in spans]
        lanes.append(WorkLane(name, devices_of[name].host, devices_of[name].device, tuple(spans)))
    return tuple(lanes), stepped, len(names) - len(shown)


def _stepped_spans(work: Work, rows: np.ndarray, edges: np.ndarray) -> list[tuple[float, float, str]]:
    """Per step the class with most of its time; equal neighbours are joined."""
    present = [c for c in SEGMENT_CLASSES if c in work.classes]
    # [classes, steps]
    seconds = np.stack([work.seconds_per_step(rows & work.of_class(c), edges) for c in present])
    best = seconds.argmax(axis=0)
    spans: list[tuple[float, float, str]] = []
    for i in np.flatnonzero(seconds.sum(axis=0)).tolist():
        begin, end, name = float(edges[i] - edges[0]), float(edges[i + 1] - edges[0]), present[best[i]]
        if spans and spans[-1][2] == name and abs(spans[-1][1] - begin) < 1e-9:
            spans[-1] = (spans[-1][0], end, name)
        else:
            spans.append((begin, end, name))
    return spans


def _nullable(values: np.ndarray, known: np.ndarray) -> tuple[float | None, ...]:
    return tuple(_rounded(v) if ok else None for v, ok in zip(values.tolist(), known.tolist(), strict=True))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
