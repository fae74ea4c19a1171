"""From the power samples of a comparison's blocks to rows of the second meter, source "power".

Counters are what is compared; power is the second source that says whether they can be believed. A sample stands for the
time since the one before it: NVML's field 185 is the mean of the last second and is read once a second, so it leaves no
time out. Where a board has no field 185 the instantaneous 186 is taken in the same way. Energy stands still between blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from millijoule.pipeline.comparison.rows import SECOND_METER_SCHEMA, reads_by_block
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import CounterRead

SOURCE = "power"
#: A sample stands for no longer than this; a block with a longer silence has no rows.
MAX_SILENCE_NS = 5_000_000_000

#: Time (ns, monotonic) and power (mW) of one device.
_Series = list[tuple[int, int]]


def integrate_power(power: pa.Table, reads: pa.Table) -> pa.Table:
    """Energy of the counted devices since the first block, at both ends of every block and at every sample within.

    Args:
        power: of `POWER_SCHEMA`.
        reads: of `READ_SCHEMA`; they say when blocks began and ended and which devices are counted.

    Returns:
        Rows of `SECOND_METER_SCHEMA` in order of time; none of a block in which a counted device was not sampled.
    """
    sampled = _series_by_block(power)
    chains = sorted(reads_by_block(reads).items(), key=lambda item: item[1][0].t_wall_ns)
    times_ns: list[int] = []
    energies_mj: list[int] = []
    for block_id, chain in chains:
        devices = sorted({d.removeprefix("gpu:") for r in chain for d in r.energy_mj if d.startswith("gpu:")})
        series = [sampled.get((block_id, device), []) for device in devices]
        so_far_mj = energies_mj[-1] if energies_mj else 0
        for t_wall_ns, energy_mj in _integrate_block(chain, series):
            times_ns.append(t_wall_ns)
            energies_mj.append(so_far_mj + energy_mj)
    return pa.table([[SOURCE] * len(times_ns), times_ns, energies_mj], schema=SECOND_METER_SCHEMA)


def add_sampled_power(power: pa.Table, reads: pa.Table, handed_in: pa.Table | None) -> pa.Table | None:
    """All rows of the second meter: of the samples, and those that were handed in of other sources.

    Raises:
        InputError: power was sampled and is handed in as well; which of the two counts is not for anybody to choose.
    """
    if not power.num_rows:
        return handed_in
    if handed_in is not None and SOURCE in handed_in["source"].to_pylist():
        raise InputError("--second-meter: power was sampled in the run; hand in rows of the source node only")
    return pa.concat_tables([integrate_power(power, reads), *([] if handed_in is None else [handed_in])])


def _series_by_block(power: pa.Table) -> dict[tuple[str, str], _Series]:
    """Samples by block and device in order of time: of field 185 where the device has it, else of field 186."""
    averaged = {row["device"] for row in power.to_pylist() if row["power_average_mw"] is not None}
    series: dict[tuple[str, str], _Series] = {}
    for row in power.to_pylist():
        column = "power_average_mw" if row["device"] in averaged else "power_instant_mw"
        if row[column] is not None:
            series.setdefault((row["block_id"], row["device"]), []).append((row["t_mono_ns"], row[column]))
    return {key: sorted(samples) for key, samples in series.items()}


def _integrate_block(chain: Sequence[CounterRead], devices: Sequence[_Series]) -> list[tuple[int, int]]:
    """Wall-clock times and millijoules since the block began, summed over devices; empty where one has a silence."""
    opened, closed = chain[0], chain[-1]
    steps = [_steps(samples, opened.t_mono_ns, closed.t_mono_ns) for samples in devices]
    if not steps or not all(steps) or closed.t_mono_ns <= opened.t_mono_ns:
        return []
    times = np.unique([t for step in steps for t, _ in step])
    energy_mj = np.zeros(len(times))
    for step in steps:
        at = np.array([t - opened.t_mono_ns for t, _ in step], dtype=np.float64)
        grown = np.cumsum([0.0, *((b[0] - a[0]) * b[1] / 1e9 for a, b in pairwise(step))])
        energy_mj += np.interp(times - opened.t_mono_ns, at, grown)
    wall_ns = np.minimum(times - opened.t_mono_ns + opened.t_wall_ns, closed.t_wall_ns)
    wall_ns[-1] = closed.t_wall_ns
    return [(int(t), round(mj)) for t, mj in zip(wall_ns, energy_mj, strict=True)]


def _steps(samples: _Series, opened_ns: int, closed_ns: int) -> _Series:
    """Ends of steps from `opened_ns` to `closed_ns`, each with the power (mW) of the time before it; empty: a silence."""
    inside = [s for s in samples if opened_ns < s[0] < closed_ns]
    after_mw = next((mw for t, mw in samples if closed_ns <= t <= closed_ns + MAX_SILENCE_NS), None)
    if after_mw is None and inside:
        after_mw = inside[-1][1]
    if after_mw is None:
        return []
    steps = [(opened_ns, 0), *inside, (closed_ns, after_mw)]
    return [] if any(b[0] - a[0] > MAX_SILENCE_NS for a, b in pairwise(steps)) else steps
