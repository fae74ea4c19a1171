"""Whether a GPU's own kernels draw a model's images: only after they drew some as PyTorch's operations do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from millijoule.kernels.gpu.trial import tried
from millijoule.kernels.image import ImageWeights
from millijoule.kernels.native_library import is_reference_forced
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, ICON_TOKENS, NUM_TOKENS, SIZES, WINDOWS

if TYPE_CHECKING:
    from millijoule.kernels.gpu.image import ImageKernel

log = logging.getLogger(__name__)

#: Images that are drawn both ways.
TRIAL_IMAGES = 24


def gpu_kernel(
    weights: ImageWeights, device: str, plain: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> ImageKernel | None:
    """The kernels for a model on the GPU `device`. None: PyTorch's operations draw, to the same pixels; the log says why.

    Args:
        plain: draws tokens and seeds by PyTorch's operations.
    """
    if is_reference_forced():
        log.info("image kernel: PyTorch's operations, as MILLIJOULE_KERNEL says")
        return None

    def build() -> ImageKernel | None:
        from millijoule.kernels.gpu.image import ImageKernel, misfit

        if why := misfit(weights):
            log.info(
                "image kernel: PyTorch's operations, as the GPU's kernels do not take this model: %s", why
            )
            return None
        return ImageKernel(weights, device)

    def draws_alike(kernel: ImageKernel) -> bool:
        tokens, seeds = trial_scenes(len(weights.codes))
        return np.array_equal(kernel.draw(tokens, seeds), plain(tokens, seeds))

    kernel = tried("image kernel", "PyTorch's operations", build, draws_alike)
    if kernel is not None:
        log.info("image kernel: the GPU's, in one CUDA graph")
    return kernel


def trial_scenes(nouns: int) -> tuple[np.ndarray, np.ndarray]:
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
