"""Processor counters of several hosts that run at constant power, and the judge who knows what they ran.

The judge reads the energy tables of a finished job and holds each row against the history of the counter it names. He knows
nothing of leases, attempts or gaps: a row may say nothing, but what it says must be what the counter ran meanwhile.
"""

from __future__ import annotations

import bisect
import json
import os
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from support.jobs import energy_rows

_ZONE, DOMAIN = "intel-rapl:0", "cpu:package-0"
_STEP_S = 0.05
_FIRST_UJ = 1_000_000


@dataclass
class _Counter:
    """One boot's counter: microjoules since `began`, and when each value was there at the earliest and at the latest."""

    file: Path
    watts: int
    began: float
    written_ns: list[int] = field(default_factory=list)  # before the value was there
    there_ns: list[int] = field(default_factory=list)  # after
    value_uj: list[int] = field(default_factory=list)

    def move(self) -> None:
        value = _FIRST_UJ + round(self.watts * 1e6 * (time.monotonic() - self.began))
        new = self.file.with_name("next")
        new.write_text(f"{value}\n")
        before = time.monotonic_ns()
        os.replace(new, self.file)
        self.written_ns.append(before)
        self.there_ns.append(time.monotonic_ns())
        self.value_uj.append(value)

    def bounds_uj(self, t_ns: int, slack_ns: int) -> tuple[int, int]:
        """Between what and what the counter stood at `t_ns`, whose reading may be off by `slack_ns`."""
        low = bisect.bisect_right(self.there_ns, t_ns - slack_ns) - 1
        high = bisect.bisect_right(self.written_ns, t_ns + slack_ns) - 1
        return self.value_uj[max(low, 0)], self.value_uj[max(high, 0)]

    def growth_mj(self, open_ns: int, close_ns: int, slack_ns: int) -> tuple[float, float]:
        """Least and most it can have grown between two readings."""
        (open_low, open_high), (close_low, close_high) = (
            self.bounds_uj(t, slack_ns) for t in (open_ns, close_ns)
        )
        return (close_low - open_high) / 1000, (close_high - open_low) / 1000


class HostCounters:
    """One package per host; `start`, `boot` each host, `stop`, then `problems`."""

    #: A reading's time and its value are taken one after the other, on a machine that is busy with something else.
    SLACK_NS = 300_000_000

    def __init__(self) -> None:
        self._counters: dict[str, _Counter] = {}
        self._running: dict[Path, str] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="host-counters", daemon=True)

    def boot(self, boot_id: str, folder: Path, watts: int) -> None:
        """From now on the counter below `folder` is that of boot `boot_id`, and begins anew where there was none of it."""
        if boot_id in self._counters:
            return
        zone = folder / _ZONE
        zone.mkdir(parents=True, exist_ok=True)
        (zone / "name").write_text("package-0\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
        counter = _Counter(zone / "energy_uj", watts, time.monotonic())
        counter.move()
        with self._lock:
            self._counters[boot_id] = counter
            self._running[folder] = boot_id

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_STEP_S):
            with self._lock:
                running = [self._counters[boot_id] for boot_id in self._running.values()]
            for counter in running:
                try:
                    counter.move()
                except OSError:
                    return  # the hosts' folder is gone

    def problems(self, output: Path) -> list[str]:
        """What a finished job, of which `output` is a copy, says of energy that is not so; empty where all is."""
        found, sums = [], defaultdict(list)
        for row in energy_rows(output, "segment"):
            if row["domain"] is None:
                continue
            counter = self._counters.get(row["boot_id"])
            if counter is None or row["domain"] != DOMAIN:
                found.append(f"a counter that no host has: {row}")
                continue
            sums[row["boot_id"]].append(row)
            _, most = counter.growth_mj(row["t_open_mono_ns"], row["t_close_mono_ns"], self.SLACK_NS)
            if row["energy_mj"] is not None and not 0 <= row["energy_mj"] <= most:
                found.append(f"more than the {most:.0f} mJ its counter ran: {row}")
        stats = json.loads((output / "stats.json").read_text())
        certified = stats["energy"]["total_mj"]
        least = most = 0.0
        for boot_id, rows in sums.items():
            opened, closed = min(r["t_open_mono_ns"] for r in rows), max(r["t_close_mono_ns"] for r in rows)
            low, high = self._counters[boot_id].growth_mj(opened, closed, self.SLACK_NS)
            least, most = least + low, most + high
            if any(r["energy_mj"] is None for r in rows):
                continue
            total = sum(r["energy_mj"] for r in rows)
            if not low <= total <= high:
                found.append(f"boot {boot_id}: {total} mJ in all, its counter ran {low:.0f} to {high:.0f}")
        if certified is not None and not least <= certified <= most:
            found.append(f"certified are {certified} mJ, the counters ran {least:.0f} to {most:.0f}")
        if stats["evidence_class"] != "E0" and certified is None:
            found.append(f"{stats['evidence_class']} without a total")
        return found

    def booked_mj(self, output: Path, boot_id: str, segment_class: str) -> int:
        """What the job booked on that host under a class of segments."""
        rows = energy_rows(output, "segment")
        return sum(
            r["energy_mj"] or 0
            for r in rows
            if (r["boot_id"], r["segment_class"]) == (boot_id, segment_class)
        )
