"""Import a power strip's log: a CSV file with the columns `time` and `watts` or `kwh` (cumulative), and `outlet`.

    time,outlet,watts,kwh
    2026-03-01T12:00:00+01:00,7,812,10433.52

Other columns are ignored; without `outlet` all rows are of one.

Times are ISO 8601 with an offset, or local times of a zone that is named. A time zone is never assumed: an hour's
error would charge the job for another hour. An empty cell is a missing reading.
"""

from __future__ import annotations

import csv
import logging
from array import array
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from itertools import pairwise
from pathlib import Path
from statistics import median_low
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from millijoule.workers.errors import InputError
from millijoule.workers.node_meters.meter import (
    MAX_MISSED_PERIODS,
    MJ_PER_KWH,
    MW_PER_W,
    NodeSeries,
    Quantity,
    parse_amount,
)

log = logging.getLogger(__name__)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS: dict[str, tuple[Quantity, int]] = {"kwh": ("energy", MJ_PER_KWH), "watts": ("power", MW_PER_W)}


def read_pdu_csv(
    path: Path,
    host: str,
    *,
    outlet: str | None = None,
    time_zone: str | None = None,
    clock_error_s: float = 0.0,
    accuracy_share: float | None = None,
) -> tuple[NodeSeries, ...]:
    """The readings of `path`, one series per column that has any.

    Args:
        host: the node on this outlet, all of it and nothing else.
        outlet: as the column `outlet` names it; None where all rows are of one.
        time_zone: of times without an offset, as "Europe/Berlin" or "UTC".
        clock_error_s: how far the strip's clock may be from the node's.
        accuracy_share: see `NodeSeries`.

    Raises:
        InputError: the file cannot be read as such; the message names file and line.
    """
    zone = _zone(time_zone)
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            columns = _read(path, lines, zone, outlet)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {error}") from error
    found = tuple(
        NodeSeries(
            host,
            f"pdu-csv-{quantity}",
            quantity,
            column.t_wall_ns,
            column.values,
            column.quantum,
            MAX_MISSED_PERIODS * median_low(b - a for a, b in pairwise(column.t_wall_ns)),
            round(clock_error_s * 1e9),
            accuracy_share,
        )
        for name, column in columns.items()
        for quantity, _ in (_COLUMNS[name],)
        if len(column.values) > 1
    )
    if not found:
        of = "" if outlet is None else f" of outlet {outlet}"
        raise InputError(f"{path}: has fewer than two readings{of}")
    return found


class _Column:
    def __init__(self) -> None:
        self.t_wall_ns = array("q")
        self.values = array("q")
        self.quantum = 0


def _read(path: Path, lines: Iterator[str], zone: ZoneInfo | None, outlet: str | None) -> dict[str, _Column]:
    reader = csv.reader(lines, strict=True)
    place: Callable[[], str] = lambda: f"{path}:{reader.line_num}"  # noqa: E731
    try:
        names = [n.strip().lower() for n in next(reader, [])]
        wanted = [n for n in _COLUMNS if n in names]
        if "time" not in names or not wanted or len(set(names)) != len(names):
            raise InputError(
                f"{path}:1: found columns {', '.join(names)[:200] or '(none)'}; needs, separated by commas, "
                "time and watts or kwh, each once"
            )
        if outlet is not None and "outlet" not in names:
            raise InputError(f"{path}:1: has no column outlet")
        columns = {n: _Column() for n in wanted}
        only = outlet
        latest_ns: int | None = None
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise InputError(f"{place()}: has {len(row)} cells, the header {len(names)}")
            cells = dict(zip(names, row, strict=True))
            of = cells.get("outlet", "").strip()
            if outlet is None and only not in (None, of):
                raise InputError(f"{place()}: outlet {of[:40]} after {only}: say which outlet is the node's")
            only = of if outlet is None else outlet
            if only != of:
                continue
            t_ns = _time_ns(place(), cells["time"].strip(), zone)
            if latest_ns is not None and t_ns <= latest_ns:
                raise InputError(
                    f"{place()}: {cells['time']} is not later than the line before: sort by time"
                )
            latest_ns = t_ns
            for name, column in columns.items():
                _append(place(), name, column, t_ns, cells[name].strip())
    except csv.Error as error:
        raise InputError(f"{place()}: not CSV: {error}") from error
    return columns


def _append(place: str, name: str, column: _Column, t_ns: int, cell: str) -> None:
    if not cell:
        return
    try:
        if not cell.isascii() or "_" in cell:  # Decimal would take them
            raise ValueError
        value, quantum = parse_amount(Decimal(cell), _COLUMNS[name][1])
    except (ValueError, InvalidOperation) as error:
        raise InputError(f"{place}: {name} {cell[:40]!r} is not a number of 0 or more") from error
    if name == "kwh" and column.values and value < column.values[-1]:
        log.warning("%s: kwh went back to %s: reset; nothing is counted across it", place, cell)
    column.t_wall_ns.append(t_ns)
    column.values.append(value)
    column.quantum = min(column.quantum or quantum, quantum)


def _time_ns(place: str, cell: str, zone: ZoneInfo | None) -> int:
    try:
        at = datetime.fromisoformat(cell)
    except ValueError as error:
        raise InputError(
            f"{place}: time {cell[:40]!r} is not ISO 8601 (2026-03-01T12:00:00+01:00)"
        ) from error
    if not 1970 < at.year < 2200:
        raise InputError(f"{place}: time {cell!r}: no power strip was read in {at.year}")
    if at.tzinfo is None:
        if zone is None:
            raise InputError(f"{place}: time {cell!r} has no offset from UTC: name the time zone of the file")
        at = at.replace(tzinfo=zone)
        if at.utcoffset() != at.replace(fold=1).utcoffset():
            raise InputError(
                f"{place}: time {cell!r} is ambiguous or skipped in {zone.key} (clock change): use UTC"
            )
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000


def _zone(name: str | None) -> ZoneInfo | None:
    try:
        return ZoneInfo(name) if name else None
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"time zone {name!r} is not known: use one as Europe/Berlin or UTC") from error
