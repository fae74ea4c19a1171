"""`millijoule bench fleet [RESULT.json] [--picture FILE]`: the product's own driver on simulated fleets of unlike devices.

Two questions. *Policies*: joules, money and time of `--prefer` and `--deadline` against plain work-stealing on the same devices
with the same seed, with spot losses and without. *Load*: processor time and memory of the driver per simulated second, at up to
thousands of devices and a million shards; there the driver's own processor time passes on the simulated clock.

Simulated are Ray, devices, and storage; the driver is real (`JobRun` with pool, coordinator, policy and live tables), and so is
the ledger that closes each job's books. What Ray's own calls cost the driver is not in it: `calls` counts them, and they are
measured beside (`ray_calls`).
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, run_alone, write_result
from millijoule.jobs.simulating.ray_costs import measure_ray_calls
from millijoule.workers.errors import InputError

#: Of a result; each says with which options, where and on which commit it was measured.
PARTS = ("policies", "load", "ray_calls")
#: Images of a shard in the comparison of policies: some 17 s of an H100, nine minutes of a T4.
POLICY_SHARD_IMAGES = 16
#: Of so many devices each kind has two, one of them spot, in every mix.
LEAST_DEVICES = 20
#: A model of fewer steps, in the measurement of load: shards of 100 images then take 4 s to two minutes.
LOAD_SPEED, LOAD_SHARD_IMAGES = 25.0, 100


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Simulate fleets of unlike devices under the real driver."""

    mixes: tuple[str, ...] = ("even", "old", "new")
    """Fleets of the comparison of policies."""

    devices: int = 400
    """Devices of each."""

    shards_per_device: int = 40
    """Shards of the job, per device; of 16 images."""

    deadlines: tuple[float, ...] = (1.1, 1.5, 2.0, 3.0)
    """Deadlines, as multiples of the time that work-stealing takes."""

    small_factor: float = 1.0
    """Joules per image of the small devices (L4, T4), times this."""

    seed: int = 1
    """Of spot losses, faults and jitter."""

    load: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICES:SHARDS ...")] = ("1000:1000000",)
    """Sizes at which the driver's load is measured."""

    policies: bool = True
    """Whether to compare policies."""

    ray_calls: bool = True
    """Whether to measure what Ray's own calls cost a driver, on a Ray of this machine."""

    picture: str | None = None
    """Draw the comparison into this PNG file."""

    before: str | None = None
    """An earlier result whose other parts are taken over, where this run leaves some out."""


def run(options: BenchOptions) -> int:
    from millijoule.jobs.simulating.fleets import ASSUMPTIONS, MIXES

    for mix in options.mixes:
        if mix not in MIXES:
            raise InputError(f"--mixes {mix}: one of {', '.join(MIXES)}")
    sizes = _check(options)
    head = describe("simulated fleets under the real driver", options)
    result: dict[str, Any] = {"what": head.pop("what"), "assumptions": ASSUMPTIONS, "parts": {}}
    if options.before is not None:
        earlier = json.loads(Path(options.before).read_text())
        if "parts" not in earlier:
            raise InputError(f"--before {options.before}: not a result of this benchmark")
        for name in PARTS:
            if name in earlier:
                result[name], result["parts"][name] = earlier[name], earlier["parts"][name]

    def measured(name: str, rows: Any) -> None:
        result[name], result["parts"][name] = rows, head

    if options.policies:
        fleets = [(mix, spot) for mix in options.mixes for spot in (False, True)]
        measured("policies", [run_alone(compare, mix, spot, asdict(options)) for mix, spot in fleets])
    if options.load:
        measured("load", [run_alone(measure_load, *size) for size in sizes])
    if options.ray_calls:
        measured("ray_calls", run_alone(measure_ray_calls))
    if options.picture is not None:
        from millijoule.jobs.simulating.picture import draw_policies

        Path(options.picture).write_bytes(draw_policies(result["policies"]))
    write_result(result, options.result)
    return COMPLETE


