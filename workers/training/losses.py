"""How far generated images are from true ones of the same scene: two losses on image patches, without pretrained features.

Both compare sets of samples, per scene and per patch position, and are zero in expectation only where the distributions
agree. The features are pixels at several scales; nothing here knows the verifier that judges the models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

#: (down-sampling, patch side) of the patch sets; side 0 is the whole image. Patches tile the image from an offset that
#: changes from step to step, and go on at the opposite edge, so that their number does not change.
PATCHES = ((1, 8), (1, 4), (2, 8), (4, 8), (4, 0))

#: Temperatures of the drifting field (Deng et al. 2026, arXiv 2602.04770, section 4).
TEMPERATURES = (0.02, 0.05, 0.2)

#: A patch shows something, and is not background alone, where a colour's mean render varies by more than this (of 2).
INK = 0.1


def energy_distance(
    images: Tensor, true: Tensor, offset: Tensor | None = None, *, ink_weight: float = 1.0
) -> Tensor:
    """Sum over patch sets of the mean energy distance 2 E|x - y| - E|x - x'|, in the unit of a pixel; without the constant
    term - E|y - y'|.

    A proper scoring rule (Szekely and Rizzo 2013), unbiased at any number of samples. The gradient of a norm has the
    same size however small the difference, so the many patches of plain background drown the few that show something;
    `ink_weight` counts the latter that many times. The weights depend on the true images alone, so the rule stays proper.

    Args:
        images: generated, `[scenes, samples, 3, size, size]`, differentiable, at least two samples.
        true: `[scenes, renders, 3, size, size]`.
        offset: where the patches begin, rows and columns, in pixels of each scale; int64 `[2]`, default 0.
    """
    total = images.new_zeros(())
    for scale, side in PATCHES:
        x, y = (patches(z, scale, side, offset) for z in (images, true))
        samples = x.shape[-2]
        between = distances(x, y).mean((-1, -2))  # [scenes, positions]
        within = distances(x, x).sum((-1, -2)) / (samples * (samples - 1))
        if ink_weight != 1:
            pixels = y.mean(2).unflatten(-1, (3, -1))
            shows_something = (pixels.amax(-1) - pixels.amin(-1)).amax(-1) > INK  # [scenes, positions]
            weight = 1 + (ink_weight - 1) * shows_something.float()
            weight = weight / weight.mean()
            between, within = weight * between, weight * within
        between, within = between.mean(), within.mean()
        total = total + (2 * between - within) / math.sqrt(x.shape[-1])
    return total


def drifting_loss(images: Tensor, true: Tensor, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The drifting loss in its official form (Deng et al. 2026, algorithm 1 and appendix), on the same patches.

    For every patch position, generated samples move along V = V+ - V- of a Laplace kernel, doubly normalised, at three
    temperatures; distances are in units of their mean, each temperature's drift is scaled to unit mean square.

    Returns:
        The loss, which is nearly constant by construction, and the mean square of the drift before that scaling, which
        is what tells progress.
    """
    total, drift_size = images.new_zeros(()), images.new_zeros(())
    for scale, side in PATCHES:
        x, y = (patches(z, scale, side, offset) for z in (images, true))
        samples, dimensions = x.shape[-2:]
        with torch.no_grad():
            targets = torch.cat([x, y], -2)
            between = distances(x, targets)
            own = torch.eye(samples, targets.shape[-2], dtype=torch.bool, device=x.device)
            others = own.numel() - samples
            unit = (between.masked_fill(own, 0).sum((-1, -2), keepdim=True) / others).clamp_min(1e-6)
            step = unit / math.sqrt(dimensions)
            scaled_x, scaled_targets = x / step, targets / step
            drift = torch.zeros_like(x)
            for temperature in TEMPERATURES:
                logits = (-between / unit / temperature).masked_fill(own, -1e4)
                affinity = (logits.softmax(-1) * logits.softmax(-2)).clamp_min(1e-6).sqrt()
                negative, positive = affinity[..., :samples], affinity[..., samples:]
                attract = positive * negative.sum(-1, keepdim=True)
                repel = negative * positive.sum(-1, keepdim=True)
                field = attract @ scaled_targets[..., samples:, :] - repel @ scaled_targets[..., :samples, :]
                size = field.square().mean((-1, -2), keepdim=True)
                drift += field / size.clamp_min(1e-12).sqrt()
                drift_size += size.mean() / (len(PATCHES) * len(TEMPERATURES))
            goal = scaled_x + drift
        total = total + F.mse_loss(x / step, goal)
    return total, drift_size


def patches(images: Tensor, scale: int, side: int, offset: Tensor | None) -> Tensor:
    """`[scenes, samples, 3, h, w]` -> `[scenes, positions, samples, dimensions]`; tiles of the image on a torus."""
    scenes, samples = images.shape[:2]
    flat = images.flatten(0, 1)
    if scale > 1:
        flat = F.avg_pool2d(flat, scale)
    size = flat.shape[-1]
    if not side or side >= size:
        return flat.reshape(scenes, 1, samples, -1)
    if offset is not None:
        pixels = torch.arange(size, device=flat.device)
        rows, columns = ((pixels + o) % size for o in offset)
        flat = flat[:, :, rows[:, None], columns]
    tiles = flat.reshape(scenes, samples, 3, size // side, side, size // side, side)
    return tiles.permute(0, 3, 5, 1, 2, 4, 6).reshape(scenes, (size // side) ** 2, samples, -1)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances `[..., samples_x, samples_y]`; smooth at zero, so that a sample's distance to itself has a gradient."""
    squares = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * x @ y.transpose(-1, -2)
    return torch.sqrt(squares.clamp_min(0) + 1e-6) - 1e-3
