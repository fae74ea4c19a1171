"""The GPU's integer kernels against what the board can do: images per second and trajectories, by peaks of the same run.

Each form must give the same integers as PyTorch's operations before it is timed. A floor is what no form of the same operations can go
below: those that are needed over the measured peak of int8 products, or the bytes that must be written over the measured speed of
copying, whichever takes longer. The loop in bfloat16 that a dense coupling is compared with is Un-0's equation, compiled.

On a CPU, in a rehearsal, the CPU's kernels stand in for the GPU's, at sizes of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.jobs.measuring.one_gpu import OneGpu, captured, run_for
from millijoule.kernels.dense_coupling import quantize_dense, relax
from millijoule.kernels.image import ImageKernel
from millijoule.kernels.phase import TURN, random_phases
from millijoule.kernels.upsampling_decoder import (
    ACTIVATION,
    LEAK,
    FloatConvolution,
    calibrated_ranges,
    decode,
    quantize_decoder,
)
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.model_file import load_model
from millijoule.workers.oscillators.operations import operations
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene, scene_tokens


@dataclass(frozen=True)
class Sizes:
    """Of what is measured: sides of square matrices, bytes copied, images of a batch; n, images and steps of trajectories; channels,
    blocks and images of decoders."""

    side: int
    copied: int
    images: tuple[int, ...]
    dense: tuple[tuple[int, int], ...]
    steps: int
    decoders: tuple[tuple[int, int, int], ...]


REAL = Sizes(
    8192,
    1 << 30,
    (64, 1024, 4096),
    ((1024, 256), (2048, 256), (4096, 256), (16384, 256)),
    20,
    ((128, 3, 256), (512, 4, 256)),
)
SMALL = Sizes(64, 1 << 12, (2,), ((64, 2),), 2, ((6, 1, 2),))

#: Drivers and classes of a dense coupling, as in Un-0's published models.
DRIVERS, CLASSES = 8, 10

#: Images whose phases are compared with the host's.
CHECKED = 4


@dataclass(frozen=True)
class Measured:
    """One computation at one size.

    Attributes:
        forms: what does it once, by name; the first is ours.
        units: images of a call.
        operations: int8 products' share of the operations a call needs; a multiply-accumulate is two.
        bytes_written: of results.
    """

    kernel: str
    case: str
    forms: Mapping[str, Callable[[], object]]
    units: int
    operations: float
    bytes_written: int


def measure_integers(gpu: OneGpu, seconds: float, rounds: int) -> dict[str, Any]:
    """Peaks, then every case: blocks of `seconds`, forms forth and back.

    Raises:
        RuntimeError: a form gives other integers, or the counter was lost.
    """
    sizes = REAL if gpu.device == "cuda" else SMALL
    peaks = measure_peaks(gpu, sizes, seconds)
    cases = []
    for images in sizes.images:
        for model in ("default", "coupled"):
            cases.append(_told(image_case(gpu, images, model), gpu, peaks, seconds, rounds))
    for n, images in sizes.dense:
        cases.append(_told(dense_case(gpu, n, images, sizes.steps), gpu, peaks, seconds, rounds))
    for channels, blocks, images in sizes.decoders:
        cases.append(_told(decoder_case(gpu, channels, blocks, images), gpu, peaks, seconds, rounds))
    return {"peaks": peaks, "cases": cases}


def measure_peaks(gpu: OneGpu, sizes: Sizes, seconds: float) -> dict[str, float]:
    """Operations per second of products of large square matrices, and bytes per second, read and written, of a copy."""
    eight = torch.randint(-127, 128, (sizes.side, sizes.side), dtype=torch.int8, device=gpu.device)
    by_columns = eight.t()  # as cuBLAS takes it
    half = eight.to(torch.bfloat16)
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=gpu.device)
    target = torch.empty_like(source)
    works = {
        "int8": (2 * sizes.side**3, lambda: torch._int_mm(eight, by_columns)),
        "bfloat16": (2 * sizes.side**3, lambda: half @ half),
        "copy": (2 * sizes.copied, lambda: target.copy_(source)),
    }
    found = {}
    for name, (size, work) in works.items():
        block = run_for(gpu, work, seconds)
        found[name] = size * block["calls"] / block["seconds"]
    return found


def image_case(gpu: OneGpu, images: int, model: str = "default") -> Measured:
    """A packaged model's images, tokens and seeds on the device to pixels on the device."""
    painter, _ = load_model(PACKAGED[model])
    config = painter.network.config
    random = np.random.default_rng(0)
    scenes = [
        complete(sample_scene(FAMILIES[i % len(FAMILIES)], random, nouns=config.nouns), i)
        for i in range(images)
    ]
    tokens, seeds = scene_tokens(scenes), np.arange(images, dtype=np.uint64)
    needed = operations(config, painter.ink, tokens)
    plain = Drawing(painter, gpu.device, EagerEngine())
    work: Callable[[], object]
    if gpu.device == "cuda":
        from millijoule.kernels.gpu.image import ImageKernel as GpuKernel

        kernel = GpuKernel(painter.kernel_weights(), gpu.device)
        there = torch.from_numpy(tokens).to(gpu.device), torch.from_numpy(seeds.view(np.int64)).to(gpu.device)
        work = lambda: kernel.draw_on_device(*there)  # noqa: E731
        drawn = kernel.draw(tokens, seeds)
    else:
        stand_in = ImageKernel.of(painter.kernel_weights()) or plain
        work = lambda: stand_in.draw(tokens, seeds)  # noqa: E731
        drawn = stand_in.draw(tokens, seeds)
    if not np.array_equal(drawn, plain.draw(tokens, seeds)):
        raise RuntimeError(f"image kernel, {images} images: other pixels than PyTorch's")
    forms = {"kernel": work, "pytorch, to the host": lambda: plain.draw(tokens, seeds)}
    products = float(needed["text"].sum() + needed["decoder"].sum())
    if config.coupling != "none":  # of its steps nine tenths and more are products
        products += float(needed["dynamics"].sum())
    return Measured("image", f"{model}, {images} images", forms, images, products, drawn.nbytes)


