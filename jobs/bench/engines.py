"""`millijoule bench engines [RESULT.json]`: what an engine gains and costs, against PyTorch run plainly.

One process has the model once in every engine and draws the same images with each, in blocks A B C C B A, so that a drift of the
machine falls on all alike. What starting costs (import, load, first batch; memory) comes from a process of its own for each
engine. Energy is the counters' where the machine has any; else CPU seconds stand in for it, under their own name.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from millijoule.jobs.bench.gpu import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import (
    ResultOptions,
    describe,
    run_alone,
    save_result,
    write_result,
)
from millijoule.kernels.native_library import only
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import Generator, every_image
from millijoule.workers.meters.meter import EnergyMeter, open_meter
from millijoule.workers.schemas import ImageRequest

EngineName = Literal["eager", "deepspeed", "compile"]


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure engines against each other."""

    models: tuple[str, ...] = ("default", "baseline")
    """As `millijoule generate --model` takes them."""

    engines: tuple[EngineName, ...] = ("eager", "deepspeed", "compile")
    """The first is what the others are compared with."""

    images: int = 64
    """Images per block."""

    rounds: int = 2
    """How often the blocks go there and back."""

    num_inference_steps: int | None = None
    """Default: the model's own."""

    device: Literal["cpu", "cuda"] = "cpu"
    """What draws."""

    threads: int | None = None
    """Threads of PyTorch on a CPU. Default: as many as there are cores."""

    cuda_graphs: bool = False
    """Where an engine has them."""

    fused_modules: bool = False
    """Where an engine has them."""


