"""One block of `millijoule bench telemetry`: a whole job, telemetry on or off, that also notes what it cost.

`python -m millijoule.jobs.bench.telemetry_job on|off PROMPTS OUTPUT ADDRESS WORKERS NOTES [POWERCAP]`

The job is `millijoule generate`, its worker the product's own with two additions: CPU time is noted around the calls
that are telemetry, and stand-ins take the place of counters the machine lacks. Both sides note alike, so that what is
noted of the side without telemetry (parsing commits, reading the clock) can be subtracted. NOTES is a folder; each
process writes one JSON file there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from millijoule.jobs.bench.process import CpuParts, memory_mb, peak_mb, thread_cpu_s
from millijoule.jobs.bench.stand_ins import StandInNvml, board_uuid
from millijoule.workers.actor import ShardWorker, remote_worker_class
from millijoule.workers.lease import WorkerReady, WorkerStopped
from millijoule.workers.meters.meter import CounterMeter, open_meter
from millijoule.workers.meters.rapl import POWERCAP_ROOT
from millijoule.workers.schemas import Commit


def measured_worker_class(notes: str, powercap: str | None) -> Any:
    """The product's worker, noting what its telemetry costs.

    Args:
        notes: folder of the notes.
        powercap: folder of the stand-in counters; None: this machine has its own.
    """

    class MeasuredWorker(ShardWorker):
        def _open_meter(self, gpus: Sequence[str]) -> CounterMeter:
            if not self.config.telemetry:
                meter = super()._open_meter(gpus)
            else:
                board = int(self.worker_id.rpartition("-")[2])
                meter = open_meter(
                    gpus or [board_uuid(board)],
                    nvml=None if gpus else StandInNvml(board + 1),
                    powercap_root=Path(powercap) if powercap else POWERCAP_ROOT,
                )
            self._cpu = CpuParts()
            self._cpu.wrap(meter, "read", "boundary reads")
            self._cpu.wrap(Commit, "to_json", "commit JSON")
            self._domains = meter.domains
            return meter

        @ray.method(concurrency_group="work")
        def start(self) -> WorkerReady:
            ready = super().start()  # type: ignore[operator]
            self._cpu_at_ready, self._ready_at = time.process_time(), time.monotonic()
            return ready

        @ray.method(concurrency_group="work")
        def stop(self) -> WorkerStopped:
            now, cpu_s = time.monotonic(), time.process_time()
            note = {
                "role": "worker",
                "domains": list(self._domains),
                "cpu_s": cpu_s,
                "cpu_s_since_ready": cpu_s - self._cpu_at_ready,
                "seconds_since_ready": now - self._ready_at,
                "telemetry_cpu_s": {**self._cpu.seconds, "one-second watch": thread_cpu_s("power-sampler")},
                "calls": dict(self._cpu.calls),
                "memory_mb": memory_mb(),
            }
            Path(notes, f"{self.worker_id}.json").write_text(json.dumps(note))
            return super().stop()  # type: ignore[operator]

    return remote_worker_class(MeasuredWorker)


def main() -> int:
    side, prompts, output, address, workers, notes = sys.argv[1:7]
    powercap = sys.argv[7] if len(sys.argv) > 7 else None

    from millijoule.jobs.generate import EXIT_CODES, run
    from millijoule.jobs.set_up.options import GenerateOptions
    from millijoule.jobs.set_up.request import request_of
    from millijoule.pipeline.closing import finish
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
    cpu.wrap(finish, "load_records", "ledger at the end", all_threads=True)
    cpu.wrap(finish, "write_energy_tables", "tables at the end", all_threads=True)
    memory: dict[str, float] = {}

    def note_memory(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            memory.update(memory_mb())
            return function(*arguments)

        return call

    finish.finish_job = note_memory(finish.finish_job)  # the driver's memory when the last shard is in
    options = GenerateOptions(
        prompts=(prompts,),
        output=output,
        ray_address=address,
        workers=workers,
        telemetry=side == "on",
        quiet=True,
    )
    result = run(request_of(options), measured_worker_class(notes, powercap))
    note = {
        "role": "driver",
        "cpu_s": time.process_time(),
        "telemetry_cpu_s": dict(cpu.seconds),
        "calls": dict(cpu.calls),
        "memory_mb": memory,
        "peak_mb": peak_mb(),
    }
    Path(notes, "driver.json").write_text(json.dumps(note))
    return EXIT_CODES[result.status]


if __name__ == "__main__":
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    sys.exit(main())
