"""`millijoule bench leases [RESULT.json]`: leases of equal time on simulated fleets of unlike devices, against leases of whole shards.

Both are the product's driver on the same devices with the same seed (`jobs/simulating`); they differ in one thing: whether a device that
is slow beside others seals a piece of its shard and gives the rest back (`pipeline/fleet/lease_times.py`). Jobs are short, a few shards
for each device, because what is at stake is the end: a device that would end its shard too late does nothing, or is waited for.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, run_alone, write_result
from millijoule.workers.errors import UsageError

#: Images of a shard: some 17 s of an H100, nine minutes of a T4, a quarter of an hour of the processors below.
SHARD_IMAGES = 16
#: Processors beside GPUs: fifty times slower than an H100, at so many watts (assumed).
CPU_TIMES_SLOWER, CPU_BUSY_W, CPU_IDLE_W, CPU_PRICE = 50.0, 100.0, 40.0, 0.1
GPUS, CPUS = 2, 16
FLEETS = ("even", "even spot", "gpu and cpu")


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Simulate pieces of shards against whole ones."""

    fleets: tuple[str, ...] = FLEETS
    """Fleets: `even` and `even spot` are 20 devices of four kinds, `gpu and cpu` two H100 and 16 processors."""

    shards_per_device: tuple[int, ...] = (3, 10)
    """Shards of a job, per device."""

    deadlines: tuple[float, ...] = (1.1, 1.5)
    """Deadlines, as multiples of the time that work-stealing takes, for `--prefer energy`; `speed` has none."""

    seeds: tuple[int, ...] = (1, 2, 3)
    """Of spot losses, faults and jitter."""


def run(options: BenchOptions) -> int:
    from millijoule.jobs.simulating.fleets import ASSUMPTIONS

    for fleet in options.fleets:
        if fleet not in FLEETS:
            raise UsageError(f"--fleets {fleet}: one of {', '.join(FLEETS)}")
    head = describe(
        "leases of equal time against whole shards, on simulated fleets under the real driver", options
    )
    sizes = [
        (fleet, n, seed)
        for fleet in options.fleets
        for n in options.shards_per_device
        for seed in options.seeds
    ]
    processors = {
        "processors beside GPUs": f"assumed: {CPU_TIMES_SLOWER:g} times slower than an H100, {CPU_BUSY_W:g} W drawing, "
        f"{CPU_IDLE_W:g} W idle, {CPU_PRICE:g} per hour"
    }
    rows = [row for size in sizes for row in run_alone(compare, *size, asdict(options))]
    write_result({**head, "assumptions": ASSUMPTIONS | processors, "rows": rows}, options.result)
    return COMPLETE


def compare(fleet: str, shards_per_device: int, seed: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed and each deadline on one fleet, with pieces and with whole shards; joules relative to work-stealing."""
    from millijoule.jobs.simulating.devices import DeviceKind, Fleet
    from millijoule.jobs.simulating.fleets import mixed_kinds, pools_of
    from millijoule.jobs.simulating.job import made_up_plan, run_job
    from millijoule.pipeline.fleet.lease_times import LeaseTimes
    from millijoule.pipeline.fleet.policy import FleetPolicy

    class WholeShards(FleetPolicy):
        """Every lease is to the end of its shard."""

        def at_most_s(self, worker_id: str, is_ahead: bool) -> float | None:
            return None

        @property
        def _times(self) -> LeaseTimes:
            return LeaseTimes()

    kinds = mixed_kinds("even", 20, spot=fleet == "even spot")
    if fleet == "gpu and cpu":
        gpu, _ = kinds["H100"]
        rate = gpu.images_per_s / CPU_TIMES_SLOWER
        kinds = {
            "H100": (gpu, GPUS),
            "CPU": (DeviceKind("CPU", rate, CPU_BUSY_W, CPU_IDLE_W, CPU_PRICE), CPUS),
        }
    planned = made_up_plan(shards_per_device * sum(count for _, count in kinds.values()), SHARD_IMAGES)
    stealing = run_job(planned, Fleet(kinds, seed))
    rows = []
    for times in (None, *options["deadlines"]):
        deadline_s = None if times is None else times * stealing.makespan_s
        for leases, policy in (("whole shards", WholeShards), ("equal time", FleetPolicy)):
            prefer: Any = "speed" if times is None else "energy"
            outcome = run_job(
                planned, Fleet(kinds, seed), fleet=policy(pools_of(kinds), prefer, deadline_s=deadline_s)
            )
            row = {
                "fleet": fleet,
                "shards_per_device": shards_per_device,
                "seed": seed,
                "prefer": prefer,
                "times_stealing": times,
                "leases": leases,
                "makespan_s": round(outcome.makespan_s, 1),
                "stealing_s": round(stealing.makespan_s, 1),
                "in_time": None if deadline_s is None else outcome.makespan_s <= deadline_s,
                "joules": round(outcome.joules),
                "joules_of_stealing": round(outcome.joules / stealing.joules, 4),
                "leases_given": outcome.calls.get("run", 0),
                "attempts_lost_to_others": outcome.lost_attempts,
                "complete": outcome.complete,
                "ledger_complete": outcome.ledger.get("complete"),
            }
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
    return rows
