"""Whether a model's images are drawn by the GPU's own kernels, and what those are told of the model."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from millijoule.workers.oscillators.ink import InkCells
from millijoule.workers.oscillators.integer_network import SHARES, IntegerNetwork, Layer
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    ICON_TOKENS,
    JITTER,
    NUM_TOKENS,
    SHADE,
    SIZES,
    WINDOWS,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from millijoule.kernels.image_triton import ImageKernel, ImageModel

log = logging.getLogger(__name__)

#: Images that are drawn both ways before the kernels are trusted.
TRIAL_IMAGES = 24


def image_model(network: IntegerNetwork, ink: InkCells, colours: Tensor, grounds: Tensor) -> ImageModel:
    """What a painter is, as `kernels.image_triton` takes it."""
    from millijoule.kernels.image_triton import ImageLayer, ImageModel

    def layer(of: Layer) -> ImageLayer:
        return ImageLayer(of.weights, of.bias, of.multiplier)

    return ImageModel(
        codes=network.codes,
        sizes=network.sizes,
        place=network.place,
        read_code=layer(network.read_code),
        drive=layer(network.drive),
        near=layer(network.near),
        enlarge=layer(network.enlarge),
        near_again=layer(network.near_again),
        mix=layer(network.mix),
        share=layer(network.share),
        inked=ink.inked,
        shares=SHARES,
        colours=colours,
        grounds=grounds,
        windows=torch.tensor(WINDOWS),
        shade=SHADE,
        jitter=JITTER,
        steps=network.config.steps,
    )


def seed_bits(seeds: np.ndarray) -> Tensor:
    """uint64 seeds as int64 of the same bits, which every device has."""
    return torch.from_numpy(seeds.astype(np.uint64).view(np.int64))


def open_image_kernel(
    network: IntegerNetwork,
    ink: InkCells,
    colours: Tensor,
    grounds: Tensor,
    device: str,
    plain: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> ImageKernel | None:
    """The kernels for a model on a GPU; None where PyTorch's operations draw, which the log gives the reason of.

    Args:
        plain: draws tokens and seeds by PyTorch's operations. A few images of it decide whether the kernels are trusted.
    """
    if not device.startswith("cuda"):
        return None
    if os.environ.get("MILLIJOULE_KERNEL") == "reference":
        log.info("image kernel: PyTorch's operations, as MILLIJOULE_KERNEL says")
        return None
    if network.coupling is not None:
        log.info("image kernel: PyTorch's operations; this model's oscillators are coupled")
        return None
    try:
        from millijoule.kernels.image_triton import ImageKernel

        model = image_model(network, ink, colours, grounds)
        if not model.fits():
            log.info("image kernel: PyTorch's operations; the kernels take no model of these sizes")
            return None
        kernel = ImageKernel(model, device)
        tokens, seeds = trial(len(network.codes))
        same = np.array_equal(
            kernel.draw(torch.from_numpy(tokens), seed_bits(seeds)).cpu().numpy(), plain(tokens, seeds)
        )
    except Exception as error:  # Triton needs a C compiler on the host; its own errors have no common class
        log.warning("image kernel: PyTorch's operations, as the kernels failed: %s", error)
        return None
    if not same:
        log.warning("image kernel: PyTorch's operations, as the kernels drew other pixels on this device")
        return None
    log.info("image kernel: Triton's, in one CUDA graph")
    return kernel


def trial(nouns: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and seeds of images with one icon in the whole image, or four in its quarters."""
    whole = WINDOWS.index((0, 0, 8))
    quarters = [WINDOWS.index((x, y, 4)) for y in (0, 4) for x in (0, 4)]
    tokens = np.zeros((TRIAL_IMAGES, NUM_TOKENS), np.int64)
    for i, row in enumerate(tokens):
        for k, window in enumerate([whole] if i % 2 else quarters):
            number = 5 * i + k
            icon = (number % nouns, number % len(COLOURS), number % len(SIZES), window)
            row[ICON_TOKENS * k : ICON_TOKENS * (k + 1)] = np.add(icon, 1)
        row[-1] = i % len(BACKGROUNDS)
    return tokens, np.arange(TRIAL_IMAGES, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