def dense_case(gpu: OneGpu, n: int, images: int, steps: int) -> Measured:
    """Trajectories of Un-0's size, from phases on the device to phases on the device."""
    weights = random_weights(n)
    coupling = quantize_dense(*weights)
    phases = (random_phases(np.arange(images, dtype=np.uint64), n + DRIVERS) - TURN // 2).contiguous()
    classes = torch.arange(images) % CLASSES
    forms: dict[str, Callable[[], object]] = {}
    if gpu.device == "cuda":
        from millijoule.kernels.gpu.dense_coupling import DenseKernel, may_stay

        few = phases[:CHECKED], classes[:CHECKED], steps, 1.0
        expected = relax(few[0], coupling, *few[1:])  # on the host
        there = phases.to(gpu.device)
        for name, resident in (("steps", False), ("K on the chip", True)):
            if resident and not may_stay(coupling):
                continue
            kernel = DenseKernel(coupling, gpu.device, resident=resident)
            if not torch.equal(kernel(*few).cpu(), expected):
                raise RuntimeError(f"dense coupling, {n} oscillators: {name} gives other phases than PyTorch")
            forms[name] = partial(kernel, there, classes, steps, 1.0)
        loop: Callable[..., Tensor] = torch.compile(float_loop, dynamic=False)
    else:
        forms["steps"] = lambda: relax(phases, coupling, classes, steps, 1.0)
        loop = float_loop
    given = float_inputs(weights, phases, classes, gpu.device)
    forms["bfloat16 loop, compiled"] = captured(lambda: loop(*given, steps, 1.0 / steps), gpu)
    products = 2.0 * n * n * 2 * images * steps
    case = f"{n} oscillators, {images} images, {steps} steps"
    return Measured("dense_coupling", case, forms, images, products, 4 * images * n)


def decoder_case(gpu: OneGpu, channels: int, blocks: int, images: int) -> Measured:
    """Decoders of Un-0's shapes, from features on the device to pixels on the device."""
    convolutions = random_convolutions(channels, blocks)
    waves = torch.sin(torch.rand(images, channels, 4, 4, generator=torch.Generator().manual_seed(1)) * 7)
    features = torch.round(waves * ACTIVATION).to(torch.int16)
    few = features[:CHECKED]
    decoder = quantize_decoder(convolutions, calibrated_ranges(convolutions, few))
    forms: dict[str, Callable[[], object]] = {}
    if gpu.device == "cuda":
        from millijoule.kernels.gpu.upsampling_decoder import DecoderKernel

        kernel = DecoderKernel(decoder, gpu.device)
        if not torch.equal(kernel(few.to(gpu.device)).cpu(), decode(few, decoder)):
            raise RuntimeError(f"decoder of {channels} channels: other pixels than PyTorch's")
        forms["kernel"] = partial(kernel, features.to(gpu.device))
    else:
        forms["kernel"] = partial(decode, features, decoder)
    half = [(w.to(gpu.device).bfloat16(), b.to(gpu.device).bfloat16()) for w, b in convolutions]
    given = waves.to(gpu.device).bfloat16().to(memory_format=torch.channels_last)
    forms["bfloat16, PyTorch"] = captured(lambda: float_decoder(given, half), gpu)
    # a product of 16 by 12 bits is four of int8; after an upsampling four taps of nine are left
    products, size = 0, 4
    for number, (weights, _) in enumerate(convolutions):
        upsampled = number % 2 == 0 and number < 2 * blocks
        size *= 2 if upsampled else 1
        products += weights.shape[0] * weights.shape[1] * (4 if upsampled else 9) * size * size
    case = f"{channels} channels to {size} by {size} pixels, {images} images"
    return Measured(
        "upsampling_decoder", case, forms, images, 4 * 2.0 * products * images, images * size * size * 3
    )


def random_convolutions(channels: int, blocks: int) -> list[FloatConvolution]:
    """Weights and biases as Un-0 begins with."""
    random = torch.Generator().manual_seed(0)
    found, shapes = [], []
    for _ in range(blocks):
        taken, channels = channels, max(channels // 2, 32)
        shapes += [(channels, taken), (channels, channels)]
    for outputs, inputs in (*shapes, (3, channels)):
        weights = torch.randn(outputs, inputs, 3, 3, generator=random) * math.sqrt(2 / (9 * inputs))
        found.append((weights, torch.randn(outputs, generator=random) * 0.1))
    return found


def float_decoder(x: Tensor, convolutions: Sequence[FloatConvolution]) -> Tensor:
    """Features to images between -1 and 1, as the equations stand."""
    *layers, last = convolutions
    for number, (weights, bias) in enumerate(layers):
        if number % 2 == 0:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.leaky_relu(F.conv2d(x, weights, bias, padding=1), LEAK)
    return torch.tanh(F.conv2d(x, *last, padding=1))


def random_weights(n: int) -> tuple[Tensor, ...]:
    """K, omega, D, C and omega' as strong as Un-0 draws them."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=random) * std

    coupling = normal(n, n, std=n**-0.5).fill_diagonal_(0)
    between = normal(DRIVERS, DRIVERS, std=DRIVERS**-0.5).fill_diagonal_(0)
    return coupling, normal(n), normal(CLASSES, n, DRIVERS, std=DRIVERS**-0.5), between, normal(DRIVERS)


def float_inputs(
    weights: tuple[Tensor, ...], phases: Tensor, classes: Tensor, device: str
) -> tuple[Tensor, ...]:
    """What `float_loop` takes: K in bfloat16, the rest in float32."""
    coupling, frequency, drive, between, driver_frequency = (w.to(device) for w in weights)
    state = phases.to(device).float() * (2 * math.pi / TURN)
    return (
        state,
        coupling.bfloat16(),
        torch.cat([frequency, driver_frequency]),
        drive[classes.to(device)],
        between,
    )


def float_loop(
    state: Tensor, coupling: Tensor, frequency: Tensor, drive: Tensor, between: Tensor, steps: int, dt: float
) -> Tensor:
    """Un-0's dynamics in Euler steps, the product of K in its type: last phases `[batch, n + m]` in radians."""
    n, batch = len(coupling), len(state)
    for _ in range(steps):
        sin, cos = torch.sin(state), torch.cos(state)
        sources = torch.cat([sin, cos])
        waves = sources[:, n:].view(2, batch, -1).permute(1, 2, 0)
        driven = torch.bmm(drive, waves).permute(2, 0, 1).reshape(2 * batch, n)
        coupled = (sources[:, :n].to(coupling.dtype) @ coupling.T).float() + driven
        field = torch.cat([coupled, sources[:, n:] @ between.T], dim=1)
        state = state + dt * (frequency + cos * field[:batch] - sin * field[batch:])
    return state


def _told(
    case: Measured, gpu: OneGpu, peaks: Mapping[str, float], seconds: float, rounds: int
) -> dict[str, Any]:
    """All forms of a case, in blocks forth and back."""
    order = [*case.forms, *reversed(list(case.forms))] * rounds
    blocks = [{"form": form, **run_for(gpu, case.forms[form], seconds)} for form in order]
    floors = {"int8": case.operations / peaks["int8"], "written": 2 * case.bytes_written / peaks["copy"]}
    forms = {}
    for form in case.forms:
        own = [block for block in blocks if block["form"] == form]
        calls = sum(block["calls"] for block in own)
        taken, joules = (sum(block[key] for block in own) / calls for key in ("seconds", "joules"))
        forms[form] = {
            "seconds": taken,
            "images_per_second": case.units / taken,
            "millijoules_per_image": 1000 * joules / case.units,
            "share_of_int8_peak": floors["int8"] / taken,
            "share_of_floor": max(floors.values()) / taken,
        }
    ours = forms[next(iter(forms))]
    return {
        "kernel": case.kernel,
        "case": case.case,
        "operations": case.operations,
        "bytes_written": case.bytes_written,
        "floors_s": floors,
        "forms": forms,
        "times_as_fast": {form: told["seconds"] / ours["seconds"] for form, told in forms.items()},
        "blocks": blocks,
    }
