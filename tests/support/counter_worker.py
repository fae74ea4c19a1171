"""A worker process that only meters: `python -m support.counter_worker FOLDER NAME SEGMENTS`.

Its GPU counter is the file FOLDER/gpu_mj, its processor FOLDER/powercap. Prints "open" when its first segment has
begun, and its segments as JSON lines when it is done.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from support.counters import FakeNvml

from millijoule.workers.meters.meter import CounterMeter, open_meter
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.schemas import CounterRead, Segment

SEGMENT_S = 0.15


class FileNvml(FakeNvml):
    """A board whose counter other processes can see too."""

    def __init__(self, folder: Path):
        super().__init__()
        self.file = folder / "gpu_mj"

    def _fail(self):
        super()._fail()
        self.energy_mj = dict.fromkeys(self.uuids, int(self.file.read_text()))


def open_shared_meter(folder: Path) -> CounterMeter:
    return open_meter(
        ["0"],
        nvml=FileNvml(folder),
        powercap_root=folder / "powercap",
        boot_id="boot",
        book_directory=folder,
    )


def segment_from(line: str) -> Segment:
    raw = json.loads(line)
    return Segment(**{**raw, "open": CounterRead(**raw["open"]), "close": CounterRead(**raw["close"])})


def main(folder: Path, name: str, segments: int) -> None:
    timeline = SegmentTimeline(name, open_shared_meter(folder))
    print("open", flush=True)
    for shard_id in range(segments):
        time.sleep(SEGMENT_S)
        timeline.close("shard", shard_id, f"{name}-{shard_id}")
    for segment in timeline.take():
        print(json.dumps(asdict(segment)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
