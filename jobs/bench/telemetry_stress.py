"""Stressed telemetry, each part in a process of its own; prints one JSON line.

`python -m millijoule.jobs.bench.telemetry_stress worker real|stand-in BOARD SECONDS BOOK [POWERCAP]`
`python -m millijoule.jobs.bench.telemetry_stress driver WORKERS HOURS`

The worker's part is its meter and its sampler, without a model: what they add to a process that has the product's worker
and PyArrow loaded. The driver's part is what it keeps and writes of the commits of many workers over hours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from millijoule.jobs.bench.process import memory_mb, peak_mb
from millijoule.jobs.bench.stand_ins import DRAM_WATTS, GPU_WATTS, PACKAGE_WATTS, StandInNvml, board_uuid
from millijoule.workers.schemas import Commit, CounterRead, PowerSample, PowerTrace, Segment

SECOND_NS = 1_000_000_000

#: Length of a shard of the driver's made-up job, and of the pause before it.
SHARD_S, IDLE_S = 60, 1

#: Boundaries of a worker that makes a shard in ten seconds.
BOUNDARY_PERIOD_S = 10.0


def worker(kind: str, board: str, seconds: float, book: str, powercap: str | None) -> dict[str, Any]:
    """Watch one board and the packages for `seconds`, then fill the ring of samples to its bound.

    Args:
        kind: "real", `board` being a UUID, or "stand-in", `board` being a number.
        book: folder of the host's counter book.
        powercap: folder of the stand-in counters; None: this machine has its own.
    """
    import millijoule.workers.actor  # what a worker has loaded anyway
    from millijoule.workers.meters.meter import open_meter
    from millijoule.workers.meters.power_samples import MAX_SAMPLES, PowerSampler
    from millijoule.workers.meters.rapl import POWERCAP_ROOT
    from millijoule.workers.meters.segment_timeline import SegmentTimeline

    del millijoule
    before, cpu_before, began = memory_mb(), time.process_time(), time.monotonic()
    real = kind == "real"
    meter = open_meter(
        [board if real else board_uuid(int(board))],
        nvml=None if real else StandInNvml(int(board) + 1),
        powercap_root=Path(powercap) if powercap else POWERCAP_ROOT,
        book_directory=Path(book),
    )
    sampler, timeline = PowerSampler(meter), SegmentTimeline(f"w{board}", meter)
    sampler.start()
    opened_s = time.process_time() - cpu_before
    while time.monotonic() - began < seconds:
        time.sleep(BOUNDARY_PERIOD_S)
        timeline.close("shard", 0, "a")
        timeline.take()
    cpu_s, watched_s = time.process_time() - cpu_before - opened_s, time.monotonic() - began
    sampler.stop()
    sampled = sum(len(t.samples) for t in sampler.take())
    sampler.restore([_trace(0, 0, MAX_SAMPLES)])
    after = memory_mb()
    return {
        "domains": list(meter.domains),
        "seconds": watched_s,
        "opening_cpu_s": opened_s,
        "cpu_s": cpu_s,
        "samples_taken": sampled,
        "samples_held": MAX_SAMPLES,
        "private_added_mb": after["private"] - before["private"],
        "pss_added_mb": after["pss"] - before["pss"],
    }


def driver(workers: int, hours: int) -> dict[str, Any]:
    """Receive and write what `workers` workers commit in `hours`, flushed as often as a job of that length does."""
    from millijoule.pipeline.energy.live_tables import LiveTables
    from millijoule.pipeline.output.commits import CommitCompactor
    from millijoule.pipeline.running.run import FLUSH_PERIOD_S
    from millijoule.pipeline.running.spending import Spending
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        shard_s = SHARD_S + IDLE_S
        compactor = CommitCompactor(
            store, 1
        )  # writes Parquet in any driver: what that needs is not telemetry's
        compactor.add(0, made_up_commit(0, 0))
        compactor.flush()
        store.put("key", b"")
        before, peak_before, cpu_before = memory_mb(), peak_mb(), 0.0
        live, spending, next_flush, cpu_s, flushes = (
            LiveTables(store, "f" * 64, 1),
            Spending(),
            FLUSH_PERIOD_S,
            0.0,
            0,
        )
        for turn in range(hours * 3600 // shard_s):
            for number in range(workers):
                body = made_up_commit(turn * workers + number, number, turn * shard_s)
                cpu_before = time.process_time()
                commit = Commit.from_json(body)
                live.add_commit(commit)
                spending.add(commit.segments)
                cpu_s += time.process_time() - cpu_before
            while next_flush < (turn + 1) * shard_s:
                cpu_before = time.process_time()
                live.flush()
                cpu_s += time.process_time() - cpu_before
                next_flush += FLUSH_PERIOD_S
                flushes += 1
        after = memory_mb()
        return {
            "commits": hours * 3600 // shard_s * workers,
            "flushes": flushes,
            "cpu_s": cpu_s,
            "private_added_mb": after["private"] - before["private"],
            "peak_added_mb": peak_mb() - peak_before,
            "live_bytes": sum(item.size_bytes for item in store.list("")),
        }


def made_up_commit(shard_id: int, number: int, t_s: int = 0) -> bytes:
    """The commit of worker `number`'s shard that began at `t_s`: idle, shard, and a power sample a second."""
    watts = {f"gpu:{board_uuid(number)}": GPU_WATTS}
    watts |= {f"cpu:package-{i}": PACKAGE_WATTS for i in range(2)} | {
        f"dram:package-{i}": DRAM_WATTS for i in range(2)
    }

    def read(at_s: int) -> CounterRead:
        t = (1_000_000 + at_s) * SECOND_NS + number
        return CounterRead(
            "boot", t, t, 150_000, {d: 10**9 + w * at_s * 1000 for d, w in watts.items()}, at_s, 0
        )

    name, attempt = f"w0001-{number:04d}", f"e000001-{shard_id}"
    reads = [read(t_s), read(t_s + IDLE_S), read(t_s + IDLE_S + SHARD_S)]
    return Commit(
        *(shard_id, attempt, 1, name, "node", "host", board_uuid(number), "f" * 64, "0" * 64, (), "rows"),
        *(256, 0, {}, reads[1].t_wall_ns, reads[2].t_wall_ns, 1, tuple(watts), 1, "nvml-counter+rapl"),
        (
            Segment(name, "idle", reads[0], reads[1]),
            Segment(name, "shard", reads[1], reads[2], shard_id, attempt),
        ),
        (_trace(number, t_s, SHARD_S + IDLE_S),),
    ).to_json()


def _trace(number: int, t_s: int, samples: int) -> PowerTrace:
    times = [(1_000_000 + t_s + i) * SECOND_NS for i in range(samples)]
    made = tuple(
        PowerSample(t, t + 10**18, GPU_WATTS * 1000 + t % 7, GPU_WATTS * 1000 - t % 7) for t in times
    )
    return PowerTrace(board_uuid(number), "boot", "nvml-fields-185-186", made)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        kind, board, seconds, book, *rest = sys.argv[2:]
        made = worker(kind, board, float(seconds), book, rest[0] if rest else None)
    else:
        made = driver(int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(made))
