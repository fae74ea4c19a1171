"""What `millijoule bench telemetry` runs in processes of their own: a job that notes its costs, and stressed parts.

The job is `millijoule generate`, its worker the product's own with two additions: CPU time is noted around the calls
that are telemetry, and stand-ins take the place of counters the machine lacks. Both sides note alike, so that what is
noted of the side without telemetry (parsing commits, reading the clock) can be subtracted.

The stressed worker is its meter and its sampler, without a model: what they add to a process that has the product's worker
and PyArrow loaded. The stressed driver is what it keeps and writes of the commits of many workers over hours.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from millijoule.jobs.measuring.made_up import BEGIN_S, SECOND_NS, made_up_commit
from millijoule.jobs.measuring.process import CpuParts, peak_mb, private_mb, thread_cpu_s
from millijoule.jobs.measuring.stand_ins import GPU_WATTS, StandInNvml, board_uuid
from millijoule.workers.actor import ShardWorker, remote_worker_class
from millijoule.workers.lease import Node, WorkerStopped
from millijoule.workers.meters.meter import CounterMeter, open_meter
from millijoule.workers.meters.rapl import POWERCAP_ROOT
from millijoule.workers.schemas import Commit, PowerSample, PowerTrace

#: Length of a shard of the stressed driver's job, and of the pause before it.
SHARD_S, IDLE_S = 60, 1

#: Boundaries of a stressed worker: a shard in ten seconds.
BOUNDARY_PERIOD_S = 10.0


def open_counters(board: int | str, powercap: str | None, **more: Any) -> CounterMeter:
    """The product's meter, opened with `more`.

    Args:
        board: a UUID, or the number of a board that is stood in for.
        powercap: folder of the stand-in counters; None: this machine has its own.
    """
    return open_meter(
        [board if isinstance(board, str) else board_uuid(board)],
        nvml=None if isinstance(board, str) else StandInNvml(board + 1),
        powercap_root=Path(powercap) if powercap else POWERCAP_ROOT,
        **more,
    )


def measured_worker_class(notes: str, powercap: str | None) -> Any:
    """The product's worker, noting in the folder `notes` what its telemetry costs; `powercap` as in `open_counters`."""

    class MeasuredWorker(ShardWorker):
        def open_own_meter(self, gpus: Sequence[str]) -> CounterMeter:
            if not self.config.telemetry:
                meter = super().open_own_meter(gpus)
            else:
                number = int(self.worker_id.rpartition("-")[2])
                meter = open_counters(gpus[0] if gpus else number, powercap)
            self._cpu = CpuParts()
            self._cpu.wrap(meter, "read", "boundary reads")
            self._cpu.wrap(Commit, "to_json", "commit JSON")
            self._domains = meter.domains
            return meter

        @ray.method(concurrency_group="work")
        def start(self) -> Node:
            ready = super().start()  # type: ignore[operator]
            self._cpu_at_ready = time.process_time()
            return ready

        @ray.method(concurrency_group="work")
        def stop(self) -> WorkerStopped:
            cpu_s = time.process_time()
            note = {
                "domains": list(self._domains),
                "cpu_s": cpu_s,
                "cpu_s_since_ready": cpu_s - self._cpu_at_ready,
                "telemetry_cpu_s": {**self._cpu.seconds, "one-second watch": thread_cpu_s("power-sampler")},
            }
            Path(notes, f"{self.worker_id}.json").write_text(json.dumps(note))
            return super().stop()  # type: ignore[operator]

    return remote_worker_class(MeasuredWorker)


