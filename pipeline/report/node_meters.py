"""Each node's own meter beside the sum of its devices: what closure check C3 compared, and what it left over."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass

import pyarrow as pa

from millijoule.pipeline.energy.node_closure import scope_of


@dataclass(frozen=True)
class NodeMeterRow:
    """One node (and boot) by one meter, over the `seconds` in which meter and devices are known; None: not known.

    The residual is devices and rest minus node. `passed` is None where the check could not be made; `note` says why.
    """

    scope: str
    seconds: float | None
    node_mj: int | None
    devices_mj: int | None
    rest_mj: int | None
    residual_mj: int | None
    residual_share: float | None
    tolerance_share: float | None
    passed: bool | None
    note: str


def node_meter_rows(closure: pa.Table | None, parts: pa.Table | None) -> list[NodeMeterRow]:
    """The C3 rows of the closure table with their parts; none where no node's meter was read.

    Args:
        parts: of the `node_energy` table.
    """
    if closure is None:
        return []
    energy: dict[str, Counter[str]] = defaultdict(Counter)
    stretches: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for part in parts.to_pylist() if parts is not None else ():
        scope = scope_of(part["host"], part["boot_id"], part["meter"])
        energy[scope][part["part"]] += part["energy_mj"]
        stretches[scope].add((part["t_open_mono_ns"], part["t_close_mono_ns"]))
    rows = []
    for row in closure.to_pylist():
        if row["check"] != "C3" or row["scope"] == "node":  # the one row of a job without any meter
            continue
        of: Counter[str] = energy.get(row["scope"], Counter())
        share = row["residual_share"]
        rows.append(
            NodeMeterRow(
                scope=row["scope"],
                seconds=sum(end - begin for begin, end in stretches[row["scope"]]) / 1e9 if of else None,
                node_mj=of.get("node"),
                devices_mj=of.get("device"),
                rest_mj=of.get("rest"),
                residual_mj=row["residual_mj"],
                residual_share=share if share is not None and math.isfinite(share) else None,
                tolerance_share=row["tolerance_share"],
                passed=row["passed"],
                note=row["note"],
            )
        )
    return sorted(rows, key=lambda r: (r.passed is not False, r.scope))
