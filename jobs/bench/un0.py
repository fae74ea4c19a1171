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
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, save_result, write_result
from millijoule.workers.errors import InputError

log = logging.getLogger(__name__)

#: Of the published CIFAR-10 models.
DRIVERS, CLASSES, BLOCKS, STEPS = 8, 10, 3, 10


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

    from millijoule.kernels.native_library import FORMS, native_library

    if not options.sizes or not options.batches or min(options.images, options.rounds, options.threads) < 1:
        raise InputError("--sizes, --batches: one at least; --images, --rounds, --threads: at least 1")
    torch.set_num_threads(options.threads)
    library = native_library()
    native = [] if library is None else FORMS[1 : int(library.millijoule_best_form()) + 1]
    about = describe("processor time per image of Un-0 models, their own loop and our forms", options)
    sizes: dict[str, Any] = {}
    for n in options.sizes:
        sizes[str(n)] = measured(n, ["reference", *native], options)
        log.info("%d oscillators: %s", n, sizes[str(n)]["cpu_ms_per_image"])
        save_result({**about, "models": sizes}, options.result)
    write_result({**about, "models": sizes}, options.result)
    return COMPLETE


def measured(n: int, kernels: list[str], options: BenchOptions) -> dict[str, Any]:
    """One size: blocks, and what follows from them."""
    import torch

    from millijoule.workers.generators.un0 import ClassIndex, Un0Generator, float_images
    from millijoule.workers.generators.un0_integers import Un0IntegerForm, choose_integers

    architecture, tensors = random_checkpoint(n, options.gain)
    index = ClassIndex(CLASSES)
    ours = Un0Generator(architecture, tensors, index, "float", "", "cpu")
    with torch.inference_mode():
        integers = choose_integers(architecture, tensors, float_images(architecture, tensors))
        forms: dict[str, tuple[int, Callable[[], Any]]] = own_loops(n, tensors, options)
        many = options.images
        forms["our float form"] = (many, _drawing(ours, many))
        drawn: dict[str, Callable[[], np.ndarray]] = {}
        for kernel in kernels:
            integer_form = Un0IntegerForm(architecture, tensors, integers, kernel=kernel)
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


def random_checkpoint(n: int, gain: float) -> tuple[Any, dict[str, Any]]:
    """An architecture and tensors as Un-0's CIFAR-10 training starts from, the drawn image a little stronger: it has contrast."""
    import torch

    from millijoule.workers.generators.un0_checkpoint import Un0Architecture

    architecture = Un0Architecture(
        n, DRIVERS, CLASSES, BLOCKS, "standard", "mean_relative", "sin_cos", "euler", STEPS
    )
    random = torch.Generator().manual_seed(n)
    strengths = {
        "dynamics.omega": 1.0,
        "dynamics.omega_cond": 1.0,
        "dynamics.K": gain * n**-0.5,
        "dynamics.K_cond": DRIVERS**-0.5,
        "dynamics.K_drive": DRIVERS**-0.5,
    }
    tensors = {}
    for name, shape in architecture.shapes().items():
        if name.endswith("weight"):
            strength = math.sqrt(2 / (1.04 * 9 * shape[1])) if "cascade" in name else 0.05
        else:
            strength = strengths.get(name, 0.1)
        tensors[name] = torch.randn(shape, generator=random) * strength
    return architecture, tensors


def own_loops(
    n: int, tensors: dict[str, Any], options: BenchOptions
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Un-0's loop in its ways of running, by name: images per call, and the call."""
    import torch
    from torch import nn

    class Dynamics(nn.Module):
        def __init__(self, prepared: bool) -> None:
            super().__init__()
            for name in ("K", "K_cond", "omega", "omega_cond"):
                self.register_buffer(name, tensors[f"dynamics.{name}"].clone())
            self.prepared = prepared
            if prepared:
                self.K.fill_diagonal_(0)
                self.K_cond.fill_diagonal_(0)

        def between_others(self, coupling: torch.Tensor) -> torch.Tensor:
            return coupling if self.prepared else coupling - torch.diag_embed(coupling.diagonal())

        def forward(self, state: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
            theta, phi = state[:, :n], state[:, n:]
            sin, cos, driver_sin, driver_cos = theta.sin(), theta.cos(), phi.sin(), phi.cos()
            coupling, driver_coupling = self.between_others(self.K), self.between_others(self.K_cond)
            main = self.omega + cos * (sin @ coupling.T) - sin * (cos @ coupling.T)
            driven = (
                torch.bmm(drive, driver_sin[..., None])[..., 0],
                torch.bmm(drive, driver_cos[..., None])[..., 0],
            )
            own = driver_cos * (driver_sin @ driver_coupling.T) - driver_sin * (
                driver_cos @ driver_coupling.T
            )
            return torch.cat([main + cos * driven[0] - sin * driven[1], self.omega_cond + own], 1)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for block in range(BLOCKS):
                layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
                for place in (1, 3):
                    layers += [_convolution(f"cascade.{block}.net.{place}"), nn.LeakyReLU(0.2, inplace=True)]
            self.layers = nn.Sequential(*layers, _convolution("to_output"))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layers(features.view(len(features), -1, 4, 4)))

    def _convolution(name: str) -> nn.Module:
        weight, bias = tensors[f"decoder.{name}.weight"], tensors[f"decoder.{name}.bias"]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    drive = tensors["dynamics.K_drive"]

    def draw(dynamics: Callable[..., Any], decoder: Callable[..., Any], images: int) -> torch.Tensor:
        state = torch.rand(images, n + DRIVERS) * (2 * math.pi) - math.pi
        own = drive[torch.arange(images) % CLASSES]
        for _ in range(STEPS):
            state = state + dynamics(state, own) / STEPS
        phases = state[:, :n]
        phases = phases - phases.mean(1, keepdim=True)
        pixels = decoder(torch.cat([phases.sin(), phases.cos()], 1))
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    ways: dict[str, tuple[Any, Any]] = {
        "own loop": (Dynamics(False).eval(), Decoder().eval()),
        "own loop, diagonal once": (Dynamics(True).eval(), Decoder().eval()),
    }
    if options.compiled:
        import torch._dynamo

        # each way and batch is a compilation of the same code: beyond eight, the rest would run as it is, unsaid
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 4 * len(ways) * len(options.batches)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        ways |= {
            f"{name}, compiled": (
                torch.compile(dynamics, dynamic=False),
                torch.compile(decoder, dynamic=False),
            )
            for name, (dynamics, decoder) in ways.items()
        }
    return {
        f"{name}, batch {batch}": (batch, lambda pair=pair, batch=batch: draw(*pair, batch))  # type: ignore[misc]
        for name, pair in ways.items()
        for batch in options.batches
    }
