"""An Un-0 model in integers: the same pixels on every processor, several times faster than its floats, and when that is allowed.

In go classes and seeds, out come uint8 images, by `kernels.dense_coupling` and `kernels.upsampling_decoder`: compiled for this processor,
or in PyTorch with the same bits; on a GPU `un0_gpu` has them. Whether integers stand for a model is decided once, by its pixels beside those of its floats
(`choose_integers`, when a checkpoint is converted), and written into its file: so every node draws with the same form, and files
from before stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor, nn

from millijoule.kernels.dense_coupling import (
    DenseCoupling,
    NativeCoupling,
    fine_sin_cos,
    quantize_dense,
    relax,
)
from millijoule.kernels.native_library import is_forced, kernel_words, usual_form
from millijoule.kernels.phase import TURN, random_phases
from millijoule.kernels.upsampling_decoder import (
    FloatConvolution,
    IntegerDecoder,
    NativeDecoder,
    calibrated_ranges,
    decode,
    quantize_decoder,
)
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.generators.un0_checkpoint import STEM, Un0Architecture
from millijoule.workers.generators.un0_model import between_others

log = logging.getLogger(__name__)

#: What is asked of integers: so large a share of values this near to the floats'. It is tried on `CHECKED_IMAGES`; the bound that
#: is stated is 99.9 %, the rest is for images that are not among them.
NEAR_LEVELS, NEAR_SHARE = 2, 0.9995
CHECKED_IMAGES = 64

#: Images from whose activations the decoder's ranges are taken.
CALIBRATION_IMAGES = 16


@dataclass(frozen=True)
class Un0Integers:
    """How a model runs in integers, as its file says.

    Attributes:
        fine_every: see `DenseCoupling`; 0: eight bits of each coupling are enough.
        ranges: real values of the decoder's largest activations, by layer.
        near: share of the values of `images` test images that are within `NEAR_LEVELS` of the float form's.
        farthest: the largest difference among them, in levels of 255.
    """

    fine_every: Annotated[int, Meta(ge=0, le=1000)]
    ranges: Annotated[list[float], Meta(min_length=1, max_length=12)]
    near: float
    farthest: int
    images: int


class Un0IntegerForm:
    """Draws in integers on a CPU. The result depends on the model, class, seed and steps alone, whatever the processor, threads and batch."""

    def __init__(
        self,
        architecture: Un0Architecture,
        tensors: Mapping[str, Tensor],
        integers: Un0Integers,
        *,
        engine: Engine | None = None,
    ) -> None:
        """`tensors`: by their published names; `engine`: None runs it plainly. `native_library` says in which form.

        Raises:
            ValueError: the model cannot be held in integers; the message says why.
        """
        refuse_unknown(architecture)
        self.architecture = architecture
        self.kernels = kernel_words()
        engine = engine or EagerEngine()
        coupling = quantized_coupling(architecture, tensors, integers.fine_every)
        decoder = quantize_decoder(convolutions_of(architecture, tensors), integers.ranges)
        if usual_form() is None and not is_forced():
            log.warning(
                "integers by PyTorch take up to 2.6 times as long as floating point: install a C++ compiler, then "
                "the package again (on a processor with AVX2), or convert the checkpoint with --form float"
            )
        dynamics, drawing = cpu_modules(coupling, decoder)
        self._dynamics = engine.prepare(dynamics.eval(), "dynamics", static=False)
        self._decoder = engine.prepare(drawing.eval(), "decoder", static=False)

    def relax(self, classes: Sequence[int], seeds: Sequence[int], steps: int) -> Tensor:
        """Final phases, int32 `[batch, n]` of 65,536 to a turn, not wrapped.

        Raises:
            ValueError: steps so long cannot be taken in integers.
        """
        a = self.architecture
        start = start_phases(seeds, a.oscillators + a.drivers)
        return self._dynamics(start, torch.tensor(classes, dtype=torch.int64), steps, a.horizon)

    def decode(self, phases: Tensor) -> np.ndarray:
        """uint8 `[batch, size, size, 3]` from final phases."""
        return self._decoder(features_of(phases, self.architecture)).numpy()

    def draw(self, classes: Sequence[int], seeds: Sequence[int], steps: int) -> np.ndarray:
        """uint8 `[batch, size, size, 3]`; raises ValueError as `relax`."""
        return self.decode(self.relax(classes, seeds, steps))


class _Dynamics(nn.Module):
    """Modules, so that an engine runs them as it does all networks."""

    def __init__(self, coupling: DenseCoupling) -> None:
        super().__init__()
        self.coupling = coupling

    def forward(self, phases: Tensor, classes: Tensor, steps: int, horizon: float) -> Tensor:
        return relax(phases, self.coupling, classes, steps, horizon)


def _dynamics(coupling: DenseCoupling) -> nn.Module:
    return _Dynamics(coupling) if usual_form() is None else _CompiledDynamics(coupling)


class _CompiledDynamics(nn.Module):
    def __init__(self, coupling: DenseCoupling) -> None:
        super().__init__()
        self.relax = NativeCoupling(coupling)

    def forward(self, phases: Tensor, classes: Tensor, steps: int, horizon: float) -> Tensor:
        return self.relax(phases, classes, steps, horizon, threads=torch.get_num_threads())


class _Decoder(nn.Module):
    def __init__(self, decoder: IntegerDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> Tensor:
        return decode(features, self.decoder)


class _CompiledDecoder(nn.Module):
    def __init__(self, decoder: IntegerDecoder) -> None:
        super().__init__()
        self.decode = NativeDecoder(decoder)

    def forward(self, features: Tensor) -> Tensor:
        return self.decode(features, threads=torch.get_num_threads())


def cpu_modules(coupling: DenseCoupling, decoder: IntegerDecoder) -> tuple[nn.Module, nn.Module]:
    """What relaxes phases and draws features on a CPU, in the form that is usual here."""
    return _dynamics(coupling), _Decoder(decoder) if usual_form() is None else _CompiledDecoder(decoder)


def refuse_unknown(architecture: Un0Architecture) -> None:
    """Raise ValueError for a model that is computed in floating point only."""
    if architecture.solver != "euler":
        raise ValueError(f"integers take Euler steps, the model {architecture.solver}'s")
    if architecture.encoding == "raw":
        raise ValueError("its decoder reads phases as such, which have no bound")


def quantized_coupling(
    architecture: Un0Architecture, tensors: Mapping[str, Tensor], fine_every: int
) -> DenseCoupling:
    """Of the model. Raises ValueError as `quantize_dense`."""
    scale = architecture.driver_scale
    return quantize_dense(
        between_others(tensors["dynamics.K"].float(), architecture.coupling_scale),
        tensors["dynamics.omega"].float()[0],
        tensors["dynamics.K_drive"].float() * scale,
        between_others(tensors["dynamics.K_cond"].float(), scale),
        tensors["dynamics.omega_cond"].float()[0],
        fine_every=fine_every,
    )


def convolutions_of(architecture: Un0Architecture, tensors: Mapping[str, Tensor]) -> list[FloatConvolution]:
    """The decoder's, in order."""
    names = [f"decoder.cascade.{b}.net.{p}" for b in range(architecture.blocks) for p in (1, 3)]
    return [
        (tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float())
        for name in (*names, "decoder.to_output")
    ]


