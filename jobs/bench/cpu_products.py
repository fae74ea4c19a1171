"""`millijoule bench cpu-products [RESULT.json]`: the generator on a CPU with each form of its int8 products, in turn.

A pair is the same batch of prompts drawn with `torch._int_mm` and with float32 sums, in alternating order, on so many threads
as asked. Images must be the same bits. Processor seconds are what is compared, since other programs of the machine lengthen
the wall's; both are in the result. Also which form the product would take by itself for each of the model's matrices.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millijoule.jobs.bench.measurement import ResultOptions, describe, write_result
from millijoule.jobs.bench.scene_requests import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.kernels.int8_product import FORMS, fastest_form, only
from millijoule.workers.errors import MillijouleError
from millijoule.workers.generators.oscillator import BATCH_SIZE, OscillatorGenerator
from millijoule.workers.schemas import ImageRequest


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure the shipped generator on this CPU with each form of its int8 products."""

    pairs: int = 9
    """Batches drawn with each form."""

    images: int = BATCH_SIZE
    """Images of a batch; the default is what a worker sends."""

    threads: int = 1
    """Threads of PyTorch; workers have one each."""


@dataclass(frozen=True)
class Pair:
    """Seconds of one batch by form, of the processor and on the wall."""

    cpu: dict[str, float]
    wall: dict[str, float]


def run(options: BenchOptions) -> int:
    import torch

    from millijoule.workers.generators.registry import load_generator

    torch.set_num_threads(options.threads)
    generator = load_generator("default")
    assert isinstance(generator, OscillatorGenerator)
    requests = scene_requests(options.images)
    pairs = measure(generator, requests, options.pairs)
    result = {
        **describe("cpu-products", options),
        "model": {"name": generator.info.name, "sha256": generator.info.sha256},
        **summary(pairs, options.images),
        "chosen": chosen_forms(generator, options.images),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "vnni": torch.cpu._is_vnni_supported(),
    }
    write_result(result, options.result)
    return COMPLETE


def measure(generator: OscillatorGenerator, requests: Sequence[ImageRequest], pairs: int) -> list[Pair]:
    """`pairs` pairs in orders AB, BA, AB ...; a first one that is not counted warms up.

    Raises:
        MillijouleError: the forms do not draw the same bits.
    """
    found = []
    for number in range(pairs + 1):
        cpu, wall, images = {}, {}, {}
        for form in FORMS if number % 2 else FORMS[::-1]:
            cpu_began, wall_began = time.process_time(), time.perf_counter()
            with only(form):
                images[form] = generator.generate(requests).images
            cpu[form], wall[form] = time.process_time() - cpu_began, time.perf_counter() - wall_began
        first, *others = images.values()
        if not all(np.array_equal(first, other) for other in others):
            raise MillijouleError(
                "int8 products in different forms drew different images: the result is void"
            )
        found.append(Pair(cpu, wall))
    return found[1:]


def summary(pairs: Sequence[Pair], images: int) -> dict[str, Any]:
    """Milliseconds per image by form and int8's over float32's, each as median, least and most over the pairs."""
    result: dict[str, Any] = {"same_bits": True}
    for clock in ("cpu", "wall"):
        times = [getattr(pair, clock) for pair in pairs]
        result[clock] = {
            "ms_per_image": {form: _spread([1e3 * t[form] / images for t in times]) for form in FORMS},
            "int8_over_float32": _spread([t["int8"] / t["float32"] for t in times]),
        }
    return result


def chosen_forms(generator: OscillatorGenerator, images: int) -> list[dict[str, Any]]:
    """What timing picks for the sums of a step, in their order: near, gather, spread."""
    assert generator.coupling is not None
    cells = generator.config.cells
    rows = (2 * images * cells, 2 * images, 2 * images)  # of sines and cosines
    return [
        {
            "rows": m,
            "k": matrix.weights.shape[0],
            "n": matrix.weights.shape[1],
            "form": fastest_form(matrix, m),
        }
        for m, matrix in zip(rows, generator.coupling.products, strict=True)
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
