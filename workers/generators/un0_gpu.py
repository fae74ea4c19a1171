"""An Un-0 model in integers on a GPU, by the GPU's own kernels: only after they drew some images as a CPU does, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.dense_coupling import DenseCoupling, relax
from millijoule.kernels.gpu.trial import tried
from millijoule.kernels.native_library import is_reference_forced
from millijoule.kernels.upsampling_decoder import IntegerDecoder, decode, quantize_decoder
from millijoule.workers.generators.un0_checkpoint import Un0Architecture
from millijoule.workers.generators.un0_integers import (
    Un0Integers,
    convolutions_of,
    cpu_modules,
    features_of,
    quantized_coupling,
    refuse_unknown,
    start_phases,
)

log = logging.getLogger(__name__)

#: Images that are drawn both ways: one without a class, the others of classes from the first to the last.
TRIAL_IMAGES = 4


class Un0GpuForm:
    """Draws in integers on a GPU: the pixels of `Un0IntegerForm`. Build with `gpu_form`.

    Attributes:
        kernels: what computes, for records and logs.
    """

    def __init__(
        self,
        architecture: Un0Architecture,
        relax: Callable[[Tensor, Tensor, int, float], Tensor],
        decode: Callable[[Tensor], Tensor],
        device: str,
        kernels: str,
    ) -> None:
        """`relax`: start phases, classes (on the host), steps and horizon to last phases; `decode`: features to pixels; on the device."""
        self.architecture = architecture
        self.kernels = kernels
        self._relax, self._decode, self._device = relax, decode, device

    def draw(self, classes: Sequence[int], seeds: Sequence[int], steps: int) -> np.ndarray:
        """uint8 `[batch, size, size, 3]`; raises ValueError for steps that integers cannot take."""
        a = self.architecture
        start = start_phases(seeds, a.oscillators + a.drivers).to(self._device)
        phases = self._relax(start, torch.tensor(classes, dtype=torch.int64), steps, a.horizon)
        return self._decode(features_of(phases, a)).cpu().numpy()


def gpu_form(
    architecture: Un0Architecture, tensors: Mapping[str, Tensor], integers: Un0Integers, device: str
) -> Un0GpuForm | None:
    """The integers of a model on the GPU `device`. None: its kernels fail or differ, so floats draw; the log says why.

    `MILLIJOULE_KERNEL=reference` has PyTorch's operations compute the integers, on the GPU too.

    Raises:
        ValueError: the model cannot be held in integers; the message says why.
    """
    refuse_unknown(architecture)
    coupling = quantized_coupling(architecture, tensors, integers.fine_every)
    decoder = quantize_decoder(convolutions_of(architecture, tensors), integers.ranges)
    if is_reference_forced():
        log.info("Un-0: integers by PyTorch's operations, as MILLIJOULE_KERNEL says")
        return Un0GpuForm(
            architecture,
            _relax_by_pytorch(coupling, device),
            _decode_by_pytorch(decoder, device),
            device,
            "pytorch",
        )
    form = tried(
        "Un-0",
        "floating point",
        lambda: _by_kernels(architecture, coupling, decoder, device),
        lambda form: _draws_alike(form, coupling, decoder),
    )
    if form is not None:
        log.info("Un-0: integers by the GPU's kernels (%s)", form.kernels)
    return form


def _by_kernels(
    architecture: Un0Architecture, coupling: DenseCoupling, decoder: IntegerDecoder, device: str
) -> Un0GpuForm:
    from millijoule.kernels.gpu.dense_coupling import DenseKernel
    from millijoule.kernels.gpu.upsampling_decoder import DecoderKernel, misfit

    dynamics = DenseKernel(coupling, device)
    if why := misfit(decoder):
        log.info("Un-0: the decoder's integers by PyTorch's operations: %s", why)
        by_pytorch = _decode_by_pytorch(decoder, device)
        return Un0GpuForm(architecture, dynamics, by_pytorch, device, "triton, its decoder pytorch")
    return Un0GpuForm(architecture, dynamics, DecoderKernel(decoder, device), device, "triton")


def _draws_alike(form: Un0GpuForm, coupling: DenseCoupling, decoder: IntegerDecoder) -> bool:
    """Whether a few images are those of this host's CPU, in its usual form."""
    a = form.architecture
    others = TRIAL_IMAGES - 1
    classes = [-1, *(i * (a.classes - 1) // (others - 1) for i in range(others))]
    seeds = [0xC0FFEE0000000000 + 7919 * i for i in range(TRIAL_IMAGES)]
    dynamics, drawing = cpu_modules(coupling, decoder)
    with torch.inference_mode():
        start = start_phases(seeds, a.oscillators + a.drivers)
        phases = dynamics(start, torch.tensor(classes), a.steps, a.horizon)
        expected = drawing(features_of(phases, a)).numpy()
        return np.array_equal(form.draw(classes, seeds, a.steps), expected)


def _relax_by_pytorch(coupling: DenseCoupling, device: str) -> Callable[[Tensor, Tensor, int, float], Tensor]:
    there = coupling.to(device)
    return lambda phases, classes, steps, horizon: relax(phases, there, classes.to(device), steps, horizon)


def _decode_by_pytorch(decoder: IntegerDecoder, device: str) -> Callable[[Tensor], Tensor]:
    there = decoder.to(device)
    return lambda features: decode(features, there)
