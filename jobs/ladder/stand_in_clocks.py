"""A board whose clocks can be changed, for rehearsals and tests: its state is a file, which several processes see.

Its power follows its clock and its limit by a made-up rule; its counter is the sum of that over time. Watts mean nothing.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pynvml

from millijoule.jobs.measuring.stand_ins import StandInNvml

CLOCKS_MHZ = tuple(range(345, 1981, 15))
HIGHEST_MW, LOWEST_MW, USUAL_MW = 700_000, 200_000, 600_000
IDLE_MW = 100_000


class StandInClocks(StandInNvml):
    """pynvml without a driver behind: one board. Raises as the driver does where `may_change` in its state is false."""

    def __init__(self, state: Path) -> None:
        super().__init__(1)
        self._path = state
        if not state.exists():
            make_state(state)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Any:
        if uuid not in self._uuids:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def nvmlDeviceGetSupportedMemoryClocks(self, handle: Any) -> list[int]:
        return [2619, 1593]

    def nvmlDeviceGetSupportedGraphicsClocks(self, handle: Any, memory_mhz: int) -> list[int]:
        return list(reversed(CLOCKS_MHZ))

    def nvmlDeviceGetPowerManagementLimitConstraints(self, handle: Any) -> list[int]:
        return [LOWEST_MW, HIGHEST_MW]

    def nvmlDeviceGetPowerManagementLimit(self, handle: Any) -> int:
        return int(self._changed()["limit_mw"])

    def nvmlDeviceSetPowerManagementLimit(self, handle: Any, power_mw: int) -> None:
        self._changed(lambda state: state.update(limit_mw=power_mw), privileged=True)

    def nvmlDeviceSetGpuLockedClocks(self, handle: Any, low_mhz: int, high_mhz: int) -> None:
        self._changed(lambda state: state.update(locked_mhz=[low_mhz, high_mhz]), privileged=True)

    def nvmlDeviceResetGpuLockedClocks(self, handle: Any) -> None:
        self._changed(lambda state: state.update(locked_mhz=None), privileged=True)

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[int | tuple[int, int]]) -> Any:
        values = super().nvmlDeviceGetFieldValues(handle, fields)
        for value, field in zip(values, fields, strict=True):
            if field == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
                value.value.ullVal = int(self._changed()["energy_mj"])
        return values

    def _changed(
        self, change: Callable[[dict[str, Any]], None] | None = None, *, privileged: bool = False
    ) -> dict[str, Any]:
        """The state brought up to now, and then changed."""
        with self._path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state = json.load(file)
            if privileged and not state["may_change"]:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
            now_ns = time.monotonic_ns()
            state["energy_mj"] += power_mw(state) * (now_ns - state["t_ns"]) / 1e9
            state["t_ns"] = now_ns
            if change is not None:
                change(state)
            file.seek(0)
            file.write(json.dumps(state))
            file.truncate()
            return state


def make_state(path: Path, *, may_change: bool = True) -> None:
    """A board as it comes up, at `path`."""
    state = {
        "may_change": may_change,
        "locked_mhz": None,
        "limit_mw": USUAL_MW,
        "energy_mj": 1_000_000.0,
        "t_ns": time.monotonic_ns(),
    }
    path.write_text(json.dumps(state))


def power_mw(state: dict[str, Any]) -> float:
    """What the board of `state` draws."""
    clock = state["locked_mhz"][1] if state["locked_mhz"] else CLOCKS_MHZ[-1]
    return min(IDLE_MW + 500_000 * (clock / CLOCKS_MHZ[-1]) ** 3, state["limit_mw"])
