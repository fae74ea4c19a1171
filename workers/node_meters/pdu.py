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
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    *,
    outlet: str | None = None,
    time_zone: str | None = None,
    clock_error_s: float = 0.0,
    accuracy_share: float | None = None,
) -> tuple[NodeSeries, ...]:
    """The readings of `path`, one series per column that has any.

    Args:
        outlet: the node's, all of it and nothing else, as the column `outlet` names it; None where all rows are of one.
        time_zone: of times without an offset, as "Europe/Berlin" or "UTC".
        clock_error_s: how far the strip's clock may be from the node's.
        accuracy_share: see `NodeSeries`.

    Raises:
        InputError: the file cannot be read as such; the message names file and line.
    """
    try:
        zone = ZoneInfo(time_zone) if time_zone else None
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InputError(f"time zone {time_zone!r} is not known: use one as Europe/Berlin or UTC") from error
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            columns = _read(path, lines, zone, outlet)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8: {error}") from error
    found = tuple(
        NodeSeries(
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


@dataclass
class _Column:
    t_wall_ns: array[int] = field(default_factory=lambda: array("q"))
    values: array[int] = field(default_factory=lambda: array("q"))
    quantum: int = 0


def _read(path: Path, lines: Iterator[str], zone: ZoneInfo | None, outlet: str | None) -> dict[str, _Column]:
    reader = csv.reader(lines, strict=True)
    try:
        names = [n.strip().lower() for n in next(reader, [])]
        columns = {n: _Column() for n in _COLUMNS if n in names}
        if "time" not in names or not columns or len(set(names)) != len(names):
            raise InputError(
                f"{path}:1: found columns {', '.join(names)[:200] or '(none)'}; needs, separated by commas, "
                "time and watts or kwh, each once"
            )
        if outlet is not None and "outlet" not in names:
            raise InputError(f"{path}:1: has no column outlet")
        only = outlet
        latest_ns = -1
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(f"has {len(row)} cells, the header {len(names)}")
            cells = {name: cell.strip() for name, cell in zip(names, row, strict=True)}
            of = cells.get("outlet", "")
            if outlet is None and only not in (None, of):
                raise ValueError(f"outlet {of[:40]} after {only}: say which outlet is the node's")
            only = of if outlet is None else outlet
            if only != of:
                continue
            t_ns = _time_ns(cells["time"], zone)
            if t_ns <= latest_ns:
                raise ValueError(f"{cells['time']} is not later than the line before: sort by time")
            latest_ns = t_ns
            for name, column in columns.items():
                if not cells[name]:
                    continue
                value, quantum = _amount(name, cells[name])
                if name == "kwh" and column.values and value < column.values[-1]:
                    where = f"{path}:{reader.line_num}"
                    log.warning("%s: kwh went back to %s: nothing is counted across it", where, cells[name])
                column.t_wall_ns.append(t_ns)
                column.values.append(value)
                column.quantum = min(column.quantum or quantum, quantum)
    except UnicodeDecodeError:
        raise
    except (ValueError, csv.Error) as error:
        what = "not CSV: " if isinstance(error, csv.Error) else ""
        raise InputError(f"{path}:{reader.line_num}: {what}{error}") from error
    return columns


def _amount(name: str, cell: str) -> tuple[int, int]:
    try:
        if not cell.isascii() or "_" in cell:  # Decimal would take them
            raise ValueError
        return parse_amount(Decimal(cell), _COLUMNS[name][1])
    except (ValueError, InvalidOperation) as error:
        raise ValueError(f"{name} {cell[:40]!r} is not a number of 0 or more") from error


def _time_ns(cell: str, zone: ZoneInfo | None) -> int:
    """Nanoseconds since the epoch of `cell`, in `zone` where it has no offset; raises ValueError."""
    try:
        at = datetime.fromisoformat(cell)
    except ValueError as error:
        raise ValueError(f"time {cell[:40]!r} is not ISO 8601 (2026-03-01T12:00:00+01:00)") from error
    if not 1970 < at.year < 2200:
        raise ValueError(f"time {cell!r}: no power strip was read in {at.year}")
    if at.tzinfo is None:
        if zone is None:
            raise ValueError(f"time {cell!r} has no offset from UTC: name the time zone of the file")
        at = at.replace(tzinfo=zone)
        if at.utcoffset() != at.replace(fold=1).utcoffset():
            raise ValueError(f"time {cell!r} is ambiguous or skipped in {zone.key} (clock change): use UTC")
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000
