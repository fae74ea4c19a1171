"""`millijoule bench fleet [RESULT.json] [--parts NAME ...]`: the product's own code on simulated fleets and outputs as large as asked.

*policies*: joules, money and time of `--prefer` and `--deadline` against plain work-stealing on the same devices with the same seed,
with spot losses and without. *load*: processor time and memory of the driver per simulated second, at thousands of devices and up to a
million shards; there the driver's own processor time passes on the simulated clock. *halves*: one driver against two with half of the
devices and of the job each. In these three Ray, devices and storage are simulated; the driver is real (`JobRun` with pool,
coordinator, policy and live tables), and so is the ledger. What Ray's own calls cost the driver is not in them: `calls` counts them,
and *ray_calls* measures them on a real Ray.

*closing*, *resume* and *report* are of made-up outputs of many shards in a bucket that counts its requests; *requests* are those of a
small real job, shard by shard; *series* are the live metrics of a large fleet, read from a real Ray's endpoint.

Every part can be run alone and is kept with the options, the machine and the commit it was measured on.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    describe,
    run_alone,
    save_result,
    write_result,
)
from millijoule.jobs.simulating.ray_costs import measure_ray_calls
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.layout import STATS_KEY

Part = Literal["policies", "load", "halves", "ray_calls", "closing", "resume", "report", "requests", "series"]
#: Of a result; each says with which options, where and on which commit it was measured.
PARTS: tuple[Part, ...] = get_args(Part)
#: Seconds that an answer of storage takes at least, where that is asked: some 30 ms of S3 within its region.
LATENCY_S = 0.03
#: Shards of outputs that are closed with that latency as well, and of those that are reported on.
MOST_WITH_LATENCY, MOST_REPORTED = 10_000, 100_000
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

    seeds: int = 3
    """The comparison of policies is made with so many seeds, from --seed on."""

    load: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DEVICES:SHARDS ...")] = (
        "1000:1000000",
        "4000:1000000",
    )
    """Sizes at which the driver's load is measured."""

    halves: Annotated[str, tyro.conf.arg(metavar="DEVICES:SHARDS")] = "4000:200000"
    """Size of the job that one driver does, and then two side by side."""

    closing: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SHARDS:IMAGES ...")] = (
        "10000:100",
        "100000:1",
        "1000000:1",
    )
    """Outputs that are closed, resumed and reported on: shards, and images of each."""

    series: Annotated[str, tyro.conf.arg(metavar="HOSTS:WORKERS")] = "1000:4000"
    """Size of the fleet whose live metrics are counted."""

    parts: tuple[Part, ...] = PARTS
    """What to measure."""

    folder: str | None = None
    """Where the made-up outputs are made and stay, to be measured again; default: a temporary folder."""

    picture: str | None = None
    """Draw the comparison into this PNG file."""

    before: str | None = None
    """An earlier result whose other parts are taken over, where this run leaves some out."""


def run(options: BenchOptions) -> int:
    from millijoule.jobs.simulating.fleets import ASSUMPTIONS, MIXES

    for mix in options.mixes:
        if mix not in MIXES:
            raise UsageError(f"--mixes {mix}: one of {', '.join(MIXES)}")
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
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch:
        measures = _measures(options, sizes, Path(options.folder or scratch))
        for name in PARTS:
            if name in options.parts:
                result[name], result["parts"][name] = measures[name](), head
                save_result(result, options.result)  # the next part may take long
    if options.picture is not None:
        from millijoule.jobs.simulating.picture import draw_policies

        Path(options.picture).write_bytes(draw_policies(result["policies"]))
    write_result(result, options.result)
    return COMPLETE


