"""A node that draws constant power: its processor's counters, its management controller, and what a job sees of both."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from support.counters import FakePowercap
from support.redfish import Controller

SITE = Path(__file__).parent / "fake_powercap"
TESTS = Path(__file__).parents[1]
METRICS = "/redfish/v1/Chassis/1/EnvironmentMetrics"

PACKAGE_W, DRAM_W, REST_W = 40, 10, 25


class SteadyNode:
    """Package 40 W, DRAM 10 W, the rest 25 W; the counters move every 10 ms. Use as a context manager.

    Args:
        folder: for the counters.
        node_watts: what the node's own meter says; default: the sum.
    """

    def __init__(self, folder: Path, node_watts: float = PACKAGE_W + DRAM_W + REST_W) -> None:
        self.powercap = FakePowercap(folder / "powercap")
        self.controller = Controller()
        self.node_watts = node_watts
        self._began = time.monotonic()
        self.controller.answers[METRICS] = self._metrics
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    @property
    def env(self) -> dict[str, str]:
        """For `generate`: processes of the job read these counters."""
        return {"PYTHONPATH": f"{SITE}:{TESTS}", "MILLIJOULE_TEST_POWERCAP": str(self.powercap.root)}

    def break_meter(self) -> None:
        """From now on the controller answers with an error."""
        self.controller.status = 500

    def _metrics(self) -> dict[str, Any]:
        joules = self.node_watts * (time.monotonic() - self._began) + 1000
        return {"EnergyJoules": {"Reading": round(joules, 1)}, "PowerWatts": {"Reading": self.node_watts}}

    def _count(self) -> None:
        while not self._stop.wait(0.01):
            seconds = time.monotonic() - self._began
            self.powercap.set("intel-rapl:0", round(1_000_000 + PACKAGE_W * 1e6 * seconds))
            self.powercap.set("intel-rapl:0:1", round(500_000 + DRAM_W * 1e6 * seconds))

    def __enter__(self) -> SteadyNode:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.controller.shutdown()
        self.controller.server_close()
