"""`millijoule bench gpu [RESULT.json]`: joules and seconds per image of two models on one GPU, by the board's own counter.

One process draws with one model, then with the other, in blocks A B B A, so that a drift of temperature or clocks falls on
both alike; each block after a pause. No cluster, no encoding, no files: what the boards themselves need. The energy of a
block is the difference of the board's counter, the CPU's is not in it. Idle power, with both models loaded, comes first.
`millijoule verify` is the judged comparison of whole jobs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from millijoule.jobs.bench.result import write_result
from millijoule.jobs.bench.stand_ins import StandInNvml, board_uuid
from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment
from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import Generator
from millijoule.workers.schemas import ImageRequest

ORDER = "abba"


@dataclass(frozen=True)
class BenchOptions:
    """Measure two models on the GPU."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

    a: str = "default"
    """The first model, as `millijoule generate --model` takes it."""

    b: str = "baseline"
    """The second."""

    seconds: float = 15.0
    """Length of a block. The counter moves in steps of some 100 ms."""

    rounds: int = 1
    """How often A B B A is repeated."""

    pause: float = 3.0
    """Seconds without work before each block."""

    device: int = 0
    """The GPU's index."""

    stand_in: bool = False
    """Draw on the CPU, with a made-up counter: a rehearsal, whose figures mean nothing."""


def run(options: BenchOptions) -> int:
    import torch

    from millijoule.workers.generators.protocol import load_generator
    from millijoule.workers.meters.meter import open_meter

    synchronize: Callable[[], None]
    if options.stand_in:
        uuid, name, device, synchronize = board_uuid(0).removeprefix("GPU-"), "stand-in", "cpu", lambda: None
        meter = open_meter([f"GPU-{uuid}"], nvml=StandInNvml(1))
    else:
        if not torch.cuda.is_available():
            raise InputError("bench gpu: PyTorch finds no GPU here")
        torch.cuda.set_device(options.device)
        uuid = str(torch.cuda.get_device_properties(options.device).uuid)
        name, device, synchronize = (
            torch.cuda.get_device_name(options.device),
            "cuda",
            torch.cuda.synchronize,
        )
        meter = open_meter([f"GPU-{uuid}"])
    domain = next((d for d in meter.domains if uuid in d), None)
    if domain is None:
        raise InputError(f"bench gpu: the energy counter of GPU-{uuid} cannot be read")
    models = {arm: load_generator(getattr(options, arm), device=device) for arm in "ab"}
    prompts = _prompts(4096)
    for generator in models.values():
        _draw(generator, prompts, 0, time.monotonic())  # one batch: kernels are loaded and chosen

    def measure(arm: str | None) -> dict[str, Any]:
        time.sleep(options.pause)
        synchronize()
        before, began = meter.read(), time.monotonic()
        images = 0
        if arm is None:
            time.sleep(options.seconds)
        else:
            images = _draw(models[arm], prompts, 0, began + options.seconds)
        synchronize()
        seconds, after = time.monotonic() - began, meter.read()
        read = domain in before.energy_mj and domain in after.energy_mj
        if not read or before.epoch_of(domain) != after.epoch_of(domain):
            raise RuntimeError(f"{domain}: the counter was reset or lost during a block; run it again")
        joules = (after.energy_mj[domain] - before.energy_mj[domain]) / 1000
        return {
            "arm": arm,
            "images": images,
            "seconds": round(seconds, 3),
            "joules": joules,
            "watts": round(joules / seconds, 1),
        }

    idle = measure(None)
    blocks = [measure(arm) for _ in range(options.rounds) for arm in ORDER]
    summary = {}
    for arm, generator in models.items():
        own = [b for b in blocks if b["arm"] == arm]
        images = sum(b["images"] for b in own)
        seconds, joules = (sum(b[key] for b in own) for key in ("seconds", "joules"))
        summary[arm] = {
            "name": generator.info.name,
            "sha256": generator.info.sha256,
            "images": images,
            "images_per_second": round(images / seconds, 2),
            "joules_per_image": joules / images,
            "joules_per_image_above_idle": (joules - idle["watts"] * seconds) / images,
            "batch_size": generator.info.batch_size,
            "steps": generator.info.num_inference_steps,
        }
    result = {
        "what": "joules of one board, by its counter, per image; the CPU's are not in it",
        "options": {k: v for k, v in asdict(options).items() if k != "result"},
        "stand_in": options.stand_in,
        "device": name,
        "driver": meter.boards.driver_version,
        "environment": environment(),
        "idle": idle,
        "models": summary,
        "ratio": {
            key: summary["b"][key] / summary["a"][key]
            for key in ("joules_per_image", "joules_per_image_above_idle")
        },
        "blocks": blocks,
    }
    meter.close()
    write_result(result, options.result)
    return COMPLETE


def _prompts(count: int) -> list[str]:
    from millijoule.workers.scenes.prompts import write_prompt
    from millijoule.workers.scenes.scenes import FAMILIES, sample_scene

    rng = np.random.default_rng(0)
    return [
        write_prompt(sample_scene(FAMILIES[i % len(FAMILIES)], rng, held_out=True), rng) for i in range(count)
    ]


def _draw(generator: Generator, prompts: list[str], drawn: int, until: float) -> int:
    """Draw batch after batch until the clock says `until`, one at least; how many images."""
    size = generator.info.batch_size
    while True:
        requests = [
            ImageRequest(str(i), 0, prompts[i % len(prompts)], seed=i) for i in range(drawn, drawn + size)
        ]
        generator.generate(requests)
        drawn += size
        if time.monotonic() >= until:
            return drawn


def main(argv: list[str] | None = None) -> int:
    return run_command("bench gpu", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
