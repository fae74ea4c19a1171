"""`millijoule bench stages`: how long the device waits for the host while a job runs.

A whole job on a Ray cluster, with one worker whose device is a clock (`stand_in_device`): an image takes it 100 ms, and encoding
a 1024x1024 one takes the host something like that, too. The stand-in itself notes when its device was busy. In the steady
state, from the first image of the second shard to the last image of the job, what is not busy is idle.

What an image costs the host in each format is measured beside it, as CPU time of one thread.

With `--before` the same jobs run on the code of another checkout, in turn with this one's.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring import stand_in_device
from millijoule.jobs.measuring.measurement import ResultOptions, describe, run_alone, write_result
from millijoule.jobs.measuring.ray_head import ray_head

GOAL_IDLE_SHARE = 0.05
#: Images encoded per format, to know what one costs.
ENCODINGS = 15
#: Formats that the goal is stated for, and those that are only stated.
GOAL_FORMATS, OTHER_FORMATS = ("jpeg",), ("png", "webp")


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure how long the device waits for the host, and write the result file, raw rows included."""

    images: int = 128
    """Images per job."""

    shard_size: int = 16
    """Images per shard."""

    seconds_per_image: float = 0.1
    """What an image takes the device."""

    pixels: int = 1024
    """Pixels a side."""

    cpus: float = 1.0
    """CPUs of the worker."""

    rounds: int = 2
    """Jobs of each kind."""

    before: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A checkout of another commit that is measured beside this one, with the formats that it has."""


def run(options: BenchOptions) -> int:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="millijoule-bench-") as scratch:
        folder = Path(scratch)
        Path(folder, "prompts.txt").write_text("".join(f"image {i}\n" for i in range(options.images)))
        shutil.copy(stand_in_device.__file__, folder / "stand_in_device.py")
        sides: list[tuple[str, str | None, Sequence[str]]] = [("now", None, (*GOAL_FORMATS, *OTHER_FORMATS))]
        if options.before is not None:
            sides.append(("before", options.before, ("png",)))
        for number in range(options.rounds):
            for side, checkout, formats in sides if number % 2 == 0 else reversed(sides):
                rows += measure_side(options, folder, number, side, checkout, formats)
    result = {
        **describe("stages", options),
        "before": commit_of(options.before),
        **answers(rows),
        "encoding": run_alone(measure_encoding, options.pixels),
        "rows": rows,
    }
    write_result(result, options.result)
    return COMPLETE


def measure_side(
    options: BenchOptions, folder: Path, number: int, side: str, checkout: str | None, formats: Sequence[str]
) -> list[dict[str, Any]]:
    """One job in each of `formats`, on a cluster of its own: its processes have the code of `checkout`."""
    paths = [str(folder)] if checkout is None else [str(Path(checkout, "infra", "typing")), str(folder)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[stand_in_device.LOG] = str(log := folder / "device.log")
    os.environ[stand_in_device.SECONDS] = str(options.seconds_per_image)
    os.environ[stand_in_device.PIXELS] = str(options.pixels)
    rows = []
    with ray_head(2) as address:
        for image_format in formats:
            log.write_text("")
            output = folder / f"out-{number}-{side}-{image_format}"
            began = time.monotonic()
            subprocess.run(
                job_command(options, folder, output, address, image_format),
                stdout=subprocess.DEVNULL,
                check=True,
            )
            row = {
                "side": side,
                "round": number,
                "image_format": image_format,
                "job_seconds": time.monotonic() - began,
                "encoded_bytes": json.loads((output / "stats.json").read_text())["encoded_bytes"],
                **device_times(log.read_text(), options.shard_size),
            }
            rows.append(row)
            shutil.rmtree(output)
            told = {k: v for k, v in row.items() if k != "busy"}
            print(json.dumps(told), file=sys.stderr, flush=True)
    return rows


def job_command(
    options: BenchOptions, folder: Path, output: Path, address: str, image_format: str
) -> list[str]:
    command = [sys.executable, "-m", "millijoule.jobs.generate", "--quiet", "--ray-address", address]
    command += ["--prompts", str(folder / "prompts.txt"), "--output", str(output), "--workers", "1"]
    command += ["--model", "python:stand_in_device:load", "--shard-size", str(options.shard_size)]
    command += ["--cpus-per-worker", str(options.cpus)]
    return command if image_format == "png" else [*command, "--image-format", image_format]


def device_times(log: str, shard_size: int) -> dict[str, Any]:
    """Steady state of one job from the device's own log: its length, and what of it the device was busy, seconds.

    `busy` are the stretches, in seconds since the first.
    """
    busy = sorted(tuple(map(float, line.split())) for line in log.splitlines())
    steady = busy[shard_size:]
    span = steady[-1][1] - steady[0][0]
    used = sum(end - begin for begin, end in steady)
    return {
        "images": len(busy),
        "steady_s": span,
        "busy_s": used,
        "idle_share": 1 - used / span,
        "busy": [[round(begin - busy[0][0], 4), round(end - busy[0][0], 4)] for begin, end in busy],
    }


def measure_encoding(pixels: int) -> list[dict[str, Any]]:
    """CPU milliseconds and bytes of encoding one of the stand-in's images, the formats in turn."""
    from millijoule.workers.images.encode import encode_image
    from millijoule.workers.images.formats import read_image_format
    from millijoule.workers.schemas import ImageRequest

    image = stand_in_device.photograph(pixels, 0)
    request = ImageRequest("p", 0, "a photograph", 1)
    formats = [read_image_format(name, None) for name in ("png", "jpeg", "webp")]
    cpu_ms: dict[str, list[float]] = {f.name: [] for f in formats}
    n_bytes: dict[str, int] = {}
    for _ in range(ENCODINGS):
        for image_format in formats:
            began = time.thread_time()
            encoded = encode_image(
                image_format, image, request, steps=1, model_name="stand-in", model_sha256="0" * 64
            )
            cpu_ms[image_format.name].append(1000 * (time.thread_time() - began))
            n_bytes[image_format.name] = len(encoded)
    return [
        {
            "image_format": f.name,
            "quality": f.quality,
            "median_cpu_ms": statistics.median(cpu_ms[f.name]),
            "bytes": n_bytes[f.name],
            "cpu_ms": [round(ms, 3) for ms in cpu_ms[f.name]],
        }
        for f in formats
    ]


def answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Idle share by side and format (median of the jobs), and whether the goal is met."""
    kinds = dict.fromkeys((row["side"], row["image_format"]) for row in rows)
    idle: dict[str, dict[str, float]] = {}
    for side, image_format in kinds:
        shares = [r["idle_share"] for r in rows if (r["side"], r["image_format"]) == (side, image_format)]
        idle.setdefault(side, {})[image_format] = statistics.median(shares)
    return {
        "idle_share": idle,
        "goal": f"at most {GOAL_IDLE_SHARE:.0%} idle with {', '.join(GOAL_FORMATS)}",
        "goal_met": all(idle["now"][name] <= GOAL_IDLE_SHARE for name in GOAL_FORMATS),
    }


def commit_of(checkout: str | None) -> str | None:
    if checkout is None:
        return None
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
