"""What a worker did between counter reads: a gapless chain of segments.

Each close read is the next segment's open read, so the segments of a worker add up to its last read minus its first,
whatever their lengths. One thread closes segments, and another only at the end; what is closed may be taken and restored by others. Energy is a difference
of two reads and exists only where both have it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from millijoule.workers.schemas import SEGMENT_CLASSES, Segment

if TYPE_CHECKING:
    from millijoule.workers.meters.meter import EnergyMeter


class SegmentTimeline:
    """The segments of one worker; the first begins when the timeline is made, each with `last_read`."""

    def __init__(self, worker_id: str, meter: EnergyMeter) -> None:
        self.worker_id = worker_id
        self.meter = meter
        self.last_read = meter.read()
        self._closed: list[Segment] = []
        self._lock = threading.Lock()
        self._closing = threading.Lock()

    def close(
        self,
        segment_class: str,
        shard_id: int | None = None,
        attempt_id: str | None = None,
        *,
        last: bool = False,
    ) -> Segment:
        """Read the meter: what went on since the last read was `segment_class`; the next segment begins.

        With `last` nothing follows, so the meter is read afresh.

        Raises:
            ValueError: `segment_class` is not one of `SEGMENT_CLASSES`.
        """
        if segment_class not in SEGMENT_CLASSES:
            raise ValueError(f"segment class {segment_class!r}: use one of {', '.join(SEGMENT_CLASSES)}")
        with self._closing:
            read = self.meter.read_afresh() if last else self.meter.read()
            segment = Segment(self.worker_id, segment_class, self.last_read, read, shard_id, attempt_id)
            self.last_read = read
        with self._lock:
            self._closed.append(segment)
        return segment

    def take(self) -> tuple[Segment, ...]:
        """Hand over all segments closed and not taken yet, oldest first. The taker must record them or `restore`."""
        with self._lock:
            taken = tuple(self._closed)
            self._closed.clear()
        return taken

    def restore(self, segments: Iterable[Segment]) -> None:
        """Take back segments that could not be recorded; the next `take` has them first."""
        with self._lock:
            self._closed[:0] = segments


def segment_energy_mj(segment: Segment) -> int | None:
    """Measured millijoules of all domains over `segment`.

    None where nothing was measured, where a domain of the open read is absent at the close, or where boot or epoch
    changed in between: a part of the energy is not the energy.
    """
    before, after = segment.open, segment.close
    if before.boot_id != after.boot_id or not before.energy_mj:
        return None
    if any(before.epoch_of(domain) != after.epoch_of(domain) for domain in before.energy_mj):
        return None
    if any(after.energy_mj.get(domain, -1) < mj for domain, mj in before.energy_mj.items()):
        return None
    return sum(after.energy_mj[domain] - mj for domain, mj in before.energy_mj.items())


def segment_estimate_mj(segment: Segment) -> int | None:
    """Modelled millijoules over `segment` (see `workers.meters.meter`); None where either read has no estimate."""
    before, after = segment.open.estimate_mj, segment.close.estimate_mj
    if before is None or after is None or segment.open.boot_id != segment.close.boot_id or after < before:
        return None
    return after - before