def _measures(
    options: BenchOptions, sizes: Mapping[str, list[tuple[int, int]]], folder: Path
) -> dict[str, Callable[[], Any]]:
    """What measures each part, in processes of its own."""
    from millijoule.jobs.simulating.closing_load import close_books, make_output
    from millijoule.jobs.simulating.metrics_load import measure_series
    from millijoule.jobs.simulating.report_load import report_on
    from millijoule.jobs.simulating.request_load import CASES, PRICES_OF, count_requests
    from millijoule.jobs.simulating.resume_load import resume

    def made(shards: int, images: int) -> str:
        output = str(folder / f"{shards}-{images}")
        run_alone(make_output, output, shards, images)
        return output

    def said(row: Any) -> Any:
        print(json.dumps(row), file=sys.stderr, flush=True)
        return row

    def policies() -> list[Any]:
        fleets = [(mix, spot) for mix in options.mixes for spot in (False, True)]
        return [run_alone(compare, mix, spot, asdict(options)) for mix, spot in fleets]

    def halves() -> dict[str, Any]:
        ((devices, shards),) = sizes["halves"]
        half = [run_alone(measure_load, devices // 2, shards // 2, seed) for seed in (1, 2)]
        return {"one": run_alone(measure_load, devices, shards), "halves": half}

    def closing() -> list[Any]:
        rows = []
        for shards, images in sizes["closing"]:
            latencies = (0.0,) if shards > MOST_WITH_LATENCY else (0.0, LATENCY_S)
            output = made(shards, images)
            rows += [said(run_alone(close_books, output, shards, images, s)) for s in latencies]
        return rows

    def resumes() -> list[Any]:
        return [
            said(run_alone(resume, made(*size), size[0], capped, seconds))
            for size in sizes["closing"]
            for capped in (False, True)
            for seconds in (0.0, LATENCY_S)
        ]

    def reports() -> list[Any]:
        closed = [made(*size) for size in sizes["closing"] if size[0] <= MOST_REPORTED]
        for output, (shards, images) in zip(closed, sizes["closing"], strict=False):
            if not Path(output, STATS_KEY).exists():
                run_alone(close_books, output, shards, images)
        return [said(run_alone(report_on, *closed[:n])) for n in range(1, len(closed) + 1)]

    return {
        "policies": policies,
        "load": lambda: [run_alone(measure_load, *size) for size in sizes["load"]],
        "halves": halves,
        "ray_calls": lambda: run_alone(measure_ray_calls),
        "closing": closing,
        "resume": resumes,
        "report": reports,
        "requests": lambda: {
            "prices": PRICES_OF,
            "rows": [said(run_alone(count_requests, *case)) for case in CASES],
        },
        "series": lambda: said(run_alone(measure_series, *sizes["series"][0])),
    }


def _check(options: BenchOptions) -> dict[str, list[tuple[int, int]]]:
    """The sizes of options that are pairs of numbers, of options that mean something; raises InputError."""
    for name, least in (("devices", LEAST_DEVICES), ("shards_per_device", 1), ("seed", 0), ("seeds", 1)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {least}")
    for name, values in (("deadlines", options.deadlines), ("small-factor", [options.small_factor])):
        for value in values:
            if not 0 < value < float("inf"):
                raise UsageError(f"--{name} {value:g}: more than 0")
    return {
        "load": [_pair("load", size, "DEVICES:SHARDS", LEAST_DEVICES) for size in options.load],
        "halves": [_pair("halves", options.halves, "DEVICES:SHARDS", 2 * LEAST_DEVICES)],
        "closing": [_pair("closing", size, "SHARDS:IMAGES", 1) for size in options.closing],
        "series": [_pair("series", options.series, "HOSTS:WORKERS", 1)],
    }


def _pair(option: str, text: str, what: str, least: int) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None or int(match[1]) < least or int(match[2]) < 1:
        raise UsageError(f"--{option} {text}: {what} such as 1000:1000000, the first at least {least}")
    return int(match[1]), int(match[2])


def compare(mix: str, spot: bool, options: dict[str, Any]) -> dict[str, Any]:
    """All policies on one fleet, each beside work-stealing on the same with the same seed; means over the seeds, and every run."""
    from millijoule.jobs.simulating.fleets import described, least_joules, mixed_kinds

    kinds = mixed_kinds(mix, options["devices"], spot=spot, small_factor=options["small_factor"])
    shards = options["devices"] * options["shards_per_device"]
    images = shards * POLICY_SHARD_IMAGES
    seeds = range(options["seed"], options["seed"] + options["seeds"])
    runs = [_policies(mix, spot, shards, kinds, seed, options["deadlines"]) for seed in seeds]
    rows = []
    for each in zip(*runs, strict=True):  # the same policy, one row per seed
        row = {name: each[0][name] for name in ("prefer", "times_stealing") if name in each[0]}
        for name in ("makespan_s", "joules", "money", "joules_saved", "money_saved"):
            row[name] = round(statistics.mean(run[name] for run in each), 4)
        row["joules_saved_of_each"] = [run["joules_saved"] for run in each]
        if "times_stealing" in row:
            row["in_time"] = [run["in_time"] for run in each]
            row["joules_saved_at_most"] = [
                round(1 - least_joules(kinds, images, run["deadline_s"]) / stealing["joules"], 4)
                for run, (stealing, *_) in zip(each, runs, strict=True)
            ]
        rows.append(row)
    return {
        "mix": mix,
        "spot": spot,
        "images": images,
        "shards": shards,
        "kinds": described(kinds),
        "rows": rows,
        "runs": [row for run in runs for row in run],
    }


def _policies(
    mix: str, spot: bool, shards: int, kinds: Any, seed: int, deadlines: Sequence[float]
) -> list[dict[str, Any]]:
    """A row of each policy with one seed, work-stealing first."""
    from millijoule.jobs.simulating.devices import Fleet
    from millijoule.jobs.simulating.fleets import pools_of
    from millijoule.jobs.simulating.job import made_up_plan, run_job
    from millijoule.pipeline.fleet.policy import FleetPolicy

    planned = made_up_plan(shards, POLICY_SHARD_IMAGES)

    def one(prefer: Any, deadline_s: float | None) -> dict[str, Any]:
        policy = None
        if prefer is not None:
            policy = FleetPolicy(pools_of(kinds), prefer, deadline_s=deadline_s)
        mine = _row(run_job(planned, Fleet(kinds, seed), fleet=policy))
        mine |= {"prefer": prefer or "work-stealing", "seed": seed, "deadline_s": deadline_s}
        print(json.dumps({"mix": mix, "spot": spot, **mine}), file=sys.stderr, flush=True)
        return mine

    stealing = one(None, None)
    rows = [stealing, one("speed", None), one("energy", None), one("cost", None)]
    for times in deadlines:
        for prefer in ("energy", "cost"):
            rows.append({**one(prefer, times * stealing["makespan_s"]), "times_stealing": times})
    for row in rows:
        row["joules_saved"] = round(1 - row["joules"] / stealing["joules"], 4)
        row["money_saved"] = round(1 - row["money"] / stealing["money"], 4)
        row["in_time"] = None if row["deadline_s"] is None else row["makespan_s"] <= row["deadline_s"]
    return rows


def measure_load(devices: int, shards: int, seed: int = 1) -> dict[str, Any]:
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
    outcome = run_job(planned, Fleet(kinds, seed), fleet=policy, close_books=False, driver_takes_time=True)
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