def _check(options: BenchOptions) -> list[tuple[int, int]]:
    """The sizes of `--load`, devices and shards, of options that mean something; raises InputError."""
    for name, least in (("devices", LEAST_DEVICES), ("shards_per_device", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}")
    for name, values in (("deadlines", options.deadlines), ("small-factor", [options.small_factor])):
        for value in values:
            if not 0 < value < float("inf"):
                raise InputError(f"--{name} {value:g}: more than 0")
    sizes = []
    for size in options.load:
        match = re.fullmatch(r"([0-9]+):([0-9]+)", size)
        if match is None or int(match[1]) < LEAST_DEVICES or int(match[2]) < 1:
            raise InputError(
                f"--load {size}: DEVICES:SHARDS such as 1000:1000000, at least {LEAST_DEVICES} devices"
            )
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def compare(mix: str, spot: bool, options: dict[str, Any]) -> dict[str, Any]:
    """All policies on one fleet; each row beside work-stealing on the same."""
    from millijoule.jobs.simulating.devices import Fleet
    from millijoule.jobs.simulating.fleets import described, mixed_kinds, pools_of
    from millijoule.jobs.simulating.job import made_up_plan, run_job
    from millijoule.pipeline.fleet.policy import FleetPolicy

    kinds = mixed_kinds(mix, options["devices"], spot=spot, small_factor=options["small_factor"])
    planned = made_up_plan(options["devices"] * options["shards_per_device"], POLICY_SHARD_IMAGES)

    def one(prefer: Any, deadline_s: float | None) -> dict[str, Any]:
        policy = None
        if prefer is not None:
            policy = FleetPolicy(pools_of(kinds), prefer, deadline_s=deadline_s)
        outcome = run_job(planned, Fleet(kinds, options["seed"]), fleet=policy)
        mine = _row(outcome)
        mine |= {"prefer": prefer or "work-stealing", "deadline_s": deadline_s}
        print(json.dumps({"mix": mix, "spot": spot, **mine}), file=sys.stderr, flush=True)
        return mine

    stealing = one(None, None)
    rows = [stealing, one("speed", None), one("energy", None), one("cost", None)]
    for times in options["deadlines"]:
        for prefer in ("energy", "cost"):
            rows.append({**one(prefer, times * stealing["makespan_s"]), "times_stealing": times})
    for row in rows:
        row["joules_saved"] = round(1 - row["joules"] / stealing["joules"], 4)
        row["money_saved"] = round(1 - row["money"] / stealing["money"], 4)
        row["in_time"] = None if row["deadline_s"] is None else row["makespan_s"] <= row["deadline_s"]
    return {
        "mix": mix,
        "spot": spot,
        "images": planned.job.images,
        "shards": planned.job.shards,
        "kinds": described(kinds),
        "rows": rows,
    }


def measure_load(devices: int, shards: int) -> dict[str, Any]:
    """The driver's processor time per simulated second, and the memory of its process, simulation included."""
    from millijoule.jobs.measuring.process import peak_mb
    from millijoule.jobs.simulating.devices import Fleet
    from millijoule.jobs.simulating.fleets import described, mixed_kinds, pools_of
    from millijoule.jobs.simulating.job import made_up_plan, run_job
    from millijoule.pipeline.fleet.policy import FleetPolicy

    kinds = mixed_kinds("even", devices, speed=LOAD_SPEED, spot=True)
    planned = made_up_plan(shards, LOAD_SHARD_IMAGES)
    before_mb = peak_mb()
    policy = FleetPolicy(pools_of(kinds), "speed")
    outcome = run_job(planned, Fleet(kinds, 1), fleet=policy, close_books=False, driver_takes_time=True)
    row = _row(outcome) | {
        "devices": devices,
        "shards": shards,
        "images": planned.job.images,
        "kinds": described(kinds),
        "share_of_a_core": round(outcome.driver_cpu_s / outcome.makespan_s, 4),
        "driver_cpu_s": round(outcome.driver_cpu_s, 1),
        "cpu_us_per_shard": round(outcome.driver_cpu_s / shards * 1e6, 1),
        "shards_per_s": round(shards / outcome.makespan_s, 2),
        "peak_mb": round(outcome.peak_mb),
        "mb_before_the_run": round(before_mb),
        "calls": outcome.calls,
        "calls_per_s": round(sum(outcome.calls.values()) / outcome.makespan_s, 1),
        "driver_requests": {n: c for n, c in outcome.requests.items() if n != "commit"},
        "written_mb": round(outcome.written_bytes / 1e6, 1),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _row(outcome: Any) -> dict[str, Any]:
    books = outcome.ledger
    return {
        "makespan_s": round(outcome.makespan_s, 1),
        "complete": outcome.complete,
        "joules": round(outcome.joules),
        "money": round(outcome.money, 2),
        "device_hours": {name: round(kind["hours"], 2) for name, kind in outcome.by_kind.items()},
        "spot_losses": outcome.preemptions,
        "faults": outcome.faults,
        "attempts_lost_to_others": outcome.lost_attempts,
        "ledger_joules": books["total_mj"] / 1000 if books.get("total_mj") is not None else None,
        "ledger_complete": books.get("complete"),
        "simulated_in_s": round(outcome.wall_s, 1),
    }