def run(options: BenchOptions) -> int:
    import torch

    if len(set(options.engines)) != len(options.engines) or not options.engines:
        raise UsageError("--engines: each once, one at least")
    if min(options.images, options.rounds) < 1:
        raise UsageError("--images, --rounds: at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("bench engines: PyTorch finds no GPU here")
    _set_threads(options.threads)
    result: dict[str, Any] = {
        **describe("the same images in each engine, in one process, in blocks there and back", options),
        "threads": torch.get_num_threads(),
        "load_average": Path("/proc/loadavg").read_text().split()[:3],
        "models": {},
    }
    for model in options.models:
        result["models"][model] = measure(model, options)
        save_result(result, options.result)
    write_result(result, options.result)
    return COMPLETE


def measure(model: str, options: BenchOptions) -> dict[str, Any]:
    """Starting each engine alone, then drawing with all of them in turn."""
    from millijoule.workers.generators.registry import load_generator

    gpu, synchronize = _device(options.device)
    starts = {
        engine: run_alone(start, model, engine, options.device, options.threads, options.num_inference_steps)
        for engine in options.engines
    }
    requests = scene_requests(options.images)
    with only("reference"):  # the compiled kernel draws without any engine
        generators: dict[str, Generator] = {
            engine: load_generator(model, device=options.device, options=_generator_options(engine, options))
            for engine in options.engines
        }
    meter = open_meter([gpu] if gpu else [])
    try:
        compared = compare(generators, requests, options, meter, synchronize)
    finally:
        meter.close()
    for engine, generator in generators.items():
        report = generator.engine.report  # type: ignore[attr-defined]
        compared["engines"][engine] |= {"did": report.words(), "events": dict(report.events)}
    return {"start": starts, **compared}


def compare(
    generators: Mapping[str, Generator],
    requests: Sequence[ImageRequest],
    options: BenchOptions,
    meter: EnergyMeter,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Blocks of all `generators` in turn; the first is what the others are compared with.

    Raises:
        RuntimeError: a counter was reset or lost during a block.
    """
    drawn = {engine: _draw(generator, requests, options) for engine, generator in generators.items()}
    first = next(iter(generators))
    order = list(generators)
    blocks: list[dict[str, Any]] = []
    for engine in (order + order[::-1]) * options.rounds:
        synchronize()
        before, cpu, wall = meter.read(), time.process_time(), time.perf_counter()
        _draw(generators[engine], requests, options)
        synchronize()
        wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, meter.read()
        joules: dict[str, float | None] = {}
        for domain in meter.domains:
            read = domain in before.energy_mj and domain in after.energy_mj
            if not read or before.epoch_of(domain) != after.epoch_of(domain):
                raise RuntimeError(f"{domain}: the counter was reset or lost during a block; run it again")
            joules[domain] = (after.energy_mj[domain] - before.energy_mj[domain]) / 1000
        blocks.append({"engine": engine, "wall_s": wall, "cpu_s": cpu, "joules": joules or None})
    engines = {}
    for engine in order:
        own = [b for b in blocks if b["engine"] == engine]
        difference = np.abs(drawn[engine].astype(int) - drawn[first])
        engines[engine] = {
            "wall_s_per_image": statistics.fmean(b["wall_s"] for b in own) / len(requests),
            "cpu_s_per_image": statistics.fmean(b["cpu_s"] for b in own) / len(requests),
            "joules_per_image": _mean_joules(own, len(requests)),
            "largest_pixel_difference": int(difference.max()),
            "share_of_pixels_that_differ": float((difference > 0).mean()),
        }
    ratios = {engine: _ratios(engines[engine], engines[first]) for engine in order[1:]}
    return {"compared_with": first, "ratios": ratios, "engines": engines, "blocks": blocks}


def _mean_joules(blocks: Sequence[Mapping[str, Any]], images: int) -> float | None:
    """Joules per image of all counters together; None where the machine has none."""
    sums = [sum(b["joules"].values()) for b in blocks if b["joules"]]
    return statistics.fmean(sums) / images if len(sums) == len(blocks) else None


def _ratios(engine: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, float | None]:
    names = ("wall_s_per_image", "cpu_s_per_image", "joules_per_image")
    return {n: engine[n] / first[n] if engine[n] is not None and first[n] else None for n in names}


def _draw(generator: Generator, requests: Sequence[ImageRequest], options: BenchOptions) -> np.ndarray:
    """All images, batch by batch."""
    steps, size = options.num_inference_steps, generator.info.batch_size
    asked = [
        ImageRequest(r.prompt_id, r.image_index, r.prompt, r.seed, num_inference_steps=steps)
        for r in requests
    ]
    parts = [asked[i : i + size] for i in range(0, len(asked), size)]
    return np.concatenate([every_image(generator.generate(part), part) for part in parts])


def start(model: str, engine: str, device: str, threads: int | None, steps: int | None) -> dict[str, Any]:
    """What it takes from nothing to the first batch, by parts; runs in a process of its own."""
    parts: dict[str, Any] = {}
    clock, cpu = time.perf_counter(), time.process_time()

    def part(name: str) -> None:
        nonlocal clock, cpu
        now, used = time.perf_counter(), time.process_time()
        parts[name] = {"wall_s": now - clock, "cpu_s": used - cpu, "pss_mb_after": pss_mb()}
        clock, cpu = now, used

    import torch  # noqa: F401

    part("import torch")
    if engine == "deepspeed":
        from millijoule.workers.engines.deepspeed_library import import_deepspeed

        import_deepspeed(device)
        part("import deepspeed")
    from millijoule.workers.generators.registry import load_generator

    _set_threads(threads)
    options = BenchOptions(num_inference_steps=steps)
    with only("reference"):
        generator = load_generator(model, device=device, options=GeneratorOptions(engine=engine))  # type: ignore[arg-type]
    part("load")
    requests = scene_requests(generator.info.batch_size)
    _draw(generator, requests, options)
    part("first batch")
    _draw(generator, requests, options)
    part("second batch")
    return parts


def pss_mb() -> float:
    """Memory of this process, MB (10**6 bytes); what others have as well is divided among all."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _generator_options(engine: EngineName, options: BenchOptions) -> GeneratorOptions:
    graphs = options.cuda_graphs and engine != "eager"
    return GeneratorOptions(
        engine=engine, cuda_graphs=graphs, fused_modules=options.fused_modules and engine == "deepspeed"
    )


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _device(device: str) -> tuple[str | None, Callable[[], None]]:
    """The GPU as the meter names it, None for a CPU; and what waits for it."""
    import torch

    if device == "cpu":
        return None, lambda: None
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}", torch.cuda.synchronize