def job(
    telemetry: bool, prompts: str, output: str, address: str, workers: int, powercap: str | None
) -> dict[str, Any]:
    """A whole job: what the driver noted, and in "workers" what each worker did."""
    from millijoule.jobs.generate import run
    from millijoule.jobs.set_up.options import GenerateOptions
    from millijoule.jobs.set_up.request import request_of
    from millijoule.pipeline.energy.live_tables import LiveTables
    from millijoule.pipeline.running import run as job_run
    from millijoule.pipeline.running.live_metrics import LiveMetrics
    from millijoule.pipeline.running.spending import Spending

    cpu = CpuParts()
    for method in ("add_commit", "add_segments", "add_power", "flush"):
        cpu.wrap(LiveTables, method, "live tables")
    for method in ("tick", "publish"):
        cpu.wrap(LiveMetrics, method, "metrics")
    cpu.wrap(Spending, "add", "running totals")
    cpu.wrap(job_run, "parse_commit", "commit JSON")
    options = GenerateOptions(
        prompts=(prompts,),
        output=output,
        ray_address=address,
        workers=str(workers),
        telemetry=telemetry,
        quiet=True,
    )
    with tempfile.TemporaryDirectory() as notes:
        result = run(request_of(options), measured_worker_class(notes, powercap))
        noted = [json.loads(p.read_text()) for p in sorted(Path(notes).glob("*.json"))]
    if result.status != "complete" or len(noted) != workers:
        raise RuntimeError(f"{result.status}; {len(noted)} of {workers} workers left a note")
    return {
        "workers": noted,
        "cpu_s": time.process_time(),
        "telemetry_cpu_s": dict(cpu.seconds),
    }


def stressed_worker(board: int | str, seconds: float, book: str, powercap: str | None) -> float:
    """Watch one board and the packages for `seconds`, then fill the ring of samples to its bound; private memory added, MB."""
    from millijoule.workers.meters.power_samples import MAX_SAMPLES, PowerSampler
    from millijoule.workers.meters.segment_timeline import SegmentTimeline

    before, began = private_mb(), time.monotonic()
    meter = open_counters(board, powercap, book_directory=Path(book))
    sampler, timeline = PowerSampler(meter), SegmentTimeline(f"w{board}", meter)
    sampler.start()
    while time.monotonic() - began < seconds:
        time.sleep(BOUNDARY_PERIOD_S)
        timeline.close("shard", 0, "a")
        timeline.take()
    sampler.stop()
    sampler.take()
    sampler.restore([_trace(0, 0, MAX_SAMPLES)])
    return private_mb() - before


def stressed_driver(workers: int, hours: int) -> dict[str, Any]:
    """Receive and write what `workers` workers commit in `hours`, flushed as often as a job of that length does."""
    from millijoule.pipeline.energy.live_tables import LiveTables
    from millijoule.pipeline.output.commits import CommitCompactor
    from millijoule.pipeline.running.run import FLUSH_PERIOD_S
    from millijoule.pipeline.running.spending import Spending
    from millijoule.workers.storage.open import open_store

    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        # writes Parquet in any driver: what that needs is not telemetry's
        compactor = CommitCompactor(store, 1)
        compactor.add(0, _sampled_commit(0, 0, 0))
        compactor.flush()
        store.put("key", b"")
        peak_before = peak_mb()
        live, spending, cpu = LiveTables(store, "f" * 64, 1), Spending(), CpuParts()

        def receive(body: bytes) -> None:
            commit = Commit.from_json(body)
            live.add_commit(commit)
            spending.add(commit.segments)

        receive, flush = cpu.timed("receive", receive), cpu.timed("flush", live.flush)
        turns, next_flush_s = hours * 3600 // (SHARD_S + IDLE_S), FLUSH_PERIOD_S
        for turn in range(turns):
            for number in range(workers):
                receive(_sampled_commit(turn * workers + number, number, turn * (SHARD_S + IDLE_S)))
            while next_flush_s < (turn + 1) * (SHARD_S + IDLE_S):
                flush()
                next_flush_s += FLUSH_PERIOD_S
        return {
            "commits": turns * workers,
            "cpu_s": sum(cpu.seconds.values()),
            "peak_added_mb": peak_mb() - peak_before,
            "live_bytes": sum(item.size_bytes for item in store.list("")),
        }


def _sampled_commit(shard_id: int, number: int, start_s: int) -> bytes:
    """A commit with a power sample a second."""
    power = [_trace(number, start_s, SHARD_S + IDLE_S)]
    return made_up_commit(shard_id, number, start_s, (IDLE_S, SHARD_S), images=256, power=power).to_json()


def _trace(number: int, start_s: int, samples: int) -> PowerTrace:
    times = [(BEGIN_S + start_s + i) * SECOND_NS for i in range(samples)]
    made = tuple(
        PowerSample(t, t + 10**18, GPU_WATTS * 1000 + t % 7, GPU_WATTS * 1000 - t % 7) for t in times
    )
    return PowerTrace(board_uuid(number), "boot", "nvml-fields-185-186", made)
