"""Energy counters for machines without any, so that the cost of reading them can be measured everywhere.

What stands in is the device only: an NVML library of one board per worker, and a powercap folder of two packages with
DRAM. All that reads them is the product's own. Their watts are made up and mean nothing. A read of theirs does not
enter a driver: what the kernel and the device need for a real one is not in a result made with them.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

PACKAGES = 2
RANGE_UJ = 262_143_328_850
GPU_WATTS, PACKAGE_WATTS, DRAM_WATTS = 500, 150, 20

#: RAPL moves every millisecond; what matters here is that no two reads of a second see the same value.
UPDATE_PERIOD_S = 0.2


def board_uuid(number: int) -> str:
    """The full UUID of board `number`."""
    return f"GPU-{number:08x}-0000-4000-8000-000000000000"


class StandInNvml:
    """pynvml without a driver behind: `boards` boards that draw constant power by the clock."""

    def __init__(self, boards: int) -> None:
        self._uuids = [board_uuid(i) for i in range(boards)]

    def __getattr__(self, name: str) -> Any:  # constants and exceptions
        return getattr(pynvml, name)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "stand-in"

    def nvmlDeviceGetCount(self) -> int:
        return len(self._uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return self._uuids[index]

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return handle

    def nvmlDeviceGetName(self, handle: Any) -> str:
        return "stand-in"

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [0, 0]

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[int | tuple[int, int]]) -> Any:
        values = (pynvml.c_nvmlFieldValue_t * len(fields))()
        for value, field in zip(values, fields, strict=True):
            value.timestamp, value.nvmlReturn = time.time_ns() // 1000, pynvml.NVML_SUCCESS
            if field == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
                value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
                value.value.ullVal = 1_000_000 + time.monotonic_ns() * GPU_WATTS // 1_000_000
            else:
                value.valueType = pynvml.NVML_VALUE_TYPE_UNSIGNED_INT
                value.value.uiVal = GPU_WATTS * 1000
        return values


@contextmanager
def stand_in_powercap(root: Path) -> Iterator[Path]:
    """A powercap folder, made at `root`, whose counters a thread moves on; for `open_meter` as `powercap_root`."""
    files: list[tuple[int, int]] = []  # descriptor, watts
    stop = threading.Event()

    def write() -> None:
        for descriptor, watts in files:
            # of one length and in one call: whoever reads meanwhile sees the old number or the new one
            os.pwrite(descriptor, b"%020d\n" % (time.monotonic_ns() // 1000 * watts % RANGE_UJ), 0)

    def move_on() -> None:
        while not stop.wait(UPDATE_PERIOD_S):
            write()

    for package in range(PACKAGES):
        zone = f"intel-rapl:{package}"
        for path, name, watts in (
            (zone, f"package-{package}", PACKAGE_WATTS),
            (f"{zone}:0", "dram", DRAM_WATTS),
        ):
            folder = root / path
            folder.mkdir(parents=True)
            (folder / "name").write_text(f"{name}\n")
            (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
            files.append((os.open(folder / "energy_uj", os.O_WRONLY | os.O_CREAT, 0o600), watts))
    write()
    thread = threading.Thread(target=move_on, name="stand-in-powercap", daemon=True)
    thread.start()
    try:
        yield root
    finally:
        stop.set()
        thread.join()
        for descriptor, _watts in files:
            os.close(descriptor)
