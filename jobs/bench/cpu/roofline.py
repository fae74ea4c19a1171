"""`millijoule bench roofline [RESULT.json]`: how near the compiled CPU kernels come to what this processor can do.

Of each kernel and shape: the operations that are needed, the bytes that must move, the floor that follows from peaks measured in the
same run (products of large matrices in int8, bfloat16 and float32, and copying), the processor time it takes, and floor over time.
The PNG encoder multiplies nothing: its operations are steps of a byte, one for each that goes in or comes out, and its floor is copying
those. Alternatives of the same result stand beside it. All is processor time of one thread, forms in turn, the least of several rounds: what
else a shared machine does can only make a round longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from millijoule.jobs.bench.gpu import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import UsageError

#: Side of the square matrices whose product is taken for a peak, and bytes that are copied: more than caches hold.
SIDE, COPIED = 1024, 64 << 20


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure CPU kernels against the processor's peaks."""

    images: int = 256
    """Images of a call of the image kernel."""

    oscillators: tuple[int, ...] = (1024, 4096)
    """Sizes of dense couplings, of which a call takes 48 images through ten steps."""

    rounds: int = 20
    """How often each form is called; the least time counts."""

    picture: str | None = None
    """Draw the roofline to this PNG."""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        operations, bytes_moved: of one call, that no form can do without.
        forms: calls by name; those named "pytorch" and "zlib" are alternatives.
    """

    kernel: str
    shape: str
    operations: int
    bytes_moved: int
    forms: Mapping[str, Callable[[], object]]


def run(options: BenchOptions) -> int:
    import torch

    if min(options.images, options.rounds) < 1:
        raise UsageError("--images, --rounds: at least 1")
    torch.set_num_threads(1)
    peaks = measure_peaks(options.rounds)
    found = [measure(case, peaks, options.rounds) for case in cases(options)]
    about = describe("CPU kernels against peaks of the same run: processor time of one thread", options)
    write_result({**about, "peaks": peaks, "cases": found}, options.result)
    if options.picture is not None:
        from millijoule.jobs.measuring.roofline_picture import draw_roofline

        Path(options.picture).write_bytes(draw_roofline(peaks, found))
    return COMPLETE


def measure_peaks(rounds: int) -> dict[str, float]:
    """Operations per second of large products by type, and bytes per second, read and written, of a copy."""
    import torch

    from millijoule.kernels.processor import multiplies_bfloat16

    whole = torch.randn(SIDE, SIDE)
    calls: dict[str, Callable[[], object]] = {"float32": lambda: whole @ whole}
    if multiplies_bfloat16():
        half = whole.bfloat16()
        calls["bfloat16"] = lambda: half @ half
    eight = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8)
    calls["int8"] = lambda: torch._int_mm(eight, eight)
    peaks = {name: 2 * SIDE**3 / _least(call, rounds) for name, call in calls.items()}
    source = torch.zeros(COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {**peaks, "copy": 2 * COPIED / _least(lambda: target.copy_(source), rounds)}


def measure(case: Case, peaks: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """All forms of a case, in turn."""
    floor = max(
        case.operations / max(v for k, v in peaks.items() if k != "copy"), case.bytes_moved / peaks["copy"]
    )
    least = dict.fromkeys(case.forms, float("inf"))
    for _ in range(rounds):
        for name, call in case.forms.items():
            least[name] = min(least[name], _once(call))
    return {
        "kernel": case.kernel,
        "shape": case.shape,
        "operations": case.operations,
        "bytes_moved": case.bytes_moved,
        "floor_s": floor,
        "forms": {
            name: {
                "cpu_s": seconds,
                "operations_per_s": case.operations / seconds,
                "share_of_floor": floor / seconds,
            }
            for name, seconds in least.items()
        },
    }


def cases(options: BenchOptions) -> Iterator[Case]:
    """All kernels."""
    yield from image_cases(options.images)
    yield from (dense_case(n) for n in options.oscillators)
    yield png_case(options.images)


def image_cases(images: int) -> Iterator[Case]:
    """The packaged oscillator generators, tokens to pixels; each shape of the batch once."""
    from millijoule.kernels.image import ImageKernel
    from millijoule.kernels.native_library import FORMS, forms_here
    from millijoule.workers.engines.eager import EagerEngine
    from millijoule.workers.generators.registry import PACKAGED
    from millijoule.workers.oscillators.draw import Drawing
    from millijoule.workers.oscillators.model_file import load_model
    from millijoule.workers.oscillators.operations import operations
    from millijoule.workers.scenes.prompts import parse_prompt
    from millijoule.workers.scenes.scenes import complete, scene_tokens

    requests = scene_requests(images)
    for model in ("default", "coupled"):
        painter, _ = load_model(PACKAGED[model])
        config = painter.network.config
        scenes = [complete(parse_prompt(r.prompt, config.nouns)[0], r.seed) for r in requests]
        tokens, seeds = scene_tokens(scenes), np.array([r.seed for r in requests], np.uint64)
        icons = tokens[:, :-1].reshape(-1, 4)
        icons = icons[icons[:, 0] > 0]
        shapes = np.unique(
            np.stack([icons[:, 0], np.ones(len(icons), int), icons[:, 2], icons[:, 3] == 1], 1), axis=0
        )
        once = np.zeros((len(shapes), tokens.shape[1]), tokens.dtype)
        once[:, :3], once[:, 3] = shapes[:, :3], np.where(shapes[:, 3], 1, 2)  # any half window
        drawn = operations(config, painter.ink, once)
        needed = sum(int(drawn[part].sum()) for part in ("text", "dynamics", "decoder"))
        needed += int(operations(config, painter.ink, tokens)["canvas"].sum())
        plain = Drawing(painter, engine=EagerEngine())
        forms: dict[str, Callable[[], object]] = {"pytorch": partial(_by_pytorch, plain, tokens, seeds)}
        for form in forms_here():
            kernel = ImageKernel.of(painter.kernel_weights(), FORMS.index(form))
            assert kernel is not None
            forms[form] = partial(kernel.draw, tokens, seeds)
        weights = sum(
            layer[0].numel() for layer in painter.kernel_weights().layers.values()
        )  # once, into the cache
        moved = weights + images * 64 * 64 * 3 + len(shapes) * config.code + tokens.nbytes + seeds.nbytes
        yield Case(
            "image", f"{model}, {images} images of {len(shapes)} different shapes", needed, moved, forms
        )


def _by_pytorch(drawing: Any, tokens: Any, seeds: Any) -> object:
    from millijoule.kernels import native_library

    with native_library.only("reference"):  # the steps of coupled oscillators, too
        return drawing.draw(tokens, seeds)


def png_case(images: int) -> Case:
    """Images of the default generator to PNG files without text."""
    from millijoule.kernels.native_library import forms_here
    from millijoule.workers.generators.registry import load_generator

    pixels = load_generator("default").generate(scene_requests(images)).images
    forms: dict[str, Callable[[], object]] = {"zlib": partial(_encoded, "reference", pixels)}
    forms |= {form: partial(_encoded, form, pixels) for form in forms_here()}
    files = _encoded(("reference", *forms_here())[-1], pixels)
    moved = pixels.nbytes + sum(map(len, files))
    return Case(
        "png", f"{images} images of 64 by 64, {moved - pixels.nbytes} bytes of files", moved, moved, forms
    )


def _encoded(form: str, pixels: np.ndarray) -> list[bytes]:
    from millijoule.kernels import native_library
    from millijoule.kernels.png import encode_pngs

    with native_library.only(form):
        return encode_pngs(list(pixels), [[]] * len(pixels))


def dense_case(n: int, images: int = 48, steps: int = 10) -> Case:
    """All steps of a batch under a random all-to-all coupling of n oscillators, as Un-0's begin their training."""
    import torch

    from millijoule.kernels import native_library
    from millijoule.kernels.dense_coupling import NativeCoupling, quantize_dense, relax
    from millijoule.kernels.phase import random_phases

    torch.manual_seed(0)
    drivers, classes = 8, 10
    coupling = quantize_dense(
        torch.randn(n, n) / n**0.5,
        torch.randn(n),
        torch.randn(classes, n, drivers) / drivers**0.5,
        torch.randn(drivers, drivers) / drivers**0.5,
        torch.randn(drivers),
    )
    phases = random_phases(np.arange(images, dtype=np.uint64), n + drivers)
    kinds = torch.arange(images) % classes
    forms: dict[str, Callable[[], object]] = {"pytorch": partial(relax, phases, coupling, kinds, steps, 1.0)}
    for form in native_library.forms_here():
        with native_library.only(form):
            forms[form] = partial(NativeCoupling(coupling), phases, kinds, steps, 1.0)
    # sines and cosines of every oscillator times every weight, a multiplication and an addition each
    return Case(
        "dense coupling",
        f"{n} oscillators, {images} images, {steps} steps",
        2 * 2 * n * n * images * steps,
        n * n + 2 * phases.nbytes,
        forms,
    )


def _least(call: Callable[[], object], rounds: int) -> float:
    return min(_once(call) for _ in range(rounds))


def _once(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began
