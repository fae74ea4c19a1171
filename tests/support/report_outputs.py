"""Finished outputs for tests of the report: real plans, attempts and commits, with counters that only add up watts.

Time is the test's own: it passes while an image is drawn and a counter is read, so that outputs are the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.local_job import MODEL_SHA256, plan, stand_in_worker
from support.models import Plain

from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import JobSpec, open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.workers.attempts import drawing
from millijoule.workers.attempts.runner import AttemptRunner
from millijoule.workers.lease import WorkerConfig
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.schemas import CounterRead
from millijoule.workers.storage.protocol import Store

#: What a careless page would run or show as markup.
HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"> a cat",
    '"><svg onload=alert(1)>',
    "{{ evil }} ${evil} $script & <b>bold</b>",
    "\u202eright to left\u202c and \x1b[31mred\x1b[0m",
)
GPUS = ("GPU-11111111-aaaa", "GPU-22222222-bbbb", "GPU-33333333-cccc")


class Clock:
    """What attempts know of `time`: it goes on only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def sleep(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)

    def time_ns(self) -> int:
        return 17 * 10**17 + self.now_ns

    def monotonic(self) -> float:
        return self.now_ns / 1e9


class Timed(Plain):
    """Draws an image in `seconds` of a clock."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__("cpu")
        self.clock, self.takes_s = clock, seconds

    def draw(self, request):
        self.clock.sleep(self.takes_s)
        return super().draw(request)


@dataclass
class WattMeter:
    """An `EnergyMeter` whose domains draw constant power, in watts; a read takes 50 microseconds."""

    clock: Clock
    boot_id: str
    watts: dict[str, float]
    method: str = "nvml-counter+rapl"
    domains: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.domains = tuple(self.watts)

    def read(self) -> CounterRead:
        self.clock.sleep(50e-6)
        now = self.clock.now_ns
        energy = {d: 1_000_000 + int(w * now / 1e6) for d, w in self.watts.items()}
        return CounterRead(self.boot_id, now, self.clock.time_ns(), 1000, energy, int(10 * now / 1e6), 0)

    def close(self) -> None:
        pass


def worker(
    store: Store, job: JobSpec, epoch: int, name: str, host: str, device: str, meter: Any, seconds: float
) -> AttemptRunner:
    """A worker whose images take `seconds` each."""
    config = WorkerConfig(
        store.url, job.fingerprint, job.job_seed, job.output_format, "plain", MODEL_SHA256, epoch
    )
    itself = stand_in_worker(name, f"node-{host}", host, device, epoch)
    timeline = SegmentTimeline(name, meter)
    timeline.close("load")
    generator = Timed(meter.clock, seconds)
    return AttemptRunner(config, store, generator, meter, timeline, itself, PowerSampler(meter))


def finished(
    folder: Path,
    prompts: Sequence[str],
    make_workers: Callable[[Clock, Store, JobSpec, int], list[AttemptRunner]],
    *,
    shard_size: int = 4,
) -> Store:
    """A finished job whose shards go round the workers; one shard is made twice, so one attempt loses."""
    folder.mkdir(parents=True, exist_ok=True)
    store, job = plan(folder, list(prompts), shard_size=shard_size)
    shards = load_job_shards(store, job)
    epoch = open_epoch(store, exclusive=True)
    coordinator = Coordinator(shards, list_committed(store, len(shards)), 60.0, epoch)
    clock = Clock()
    workers = make_workers(clock, store, job, epoch)
    turn = 0
    with patch.object(drawing, "time", clock):
        while (
            lease := coordinator.next_lease(workers[turn % len(workers)].worker.worker_id, 0.0)
        ) is not None:
            result = workers[turn % len(workers)].run(lease)
            if turn == 0 and len(workers) > 1:
                workers[1].run(replace(lease, attempt_id="e0001-late"))
            coordinator.complete(lease.attempt_id, result.lease.shard.shard_id, 1.0)
            turn += 1
    finish_job(store, job, shards)
    return store


def measured_output(folder: Path, prompts: Sequence[str]) -> Store:
    """Three workers on two hosts with a GPU each, of 100, 200 and 300 W beside packages of 50 W; the third is slow."""

    def workers(clock: Clock, store: Store, job: JobSpec, epoch: int) -> list[AttemptRunner]:
        made = []
        for i, gpu in enumerate(GPUS):
            host = "host-a" if i < 2 else "host-b"
            meter = WattMeter(clock, f"boot-{host}", {f"gpu:{gpu}": 100.0 * (i + 1), "cpu:package-0": 50.0})
            made.append(worker(store, job, epoch, f"w{i}", host, gpu, meter, (0.002, 0.002, 0.03)[i]))
        return made

    return finished(folder, prompts, workers)


def unmeasured_output(folder: Path, prompts: Sequence[str]) -> Store:
    """One worker without any counter: what most machines give. Its model of CPU time says 10 W."""

    def workers(clock: Clock, store: Store, job: JobSpec, epoch: int) -> list[AttemptRunner]:
        meter = WattMeter(clock, "boot", {}, method="missing")
        return [worker(store, job, epoch, "w0", "host", "cpu", meter, 0.005)]

    return finished(folder, prompts, workers)


def change_stats(store: Store, *removed: str, **changes: Any) -> None:
    """Change `stats.json`: keys to remove, and values to set."""
    stats = json.loads(store.get("stats.json")) | changes
    store.put("stats.json", json.dumps({k: v for k, v in stats.items() if k not in removed}).encode())
