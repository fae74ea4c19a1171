"""Another meter beside the counters: whether it agrees with them over the blocks of the comparison.

"power" is a second source inside the device (its power, integrated by `sampled_power`, or handed in); "node" measures the
whole machine. Rows hold energy since any zero at wall-clock times; between two rows energy grows evenly.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from millijoule.pipeline.comparison.registration import Systematics
from millijoule.pipeline.comparison.rows import SECOND_METER_SCHEMA
from millijoule.workers.errors import InputError

SOURCES = ("power", "node")
#: Rows further apart say too little about a block of a minute.
MAX_ROW_GAP_NS = 10_000_000_000


@dataclass(frozen=True)
class Closure:
    """`residual` is the largest relative difference over a block; None where a block is not covered."""

    residual: float | None
    closes: bool


@dataclass(frozen=True)
class CountedStretch:
    """What the counters say about a block: `device_mj` of the devices only, `all_mj` of all domains."""

    t_open_ns: int  # wall clock
    t_close_ns: int
    device_mj: int | None
    all_mj: int | None


def check_closure(
    table: pa.Table | None, source: str, stretches: Sequence[CountedStretch], limits: Systematics
) -> Closure | None:
    """Compare `source` with the counters block by block.

    Args:
        table: of `SECOND_METER_SCHEMA`.
        source: "power" is compared with the devices' counters, "node" with all domains and the declared rest; without
            one "node" does not close. The residual is the largest within the rest's tolerance, so that a vague
            declaration closes less often and not more.
        stretches: the blocks of the comparison.
        limits: as registered.

    Returns:
        None where there is no such meter.
    """
    rest_watts, tolerance_watts = limits.declared_rest_watts, limits.declared_rest_tolerance_watts
    if source == "power":
        rest_watts = tolerance_watts = 0.0
    rows = (
        []
        if table is None
        else sorted((r["t_wall_ns"], r["energy_mj"]) for r in table.to_pylist() if r["source"] == source)
    )
    if not rows:
        return None
    if rest_watts is None or tolerance_watts is None:
        return Closure(None, False)
    times, energies = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    if (np.diff(energies) < 0).any() or not stretches:
        return Closure(None, False)
    residuals = []
    for s in stretches:
        counted = s.device_mj if source == "power" else s.all_mj
        first, last = np.searchsorted(times, s.t_open_ns, "right") - 1, np.searchsorted(times, s.t_close_ns)
        if counted is None or first < 0 or last >= len(times):
            return Closure(None, False)
        if (np.diff(times[first : last + 1]) > MAX_ROW_GAP_NS).any():
            return Closure(None, False)
        began, ended = (
            float(np.interp(t - times[0], times - times[0], energies - energies[0]))
            for t in (s.t_open_ns, s.t_close_ns)
        )
        second = ended - began
        if second <= 0:
            return Closure(None, False)
        milliseconds = (s.t_close_ns - s.t_open_ns) / 1e6
        difference = counted + rest_watts * milliseconds - second
        residuals.append((abs(difference) + tolerance_watts * milliseconds) / second)
    return Closure(max(residuals), max(residuals) <= limits.closure_tolerance)


def read_second_meter(path: Path) -> pa.Table:
    """Read a CSV file with the columns source, t_wall_ns, energy_mj.

    Raises:
        InputError: a column is missing or a row has other values.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file), start=1):
                try:
                    if row["source"] not in SOURCES:
                        raise ValueError(f"source {row['source']!r} is not one of {', '.join(SOURCES)}")
                    rows.append(
                        {
                            "source": row["source"],
                            "t_wall_ns": int(row["t_wall_ns"]),
                            "energy_mj": int(row["energy_mj"]),
                        }
                    )
                except (KeyError, TypeError, ValueError) as error:
                    raise InputError(f"{path}: row {number}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}") from error
    return pa.Table.from_pylist(rows, SECOND_METER_SCHEMA)
