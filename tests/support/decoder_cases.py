"""Convolutional decoders as trained ones are, and how they run in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from millijoule.kernels.upsampling_decoder import ACTIVATION


def made_up_convolutions(channels, blocks, seed=0):
    """Weights and biases, the output's last."""
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(blocks):
        taken, channels = channels, max(channels // 2, 32)
        for inputs in (taken, channels):
            weights = torch.randn(channels, inputs, 3, 3, generator=random) * math.sqrt(2 / (9 * inputs))
            found.append((weights, torch.randn(channels, generator=random) * 0.1))
    weights = torch.randn(3, channels, 3, 3, generator=random) * 0.05
    return [*found, (weights, torch.randn(3, generator=random) * 0.1)]


def made_up_features(images, channels, seed=1):
    """Sines, float32 `[images, channels, 4, 4]`."""
    random = torch.Generator().manual_seed(seed)
    return torch.sin(torch.rand(images, channels, 4, 4, generator=random) * 2 * math.pi)


def in_steps(x):
    """As integers."""
    return torch.round(x * ACTIVATION).to(torch.int16)


def decoded_by_kernel(decoder, batches, **constants):
    """Images of batches of features, by one `DecoderKernel`; for `support.interpreted`. `constants`: tiles."""
    from millijoule.kernels.gpu import upsampling_decoder as kernels

    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(kernels, name, value)
        kernel = kernels.DecoderKernel(decoder, "cpu")
        return [kernel(batch) for batch in batches]
