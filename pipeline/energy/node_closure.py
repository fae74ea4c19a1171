"""C3: do a node's devices and its declared rest add up to the node's own meter?

    devices (GPU, package and DRAM counters) + declared rest - node = residual,   |residual| <= tolerance

over the stretches of time in which all of them are known. At the ends of a stretch counters and meter are interpolated
between the readings around, which bound the error. The tolerance is the sum of the error bounds of counters, meter and
declaration. The residual is stated, never spread. The parts become rows of `node_energy`. Nothing here does I/O.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.energy.closure import ClosureRow
from millijoule.pipeline.energy.intervals import Interval, common, merged, without
from millijoule.pipeline.energy.ledger import Ledger
from millijoule.workers.node_meters.meter import MAX_NODE_WATTS, NodeSeries, Quantity, best_energy

#: How far a device's own counter may be off, as makers of boards state it.
COUNTER_TOLERANCE_SHARE = 0.05
#: Error bounds that add up to more than this part of the node's energy would let anything pass.
MAX_TOLERANCE_SHARE = 0.10
#: What was not watched for more than a tenth of the job says little about the job.
MIN_COVERAGE_SHARE = 0.90

#: A stretch is shortened by at most this part at either end, to where its counters are known best.
MAX_SNAP_SHARE = 0.02


class NodePart(NamedTuple):
    """Energy of one part of a node over one stretch, right to `tolerance_mj`; a row of the `node_energy` table.

    `part` is "node" (its meter; `name` is the feed), "device" (`name` is the counter's domain) or "rest".
    """

    host: str
    boot_id: str
    meter: str
    t_open_mono_ns: int
    t_close_mono_ns: int
    t_open_wall_ns: int
    t_close_wall_ns: int
    part: str
    name: str
    source: str
    energy_mj: int
    tolerance_mj: int


@dataclass(frozen=True)
class _Timed:
    """A series, and how far each of its times may be off."""

    series: NodeSeries
    t_error_ns: Sequence[int]

    def around(self, begin_ns: int, end_ns: int) -> NodeSeries:
        """The series with the clock's error where it matters: of the readings around both ends."""
        times = self.series.t_wall_ns
        near = {
            i
            for t in (begin_ns, end_ns)
            for i in (bisect_right(times, t) - 1, bisect_left(times, t))
            if 0 <= i < len(times)
        }
        error_ns = max((self.t_error_ns[i] for i in near), default=0)
        return replace(self.series, clock_error_ns=self.series.clock_error_ns + error_ns)


@dataclass
class _Boot:
    """One boot of one host, as the ledger knows it; times are CLOCK_MONOTONIC."""

    boot_id: str
    wall_minus_mono_ns: int
    clock_moved_ns: int
    host: str = ""
    busy: list[Interval] = field(default_factory=list)  # merged: when any worker was there
    expected: set[str] = field(default_factory=set)  # domains
    unclosed: set[str] = field(default_factory=set)  # workers whose accounts have no end
    series: dict[str, list[_Timed]] = field(default_factory=lambda: defaultdict(list))  # by domain; wall time
    known: dict[str, list[Interval]] = field(default_factory=lambda: defaultdict(list))  # by domain


class _Verdict(NamedTuple):
    row: ClosureRow
    parts: list[NodePart]
    covered_ns: int


def close_nodes(
    ledger: Ledger, hosts: Mapping[str, str], devices: Mapping[str, Iterable[str]], readings: pa.Table
) -> tuple[list[NodePart], list[ClosureRow]]:
    """C3 of every node that has a worker: its parts, and a row per node and boot (more where several meters can tell).

    Args:
        ledger: over the segments of all commits and drivers.
        hosts: host name by worker id, as far as known.
        devices: domains that a worker's devices should have, by worker id.
        readings: of the `node_reading` table.
    """
    if not readings.num_rows or not ledger.entries:
        return [], [_unknown("node", "no node meter was read")]
    parts: list[NodePart] = []
    closure: list[ClosureRow] = []
    boots = _boots(ledger, hosts, devices)
    for boot in sorted(boots.values(), key=lambda b: (b.host, b.boot_id)):
        verdicts = [_close(boot, meter, rows) for meter, rows in _meters_of(boot, readings)]
        # a meter that cannot tell does not stand in the way of one that can
        told = [v for v in verdicts if v.row.passed is not None]
        told = told or sorted(verdicts, key=lambda v: -v.covered_ns)[:1]
        parts.extend(p for v in verdicts for p in v.parts)
        closure.extend(v.row for v in told)
        if not told:
            closure.append(_unknown(f"{boot.host} boot {boot.boot_id}", "no meter of this node was read"))
    return parts, closure


def scope_of(host: str, boot_id: str, meter: str) -> str:
    """How a closure row names a node's boot and the meter it was compared with."""
    return f"{host} boot {boot_id} by {meter}"


def _unknown(scope: str, note: str, expected_mj: int | None = None) -> ClosureRow:
    return ClosureRow("C3", scope, expected_mj, None, None, None, note)


# -- what the ledger knows -----------------------------------------------------------------------------------------


def _boots(
    ledger: Ledger, hosts: Mapping[str, str], devices: Mapping[str, Iterable[str]]
) -> dict[str, _Boot]:
    entries, columns = ledger.entries, ledger.entries.columns
    boots = {
        boot_id: _Boot(boot_id, first, most - least)
        for boot_id, (first, least, most) in entries.clocks().items()
    }
    unclosed = {u.worker_id for u in ledger.unclosed}
    reads = np.stack([entries.open, entries.close], axis=1).ravel()
    there = columns.boot[reads].astype(np.int64) * len(columns.names) + np.repeat(entries.worker, 2)
    _, first = np.unique(there, return_index=True)
    for code, worker in (divmod(key, len(columns.names)) for key in there[np.sort(first)].tolist()):
        boot, worker_id = boots[columns.names[code]], columns.names[worker]
        boot.host = boot.host or hosts.get(worker_id, "")
        boot.expected.update(entries.domains_of[worker_id], devices.get(worker_id, ()))
        boot.unclosed.update({worker_id} & unclosed)
    opened, closed = columns.boot[entries.open], columns.boot[entries.close]
    for code in np.unique(opened).tolist():
        mine = (opened == code) & (closed == code)
        begin, end = (columns.t_mono_ns[reads[mine]].tolist() for reads in (entries.open, entries.close))
        boots[columns.names[code]].busy = merged(zip(begin, end, strict=True))
    off: dict[tuple[str, str], list[Interval]] = defaultdict(list)
    for gap in ledger.gaps:
        if gap.segment_class == "off":
            off[gap.boot_id, gap.domain].append((gap.t_open_ns, gap.t_close_ns))
    for run, readings in ledger.series(ledger.runs):
        boot, known = boots[run.boot_id], (run.first.t_ns, run.last.t_ns)
        if known[0] < known[1]:
            boot.series[run.domain].append(_counter_series(boot, run.domain, readings))
            boot.known[run.domain] += without(known, off[run.boot_id, run.domain])
    for boot in boots.values():
        boot.host = boot.host or f"boot {boot.boot_id}"
    return boots


def _counter_series(boot: _Boot, domain: str, readings: np.ndarray) -> _Timed:
    """A counter without a reset as a series; `readings` as of `Entries.readings`."""
    readings = readings[np.diff(readings[:, 0], append=-1) != 0]
    series = NodeSeries(
        domain,
        "energy",
        (readings[:, 0] + boot.wall_minus_mono_ns).tolist(),
        readings[:, 1].tolist(),
        quantum=1,
        max_gap_ns=0,
        accuracy_share=COUNTER_TOLERANCE_SHARE,
    )
    return _Timed(series, readings[:, 2].tolist())  # a value may have stood that long


# -- what the meters know ------------------------------------------------------------------------------------------


def _meters_of(boot: _Boot, readings: pa.Table) -> list[tuple[str, pa.Table]]:
    """The meters of a boot: recorders know which boot they read, an import only the host."""
    imported = pc.and_(pc.is_null(readings["boot_id"]), pc.equal(readings["host"], boot.host))
    recorded = pc.fill_null(pc.equal(readings["boot_id"], boot.boot_id), False)
    mine = readings.filter(pc.or_(imported, recorded))
    names = sorted(pc.unique(mine["meter"]).to_pylist())
    return [(meter, mine.filter(pc.equal(mine["meter"], meter))) for meter in names]


def _feeds(boot: _Boot, rows: pa.Table) -> dict[str, list[_Timed]]:
    """The series of each feed."""
    feeds: dict[str, list[_Timed]] = {}
    for feed in sorted(pc.unique(rows["feed"]).to_pylist()):
        of_feed = rows.filter(pc.equal(rows["feed"], feed))
        feeds[feed] = []
        for source in sorted(pc.unique(of_feed["source"].drop_null()).to_pylist()):
            found = of_feed.filter(pc.equal(of_feed["source"], source))
            quantity: Quantity = "power" if found["energy_mj"].null_count else "energy"
            unit = "mw" if quantity == "power" else "mj"
            value, quantum = f"{quantity}_{unit}", f"quantum_{unit}"
            found = found.sort_by([("t_wall_ns", "ascending"), (value, "ascending")])
            last = found.slice(found.num_rows - 1).to_pylist()[0]
            columns = np.stack([found[c].fill_null(0).to_numpy() for c in ("t_wall_ns", value, "t_error_ns")])
            # two drivers may have read at one time
            is_first = np.diff(columns[0], prepend=columns[0, 0] - 1) != 0
            times, values, errors = columns[:, is_first].tolist()
            series = NodeSeries(
                *(source, quantity, times, values),
                quantum=pc.min(found[quantum]).as_py(),
                max_gap_ns=last["max_gap_ns"],
                clock_error_ns=boot.clock_moved_ns,
                accuracy_share=last["accuracy_share"],
            )
            feeds[feed].append(_Timed(series, errors))
    return feeds


def _usable(series: NodeSeries) -> Iterator[Interval]:
    """Wall times between which the series has no reset, leap or silence."""
    begin = series.t_wall_ns[0]
    for (t0, v0), (t1, v1) in pairwise(zip(series.t_wall_ns, series.values, strict=True)):
        if series.quantity == "power":
            is_broken = t1 - t0 > series.max_gap_ns
        else:
            is_broken = v1 < v0 or (v1 - v0 - series.quantum) * 1_000_000 > MAX_NODE_WATTS * (t1 - t0)
        if is_broken:
            yield begin, t0
            begin = t1
    yield begin, series.t_wall_ns[-1]


# -- the check -----------------------------------------------------------------------------------------------------


def _close(boot: _Boot, meter: str, rows: pa.Table) -> _Verdict:
    """C3 of one boot of a node by one meter."""
    scope = scope_of(boot.host, boot.boot_id, meter)
    said = {d for text in pc.unique(rows["domains"]).to_pylist() if text for d in text.split(",")}
    uncounted = sorted((boot.expected | said) - boot.known.keys())
    if not any(d.startswith("cpu:") for d in boot.expected | said):
        uncounted.insert(0, "the processor")
    feeds = _feeds(boot, rows)
    windows = [i for i in boot.busy if i[0] < i[1]]
    for known in boot.known.values():
        windows = common(windows, sorted(known))
    on_devices = windows
    for series in feeds.values():
        usable = merged(i for s in series for i in _usable(s.series) if i[0] < i[1])
        offset = boot.wall_minus_mono_ns
        windows = common(windows, [(a - offset, b - offset) for a, b in usable])
    rest = _declared(rows)
    parts: list[NodePart] = []
    covered_ns, reasons = 0, []
    for window in windows:
        window = _snapped(boot, window)
        found = _parts(boot, meter, window, feeds, rest)
        if isinstance(found, str):
            reasons.append(found)
            continue
        parts += found
        covered_ns += window[1] - window[0]
    busy_ns = sum(b - a for a, b in boot.busy)
    coverage = covered_ns / busy_ns if busy_ns else 0.0
    node, devices = _sum(parts, "node"), _sum(parts, "device")
    if boot.unclosed:
        note = f"until when {_listed(sorted(boot.unclosed))} used the node is not known: nobody read its counters then"
    elif uncounted:
        note = f"no counter for {_listed(uncounted)}"
    elif not parts:
        note = reasons[0] if reasons else _silence(rows, bool(on_devices))
    elif rest is None:
        note = f"the rest of the node is not declared; its devices used {devices[0]} mJ"
    else:
        silence = _silence(rows, bool(on_devices)) if coverage < MIN_COVERAGE_SHARE else ""
        return _Verdict(_judged(scope, parts, coverage, silence), parts, covered_ns)
    return _Verdict(_unknown(scope, note, node[0] if parts else None), parts, covered_ns)


def _judged(scope: str, parts: Sequence[NodePart], coverage: float, silence: str) -> ClosureRow:
    """The row of a node all of whose parts are known for `coverage` of its time; `silence` says why not for more."""
    node, devices, declared = (_sum(parts, part) for part in ("node", "device", "rest"))
    tolerance_mj = node[1] + devices[1] + declared[1]
    found_mj = devices[0] + declared[0]
    kinds = sorted({p.name.partition(":")[0] for p in parts if p.part == "device"})
    shares = [bound / node[0] if node[0] else 0.0 for bound in (node[1], declared[1], devices[1])]
    note = (
        f"{', '.join(kinds)} counters and declared rest ({declared[0]} mJ) against "
        f"{', '.join(sorted({p.source for p in parts if p.part == 'node'}))}; known for {coverage:.1%} of the time its "
        f"workers were there, stretches: {len({p.t_open_mono_ns for p in parts})}; error bounds: "
        f"meter {shares[0]:.1%}, rest {shares[1]:.1%}, counters {shares[2]:.1%}"
    )
    passed = abs(found_mj - node[0]) <= tolerance_mj
    obstacles = []
    if coverage < MIN_COVERAGE_SHARE:
        obstacles.append(f"known for too little of the time: {silence}")
    if tolerance_mj > MAX_TOLERANCE_SHARE * node[0]:
        obstacles.append(f"the error bounds are wider than {MAX_TOLERANCE_SHARE:.0%}")
    return ClosureRow(
        *("C3", scope, node[0], found_mj, tolerance_mj / node[0] if node[0] else None),
        *(None if obstacles else passed, "; ".join([*obstacles, note])),
        tolerance_mj=tolerance_mj,
    )


def _snapped(boot: _Boot, window: Interval) -> Interval:
    """`window` with its ends moved inwards, by at most `MAX_SNAP_SHARE` of it, to the reads of the counters that grow most."""
    begin, end = window
    most = (end - begin) * MAX_SNAP_SHARE
    read_at = {t for stretches in boot.series.values() for one in stretches for t in one.series.t_wall_ns}
    times = sorted(t - boot.wall_minus_mono_ns for t in read_at)
    first = times[bisect_left(times, begin) : bisect_right(times, begin + most)]
    last = times[bisect_left(times, end - most) : bisect_right(times, end)]
    return (
        min([begin, *first], key=lambda t: (_doubt_mj(boot, t), t)),
        min([end, *last], key=lambda t: (_doubt_mj(boot, t), -t)),
    )


def _doubt_mj(boot: _Boot, t_mono_ns: int) -> int:
    """How much all counters grew between the reads around a time: 0 where all were read."""
    t, doubt = t_mono_ns + boot.wall_minus_mono_ns, 0
    for stretches in boot.series.values():
        for s in (one.series for one in stretches):
            if s.t_wall_ns[0] <= t <= s.t_wall_ns[-1]:
                before, after = bisect_right(s.t_wall_ns, t) - 1, bisect_left(s.t_wall_ns, t)
                doubt += s.values[after] - s.values[before]
                break
    return doubt


def _parts(
    boot: _Boot,
    meter: str,
    window: Interval,
    feeds: Mapping[str, Sequence[_Timed]],
    rest: tuple[int, int] | None,
) -> list[NodePart] | str:
    """All parts over one stretch, or why one of them is not known."""
    begin, end = (t + boot.wall_minus_mono_ns for t in window)

    def part(kind: str, name: str, source: str, energy_mj: int, tolerance_mj: int) -> NodePart:
        where = (boot.host, boot.boot_id, meter, *window, begin, end)
        return NodePart(*where, kind, name, source, energy_mj, tolerance_mj)

    parts = []
    for feed, series in feeds.items():
        known = best_energy([s.around(begin, end) for s in series], begin, end)
        if known is None or known.energy_mj is None or known.tolerance_mj is None:
            return f"{meter}: {known.note if known else 'it was not read'}"
        parts.append(part("node", feed, known.source, known.energy_mj, known.tolerance_mj))
    for domain, stretches in sorted(boot.series.items()):
        inside = [s for s in stretches if s.series.t_wall_ns[0] <= begin and end <= s.series.t_wall_ns[-1]]
        counted = inside[0].around(begin, end).energy_between(begin, end) if inside else None
        if counted is None or counted.energy_mj is None or counted.tolerance_mj is None:
            return f"{domain}: {counted.note if counted else 'it was not read'}"
        parts.append(part("device", domain, "counter", counted.energy_mj, counted.tolerance_mj))
    if rest is not None:
        energy_mj, tolerance_mj = (mw * (end - begin) for mw in rest)
        parts.append(
            part("rest", "declared", "declared", round_ns(energy_mj), -(-tolerance_mj // 1_000_000_000))
        )
    return parts


def round_ns(mw_ns: int) -> int:
    """Milliwatt nanoseconds as whole millijoules, half up."""
    return (mw_ns + 500_000_000) // 1_000_000_000


def _declared(rows: pa.Table) -> tuple[int, int] | None:
    """(milliwatts, tolerance) of the rest, as last declared; of several declared at one time the largest, none if one is none."""
    order = [(name, "ascending") for name in ("t_wall_ns", "rest_mw", "rest_tolerance_mw")]  # null comes last
    last = rows.sort_by(order).slice(rows.num_rows - 1).to_pylist()[0]
    if last["rest_mw"] is None or last["rest_tolerance_mw"] is None:
        return None
    return last["rest_mw"], last["rest_tolerance_mw"]


def _sum(parts: Sequence[NodePart], part: str) -> tuple[int, int]:
    mine = [p for p in parts if p.part == part]
    return sum(p.energy_mj for p in mine), sum(p.tolerance_mj for p in mine)


def _silence(rows: pa.Table, devices_known: bool) -> str:
    """Why there is nothing, or little, to compare: the meter's own words, if it had any."""
    if not devices_known:
        return "the node's counters were never all known at once"
    said = rows.filter(pc.is_valid(rows["note"])).sort_by("t_wall_ns")
    if said.num_rows:
        return f"the meter could not be read: {said['note'][said.num_rows - 1].as_py()}"
    return "the meter, or a counter, was not read while workers were there"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
