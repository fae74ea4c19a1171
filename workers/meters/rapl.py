"""The processor's energy counters as Linux shows them: RAPL zones under powercap.

They count microjoules and wrap at `max_energy_range_uj`, every two (AMD) to ten (Intel) minutes at full load; who reads
them has to unwrap them (`workers.meters.meter`). Readable by root only on most hosts, 0 in most virtual machines. A package
contains its cores; DRAM comes on top; "psys" contains both and is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

POWERCAP_ROOT = Path("/sys/class/powercap")

#: No package draws more for long: how fast a RAPL counter may come round again.
MAX_PACKAGE_WATTS = 600

#: Wraps take minutes, and a package is not reset while it runs: to look every second would only cost.
WATCH_PERIOD_NS = 10_000_000_000


@dataclass
class RaplCounter:
    """One powercap zone, microjoules. Source: Linux, Documentation/power/powercap/powercap.rst."""

    zone: Path
    domain: str
    wraps_at: int | None
    units_per_mj: int = 1000
    min_spacing_ns: int = 0
    watch_period_ns: int = WATCH_PERIOD_NS

    def __post_init__(self) -> None:
        self._file = str(self.zone / "energy_uj")

    def read(self) -> tuple[int, int]:
        """The counter in its own unit, and how long ago (ns) the device says it sampled it (0: now)."""
        # by descriptor: a tenth of what Path.read_text costs, and this runs every second for the life of a job
        file = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return int(os.read(file, 64)), 0
        finally:
            os.close(file)


def find_rapl_counters(root: Path = POWERCAP_ROOT) -> Iterator[RaplCounter]:
    """The packages under `root` and their DRAM, whether readable or not."""
    # intel-rapl is also AMD's name here; intel-rapl-mmio shows the same packages a second time
    for package in sorted(root.glob("intel-rapl:*")):
        if package.name.count(":") != 1:
            continue
        name = _zone_name(package)
        if name is None or not name.startswith("package"):
            continue
        yield RaplCounter(package, f"cpu:{name}", _wrap_of(package))
        for zone in sorted(root.glob(f"{package.name}:*")) or sorted(package.glob(f"{package.name}:*")):
            if _zone_name(zone) == "dram":
                yield RaplCounter(zone, f"dram:{name}", _wrap_of(zone))


def _zone_name(zone: Path) -> str | None:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return None


def _wrap_of(zone: Path) -> int | None:
    try:
        return int((zone / "max_energy_range_uj").read_text()) or None
    except (OSError, ValueError):
        return None
