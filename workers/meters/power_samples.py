"""The course of a GPU's power beside a job, and the one-second watch over its counters.

One thread per worker looks in once a second. The host's book (`CounterMeter.watch`) lets exactly one worker of all that
share a device do the looking in each second; when that worker dies, the next one is simply first. Samples wait in a
bounded ring until a commit takes them along.

Power shows when a device worked; energy is the counter's. A device whose power cannot be read has no samples.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict, deque
from collections.abc import Iterable

from millijoule.workers.meters.meter import WATCH_PERIOD_NS, CounterMeter
from millijoule.workers.meters.periodic import PeriodicThread
from millijoule.workers.schemas import PowerSample, PowerTrace

log = logging.getLogger(__name__)

#: Samples kept per device: half an hour of one a second, a few hundred kilobytes, and the most one commit carries.
#: Of a longer shard the last half hour is kept.
MAX_SAMPLES = 1_800

#: `stop` waits this long for a look in progress: longer than the book's lock may take.
STOP_TIMEOUT_S = 5.0

SOURCE = "nvml-fields-185-186"


class PowerSampler:
    """Watches the devices of a worker's own `meter` until stopped; of more than `max_samples` per device the oldest go."""

    def __init__(self, meter: CounterMeter, max_samples: int = MAX_SAMPLES) -> None:
        self.meter = meter
        self.rings: dict[str, deque[PowerSample]] = defaultdict(lambda: deque(maxlen=max_samples))
        self._lock = threading.Lock()
        self._dropped = False
        self.thread = PeriodicThread("power-sampler", self.look, self._until_next_period_s)

    def start(self) -> None:
        """Look in once per period; without a device there is nothing to watch and no thread."""
        if self.meter.counters or self.meter.boards.powers:
            self.thread.start()

    def stop(self) -> None:
        """End the thread; what was sampled can still be taken."""
        self.thread.stop(STOP_TIMEOUT_S)

    def look(self) -> None:
        """One look at every device that nobody looked at in this period."""
        seen = self.meter.watch()
        with self._lock:
            for device, sample in seen.items():
                self._append(device, sample)

    def take(self) -> tuple[PowerTrace, ...]:
        """Hand over all samples not taken yet. The taker must record them or `restore`."""
        with self._lock:
            taken = tuple(
                PowerTrace(device, self.meter.boot_id, SOURCE, tuple(ring))
                for device, ring in sorted(self.rings.items())
            )
            self.rings.clear()
        return taken

    def restore(self, traces: Iterable[PowerTrace]) -> None:
        """Take back samples that could not be recorded; where there is no room for all, the newest stay."""
        with self._lock:
            for trace in traces:
                newer = self.rings.pop(trace.device, ())
                for sample in (*trace.samples, *newer):
                    self._append(trace.device, sample)

    def _append(self, device: str, sample: PowerSample) -> None:
        ring = self.rings[device]
        if len(ring) == ring.maxlen and not self._dropped:
            log.info("%s: more than %d power samples wait; the oldest are dropped", device, ring.maxlen)
            self._dropped = True
        ring.append(sample)

    def _until_next_period_s(self) -> float:
        # in step with the other workers of the host: the first of a period does the work for all
        return (WATCH_PERIOD_NS - self.meter.clock_ns() % WATCH_PERIOD_NS) / 1e9
