"""`millijoule bench un0 [RESULT.json]`: processor time per image of Un-0 models: Un-0's own loop, and our forms, in one process.

The loop is what Un-0 publishes as its sampling (github.com/unconv-ai/Un-0, MIT), written anew from its equations: float32, the
coupling's diagonal zeroed in each step, ten Euler steps, `torch.compile` on dynamics and decoder, which is how its checkpoints were
saved. It is timed at several batch sizes and with the diagonal zeroed once, and counts at its best. Released weights cannot be had
here: checkpoints are random, of the published shapes and initial strengths, so times are those of the real ones, pixels are not.

Whole images: noise, trajectory, readout, decoder, uint8. Forms alternate, there and back; the least of all rounds counts, by the
process's CPU time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from millijoule.jobs.bench.cpu.un0.own_loop import CLASSES, own_loops, random_checkpoint
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, save_result, write_result
from millijoule.workers.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure forms of Un-0 models against Un-0's own loop."""

    sizes: tuple[int, ...] = (1024, 2048, 4096)
    """Numbers of oscillators."""

    batches: tuple[int, ...] = (16, 64, 256)
    """Batch sizes of Un-0's own loop."""

    images: int = 48
    """Images per block of our forms."""

    rounds: int = 5
    """How often the forms go there and back."""

    threads: int = 1
    """CPU threads."""

    compiled: bool = True
    """Whether the loop is compiled, too; that takes a C++ compiler and minutes."""

    gain: float = 1.0
    """Standard deviation of the coupling, times the root of the number of oscillators; 1 is what Un-0 starts from."""


def run(options: BenchOptions) -> int:
    import torch

    from millijoule.kernels.native_library import forms_here

    if not options.sizes or not options.batches or min(options.images, options.rounds, options.threads) < 1:
        raise UsageError("--sizes, --batches: one at least; --images, --rounds, --threads: at least 1")
    torch.set_num_threads(options.threads)
    about = describe("processor time per image of Un-0 models, their own loop and our forms", options)
    sizes: dict[str, Any] = {}
    for n in options.sizes:
        sizes[str(n)] = measured(n, ["reference", *forms_here()[1:]], options)
        log.info("%d oscillators: %s", n, sizes[str(n)]["cpu_ms_per_image"])
        save_result({**about, "models": sizes}, options.result)
    write_result({**about, "models": sizes}, options.result)
    return COMPLETE


def measured(n: int, kernels: list[str], options: BenchOptions) -> dict[str, Any]:
    """One size: blocks, and what follows from them."""
    import torch

    from millijoule.kernels import native_library
    from millijoule.workers.generators.un0 import ClassIndex, Un0Generator, float_images
    from millijoule.workers.generators.un0_integers import Un0IntegerForm, choose_integers

    architecture, tensors = random_checkpoint(n, options.gain)
    index = ClassIndex(CLASSES)
    ours = Un0Generator(architecture, tensors, index, "float", "", "cpu")
    with torch.inference_mode():
        integers = choose_integers(architecture, tensors, float_images(architecture, tensors))
        forms: dict[str, tuple[int, Callable[[], Any]]] = own_loops(
            n, tensors, options.batches, options.compiled
        )
        many = options.images
        forms["our float form"] = (many, _drawing(ours, many))
        drawn: dict[str, Callable[[], np.ndarray]] = {}
        for kernel in kernels:
            with native_library.only(kernel):
                integer_form = Un0IntegerForm(architecture, tensors, integers)
            generator = Un0Generator(architecture, tensors, index, kernel, "", "cpu", integers=integer_form)
            drawn[kernel] = _drawing(generator, many)
            forms[f"integers, {kernel}"] = (many, drawn[kernel])
        blocks: list[dict[str, Any]] = []
        for turn in range(-1, options.rounds):  # the first warms up, and compiles
            for form in [*forms, *reversed(forms)]:
                images, draw = forms[form]
                began = time.process_time()
                draw()
                used = time.process_time() - began
                if turn >= 0:
                    blocks.append({"form": form, "images": images, "cpu_s": used})
        pixels = [draw() for draw in drawn.values()]
        difference = np.abs(pixels[0].astype(np.int16) - _drawing(ours, many)())
    least = {
        form: min(1000 * b["cpu_s"] / b["images"] for b in blocks if b["form"] == form) for form in forms
    }
    best = {
        kind: min(used for form, used in least.items() if form.startswith(f"{kind}, batch"))
        for kind in dict.fromkeys(form.split(", batch")[0] for form in forms if ", batch" in form)
    }
    return {
        "integers": {key: value for key, value in asdict(integers).items() if key != "ranges"},
        "bench_images": {
            "near": float((difference <= 2).mean()),
            "farthest": int(difference.max()),
            "integer_forms_agree": all(np.array_equal(pixels[0], other) for other in pixels[1:]),
        },
        "cpu_ms_per_image": {form: round(used, 4) for form, used in least.items()},
        "times_as_fast": {
            form: {f"as {kind}": round(used / least[form], 3) for kind, used in best.items()}
            for form in forms
            if ", batch" not in form
        },
        "blocks": blocks,
    }


def _drawing(generator: Any, images: int) -> Callable[[], np.ndarray]:
    from millijoule.workers.schemas import ImageRequest

    requests = [ImageRequest("b", i, str(i % CLASSES), seed=i) for i in range(images)]
    return lambda: generator.generate(requests).images
