"""`millijoule bench products [RESULT.json]`: processor time per image of the oscillator generators, by how int8 matrices are multiplied.

One process draws the same images with every form of the product (`kernels.int8_product`), in blocks there and back, so that a
drift of the machine falls on all alike. float32 is what a processor without VNNI does, and is exact everywhere. A form whose pixels
are others than float32's is not exact on this processor; jobs do not use it there, and its time counts for nothing.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import dataclass
from typing import Any

from millijoule.jobs.bench.gpu import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import InputError


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure forms of the int8 product against each other."""

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

    from millijoule.kernels import int8_product
    from millijoule.workers.generators.registry import load_generator

    if not options.models or min(options.images, options.rounds, options.threads) < 1:
        raise InputError("--models: one at least; --images, --rounds, --threads: at least 1")
    torch.set_num_threads(options.threads)
    models: dict[str, Any] = {}
    for model in options.models:
        generator = load_generator(model)
        many = generator.info.batch_size
        requests = scene_requests(options.images)
        batches = [requests[i : i + many] for i in range(0, len(requests), many)]
        order = [*int8_product.FORMS, *reversed(int8_product.FORMS)]
        blocks: list[dict[str, Any]] = []
        for turn in range(-1, options.rounds):  # the first warms up
            for form in order:
                digest = hashlib.sha256()
                with int8_product.only(form):
                    began = time.process_time()
                    drawn = [generator.generate(batch).images for batch in batches]
                    used = time.process_time() - began
                for images in drawn:
                    digest.update(images.tobytes())
                if turn >= 0:
                    blocks.append({"form": form, "cpu_s": used, "pixels_sha256": digest.hexdigest()})
        right = next(block["pixels_sha256"] for block in blocks if block["form"] == "float32")
        exact = [
            form
            for form in int8_product.FORMS
            if all(block["pixels_sha256"] == right for block in blocks if block["form"] == form)
        ]
        models[model] = {
            "sha256": generator.info.sha256,
            "cpu_ms_per_image": {
                form: [round(1000 * x / options.images, 4) for x in _spread(blocks, form)] for form in exact
            },
            "not_exact_here": [form for form in int8_product.FORMS if form not in exact],
            "blocks": blocks,
        }
    about = describe("processor time per image by form of the int8 product: median, least, most", options)
    write_result({**about, "batch": many, "models": models}, options.result)
    return COMPLETE


def _spread(blocks: list[dict[str, Any]], form: str) -> tuple[float, float, float]:
    used = [block["cpu_s"] for block in blocks if block["form"] == form]
    return statistics.median(used), min(used), max(used)
