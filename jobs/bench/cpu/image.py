"""`millijoule bench image [RESULT.json]`: processor time per image of the oscillator generators, by the form that draws.

One process draws the same images with every form, in blocks there and back, so that a drift of the machine falls on all alike:
PyTorch with float32 products, which is what a processor without VNNI does and what the others are compared with; PyTorch with int8
products; and the compiled kernel (`kernels.image`) with each set of instructions that runs here. A form whose pixels are others is
not exact on this processor; jobs do not use it there, and its time counts for nothing.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from millijoule.jobs.bench.gpu import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import UsageError

#: PyTorch's forms begin so, then comes how int8 matrices are multiplied.
PYTORCH = "pytorch-"
COMPARED_WITH = PYTORCH + "float32"


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure forms of the oscillator generators against each other."""

    models: tuple[str, ...] = ("default", "coupled")
    """Oscillator generators, as `millijoule generate --model` takes them."""

    images: int = 1024
    """Images per block."""

    rounds: int = 4
    """How often the blocks go there and back."""

    threads: int = 1
    """CPU threads."""


def run(options: BenchOptions) -> int:
    import torch

    if not options.models or min(options.images, options.rounds, options.threads) < 1:
        raise UsageError("--models: one at least; --images, --rounds, --threads: at least 1")
    torch.set_num_threads(options.threads)
    models = {model: measure(model, options) for model in options.models}
    about = describe("processor time per image by the form that draws: median, least, most", options)
    write_result({**about, "models": models}, options.result)
    return COMPLETE


def measure(model: str, options: BenchOptions) -> dict[str, Any]:
    """All forms of one model."""
    from millijoule.kernels import int8_product, native_library
    from millijoule.workers.generators.registry import load_generator

    generators = {}
    for form in ("reference", *native_library.forms_here()):
        with native_library.only(form):
            generators[form] = load_generator(model)
    forms = [*(PYTORCH + product for product in int8_product.FORMS), *native_library.forms_here()]
    batch = generators["reference"].info.batch_size
    requests = scene_requests(options.images)
    batches = [requests[i : i + batch] for i in range(0, len(requests), batch)]
    blocks: list[dict[str, Any]] = []
    for turn in range(-1, options.rounds):  # the first warms up
        for form in [*forms, *reversed(forms)]:
            digest = hashlib.sha256()
            with _products(form):
                generator = generators["reference" if form.startswith(PYTORCH) else form]
                began = time.process_time()
                drawn = [generator.generate(some).images for some in batches]
                used = time.process_time() - began
            for images in drawn:
                digest.update(images.tobytes())
            if turn >= 0:
                blocks.append({"form": form, "cpu_s": used, "pixels_sha256": digest.hexdigest()})
    right = next(block["pixels_sha256"] for block in blocks if block["form"] == COMPARED_WITH)
    exact = [f for f in forms if all(b["pixels_sha256"] == right for b in blocks if b["form"] == f)]
    used_by = {form: _spread(blocks, form) for form in exact}
    return {
        "sha256": generators["reference"].info.sha256,
        "batch": batch,
        "cpu_ms_per_image": {
            form: [round(1000 * x / options.images, 4) for x in used] for form, used in used_by.items()
        },
        "times_faster": {form: round(used_by[COMPARED_WITH][0] / used_by[form][0], 2) for form in exact},
        "not_exact_here": [form for form in forms if form not in exact],
        "blocks": blocks,
    }


@contextmanager
def _products(form: str) -> Iterator[None]:
    from millijoule.kernels import int8_product, native_library

    if not form.startswith(PYTORCH):
        yield
        return
    with native_library.only("reference"), int8_product.only(form.removeprefix(PYTORCH)):
        yield


def _spread(blocks: list[dict[str, Any]], form: str) -> tuple[float, float, float]:
    used = [block["cpu_s"] for block in blocks if block["form"] == form]
    return statistics.median(used), min(used), max(used)