def start_phases(seeds: Sequence[int], n: int) -> Tensor:
    """Start phases from the images' seeds: int32 `[batch, n]` in [-32768, 32768), the float form's."""
    return random_phases(np.array(seeds, dtype=np.uint64), n + -n % 4)[:, :n] - TURN // 2


def features_of(phases: Tensor, architecture: Un0Architecture) -> Tensor:
    """int16 decoder features `[batch, channels, 4, 4]` from phases `[batch, n]`."""
    if architecture.relativization == "mean_relative":
        n = phases.shape[1]
        mean = (phases.sum(1, keepdim=True, dtype=torch.int64) + n // 2).div(n, rounding_mode="floor")
        phases = (phases - mean).to(torch.int32)
    elif architecture.relativization == "ref_oscillator":
        phases = phases - phases[:, :1]
    sin, cos = fine_sin_cos(phases)
    features = torch.cat([sin, cos], dim=1) if architecture.encoding == "sin_cos" else sin
    return features.reshape(len(phases), -1, STEM, STEM)


def choose_integers(
    architecture: Un0Architecture,
    tensors: Mapping[str, Tensor],
    float_images: Callable[[Sequence[int], Sequence[int]], np.ndarray],
) -> Un0Integers:
    """The cheapest integers that draw as the floats do: first without the coupling's fine part, then with it made anew twice in a
    trajectory, then in every step.

    Args:
        float_images: uint8 images of classes and seeds, in the default number of steps.

    Raises:
        ValueError: none does; the message says what is missing.
    """
    refuse_unknown(architecture)
    classes = [i * architecture.classes // CHECKED_IMAGES for i in range(CHECKED_IMAGES)]
    seeds = [0x5EED0000 + i for i in range(CHECKED_IMAGES)]
    steps = architecture.steps
    expected = float_images(classes, seeds)
    convolutions = convolutions_of(architecture, tensors)
    phases = _dynamics(quantized_coupling(architecture, tensors, 1))(
        start_phases(seeds[::4][:CALIBRATION_IMAGES], architecture.oscillators + architecture.drivers),
        torch.tensor(classes[::4][:CALIBRATION_IMAGES]),
        steps,
        architecture.horizon,
    )
    ranges = calibrated_ranges(convolutions, features_of(phases, architecture))
    best = 0.0
    for fine_every in dict.fromkeys((0, (steps + 1) // 2, 1)):
        tried = Un0Integers(fine_every, ranges, 0.0, 0, CHECKED_IMAGES)
        found = Un0IntegerForm(architecture, tensors, tried).draw(classes, seeds, steps)
        difference = np.abs(found.astype(np.int16) - expected)
        near = float((difference <= NEAR_LEVELS).mean())
        log.info("integers, fine part every %d steps: %.3f %% of values near", fine_every, 100 * near)
        if near >= NEAR_SHARE:
            return Un0Integers(fine_every, ranges, near, int(difference.max()), CHECKED_IMAGES)
        best = max(best, near)
    raise ValueError(
        f"{100 * best:.2f} % of pixel values are within {NEAR_LEVELS} levels of the float form's, "
        f"{100 * NEAR_SHARE:g} % are asked for"
    )
