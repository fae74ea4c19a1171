"""What a kilowatt-hour costs, in money or in grams of CO2e, as one number or as a table over time.

Means of a rate are weighted by when the energy was used. Carbon intensity is location-based: what the grid emitted, not
what a contract says. A power usage effectiveness (PUE) multiplies grams and money, never joules.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from millijoule.workers.errors import InputError, UsageError

#: 1 kWh in millijoules.
MJ_PER_KWH = 3.6e9

#: How long the only row of a table holds.
LONE_ROW_SECONDS = 3600.0

_TIME_COLUMNS = ("time", "timestamp", "datetime", "date", "point_in_time", "from")
_VALUE_COLUMNS = (
    *("value", "price", "carbon", "intensity", "carbon_intensity", "gco2e_per_kwh", "price_per_kwh"),
)


@dataclass(frozen=True)
class Rate:
    """An amount per kWh: `values[i]` from `times_s[i]` (seconds since 1970) on; no times: `values[0]` always.

    A row holds for at most `row_seconds`. `source` says where the numbers are from, for people.
    """

    source: str
    values: tuple[float, ...]
    times_s: tuple[float, ...] = ()
    row_seconds: float = 0.0

    @property
    def is_constant(self) -> bool:
        return not self.times_s

    def at(self, t_s: float) -> float:
        """The value at `t_s`, seconds since 1970: of the row that began last, before all rows of the first."""
        return self.values[max(0, bisect_right(self.times_s, t_s) - 1)]


@dataclass(frozen=True)
class Rates:
    """What the energy is multiplied by; `pue` multiplies grams and money, never joules. None: not given."""

    carbon: Rate | None = None
    price: Rate | None = None
    pue: float | None = None


@dataclass(frozen=True)
class RateMean:
    """The mean of a rate over the energy of a job.

    `fallback_share` is the part of the energy (0 to 1) used at times the table does not cover, for which the nearest row
    stood in; 1.0 for a constant.
    """

    per_kwh: float
    fallback_share: float


def read_rate(text: str, option: str, *, source: str | None = None, negative: bool = False) -> Rate:
    """`text` as a rate: a number, or the path of a CSV file.

    The file has a header and a column of times (ISO 8601, UTC where no offset is given, or seconds since 1970) and one
    of values; columns are found by name (time, timestamp, datetime...; value, price, carbon_intensity...) or, where
    there are only two, by place.

    Args:
        option: the command line option, for messages.
        source: where the numbers are from; default "declared" or the file's name.
        negative: whether values below 0 make sense: prices do, intensities do not.

    Raises:
        InputError: neither, or the file has a row that cannot be used.
    """
    try:
        value = float(text)
    except ValueError:
        return _read_table(Path(text), option, source, negative)
    _check_value(value, f"{option} {text}", negative, UsageError)
    return Rate(source or "declared value", (value,))


def check_rate(rate: Rate, where: str, *, negative: bool) -> None:
    """Refuse what cannot be a rate, whoever wrote it; raises InputError, which names `where` it stands."""
    for value in rate.values:
        _check_value(value, where, negative)
    times = rate.times_s
    in_order = all(map(math.isfinite, times)) and all(a < b for a, b in pairwise(times))
    if not in_order or len(rate.values) != max(1, len(times)) or not 0 <= rate.row_seconds < math.inf:
        raise InputError(f"{where}: {rate.source}: not a number, nor a table in order of time")


def check_pue(pue: float) -> float:
    """Return `pue`; raises InputError where it cannot be one."""
    if not 1 <= pue <= 10:
        raise UsageError(f"--pue {pue:g}: a power usage effectiveness is 1 (no overhead) or a little more")
    return pue


def mean_rate(rate: Rate, begin_s: np.ndarray, end_s: np.ndarray, energy_mj: np.ndarray) -> RateMean | None:
    """The mean of `rate` over stretches of time that used `energy_mj` at constant power each.

    Args:
        begin_s, end_s: float64 `[n]`, seconds since 1970.
        energy_mj: float64 `[n]`; NaN where it is not known.

    Returns:
        None where no energy is known and the rate is not the same at all times.
    """
    if rate.is_constant:
        return RateMean(rate.values[0], 1.0)
    known = energy_mj > 0
    if not known.any():
        return None
    begin, weight = begin_s[known], energy_mj[known]
    end = np.maximum(end_s[known], begin + 1e-6)
    times, first, last = np.asarray(rate.times_s), begin.min(), end.max()
    # a step function over [first, last]: knots [k + 1], and what holds after each but the last [k]
    inner = np.concatenate([times, times + rate.row_seconds])
    knots = np.unique(np.concatenate([[first], inner[(inner > first) & (inner < last)], [last]]))
    row = np.searchsorted(times, knots[:-1], side="right") - 1
    nearest = np.maximum(row, 0)
    covered = (row >= 0) & (knots[:-1] < times[nearest] + rate.row_seconds)

    def mean(value: np.ndarray) -> float:
        integral = np.concatenate([[0.0], np.cumsum(value * np.diff(knots))])
        of_each = (np.interp(end, knots, integral) - np.interp(begin, knots, integral)) / (end - begin)
        return float(np.average(of_each, weights=weight))

    share = 1 - mean(covered)
    return RateMean(mean(np.asarray(rate.values)[nearest]), 0.0 if share < 1e-9 else share)


def _read_table(path: Path, option: str, source: str | None, negative: bool) -> Rate:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = list(csv.reader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{option} {path}: neither a number nor a readable CSV file ({error})") from error
    if len(lines) < 2:
        raise InputError(f"{option} {path}: needs a header and at least one row of time and value")
    time_column, value_column = _columns(lines[0], f"{option} {path}")
    if _is_row(lines[0], time_column, value_column):
        raise InputError(
            f"{option} {path}: line 1 is no header such as time,value but a row; put one above it"
        )
    rows: list[tuple[float, float]] = []
    for number, line in enumerate(lines[1:], start=2):
        if not any(cell.strip() for cell in line):
            continue
        where = f"{option} {path}, line {number}"
        try:
            at, value = _seconds(line[time_column].strip()), float(line[value_column])
        except (ValueError, IndexError, OverflowError) as error:
            raise InputError(f"{where}: expected a time and a number ({error})") from error
        _check_value(value, where, negative)
        rows.append((at, value))
    rows.sort()
    times = tuple(t for t, _ in rows)
    if not times or len(set(times)) != len(times):
        raise InputError(f"{option} {path}: " + ("a time stands twice" if times else "has no rows"))
    steps = np.diff(times)
    row_seconds = float(np.median(steps)) if len(steps) else LONE_ROW_SECONDS
    return Rate(source or path.name, tuple(v for _, v in rows), times, row_seconds)


def _columns(header: Sequence[str], where: str) -> tuple[int, int]:
    names = [h.split("(")[0].strip().lower().replace(" ", "_") for h in header]
    time_column = next((i for i, n in enumerate(names) if n in _TIME_COLUMNS), None)
    value_column = next((i for i, n in enumerate(names) if n in _VALUE_COLUMNS), None)
    if time_column is not None and value_column is not None:
        return time_column, value_column
    if len(names) == 2:
        return 0, 1
    raise InputError(
        f"{where}: cannot tell which of the columns {', '.join(map(repr, header))} are time and value; "
        "name them `time` and `value`"
    )


def _is_row(line: Sequence[str], time_column: int, value_column: int) -> bool:
    try:
        _seconds(line[time_column].strip()), float(line[value_column])
    except (ValueError, OverflowError):
        return False
    return True


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        at = datetime.fromisoformat(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _check_value(value: float, where: str, negative: bool, error: type[InputError] = InputError) -> None:
    if not math.isfinite(value) or (value < 0 and not negative):
        raise error(f"{where}: {value:g} is not a usable amount per kWh")
