"""`millijoule bench gpu [RESULT.json]`: joules and seconds per image of two models on one GPU, by the board's own counter.

One process draws with one model, then with the other, in blocks A B B A, so that a drift of temperature or clocks falls on
both alike; each block after a pause. No cluster, no encoding, no files: what the boards themselves need. The energy of a
block is the difference of the board's counter, the CPU's is not in it. Idle power, with both models loaded, comes first.
`millijoule verify` is the judged comparison of whole jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.jobs.measuring.one_gpu import joules_between, open_one_gpu
from millijoule.workers.generators.protocol import Generator
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.scenes import FAMILIES, sample_scene
from millijoule.workers.schemas import ImageRequest

ORDER = "abba"


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure two models on the GPU."""

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
    from millijoule.workers.generators.registry import load_generator

    gpu = open_one_gpu("bench gpu", options.device, stand_in=options.stand_in)
    models = {arm: load_generator(getattr(options, arm), device=gpu.device) for arm in "ab"}
    result = {
        **describe("joules of one board, by its counter, per image; the CPU's are not in it", options),
        "stand_in": options.stand_in,
        "device": gpu.name,
        "driver": gpu.meter.boards.driver_version,
        **compare(models, scene_requests(4096), gpu.meter, gpu.domain, options, gpu.synchronize),
    }
    gpu.meter.close()
    write_result(result, options.result)
    return COMPLETE


def scene_requests(count: int) -> list[ImageRequest]:
    """One image of each of `count` prompts: the six families in turn, held-out combinations."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(FAMILIES[i % len(FAMILIES)], rng, held_out=True) for i in range(count)]
    return [ImageRequest(str(i), 0, write_prompt(scene, rng), seed=i) for i, scene in enumerate(scenes)]


def compare(
    models: Mapping[str, Generator],
    requests: Sequence[ImageRequest],
    meter: EnergyMeter,
    domain: str,
    options: BenchOptions,
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Energy of idling and of both models, by `domain` of `meter`, and B's over A's.

    Args:
        models: "a" and "b".
        requests: prompts to draw, in turn.
        synchronize: returns when the device has nothing left to do.
        clock, sleep: the real ones outside tests.

    Raises:
        RuntimeError: the counter was reset or lost during a block.
    """

    def draw(generator: Generator, until: float) -> int:
        """Draw batch after batch until the clock says `until`, one at least; how many images."""
        drawn, size = 0, generator.info.batch_size
        while not drawn or clock() < until:
            numbers = range(drawn, drawn + size)
            batch = [replace(requests[i % len(requests)], prompt_id=str(i), seed=i) for i in numbers]
            generator.generate(batch)
            drawn += size
        return drawn

    def measure(arm: str | None) -> dict[str, Any]:
        sleep(options.pause)
        synchronize()
        before, began = meter.read(), clock()
        images = 0
        if arm is None:
            sleep(options.seconds)
        else:
            images = draw(models[arm], began + options.seconds)
        synchronize()
        seconds, after = clock() - began, meter.read()
        joules = joules_between(domain, before, after)
        return {
            "arm": arm,
            "images": images,
            "seconds": round(seconds, 3),
            "joules": joules,
            "watts": round(joules / seconds, 1),
        }

    for generator in models.values():
        draw(generator, clock())  # one batch: kernels are loaded and chosen
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
    ratio = {
        key: summary["b"][key] / summary["a"][key]
        for key in ("joules_per_image", "joules_per_image_above_idle")
    }
    return {"idle": idle, "models": summary, "ratio": ratio, "blocks": blocks}
