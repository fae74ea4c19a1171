"""The losses: least where the distributions agree, and what they say they are."""

import numpy as np
import pytest
import torch

from millijoule.workers.training.losses import PATCHES, drifting_loss, energy_distance, patches


def noise(seed: int, samples: int = 48, size: int = 32) -> torch.Tensor:
    return torch.randn(2, samples, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_the_energy_distance_is_least_where_the_distributions_agree():
    true, best = noise(0), energy_distance(noise(1), noise(0))
    assert best < energy_distance(noise(1) + 0.3, true)
    assert best < energy_distance(torch.zeros_like(true), true)  # the mean image is not a sample
    assert best < energy_distance(noise(1) * 2, true)


def test_the_energy_distance_is_the_plain_formula():
    """Against explicit loops over pairs, on whole images of one scale."""
    x, y = noise(2, 3, 8)[:1], noise(3, 4, 8)[:1]
    total = 0.0
    for scale, side in PATCHES:
        a, b = (patches(z, scale, side, None)[0].double().numpy() for z in (x, y))
        at = [
            2 * np.mean([np.linalg.norm(i - j) for i in p for j in q])
            - np.mean([np.linalg.norm(p[i] - p[j]) for i in range(3) for j in range(3) if i != j])
            for p, q in zip(a, b, strict=True)
        ]
        total += np.mean(at) / np.sqrt(a.shape[-1])
    assert energy_distance(x, y).item() == pytest.approx(total, abs=2e-3)


def test_ink_weight_counts_patches_that_show_something():
    """A scene with ink in its upper left quarter: an error there weighs more than the same error on bare background."""
    true = torch.zeros(1, 3, 3, 64, 64)
    true[..., :32, :32] = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = {place: true[:, :2].clone() for place in ("ink", "bare")}
    images["ink"][..., :16, :16] += 0.5
    images["bare"][..., 40:56, 40:56] += 0.5
    plain, weighted = (
        {place: energy_distance(x, true, ink_weight=w).item() for place, x in images.items()} for w in (1, 4)
    )
    assert plain["ink"] == pytest.approx(plain["bare"], rel=0.2)
    assert weighted["ink"] > 2 * weighted["bare"] > 0
    assert energy_distance(true[:, :2], true, ink_weight=4).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("offset", [(0, 0), (3, 7), (8, 5)])
def test_patches_are_tiles_of_the_image_on_a_torus(offset):
    images = noise(4, 2, 32)
    cut = patches(images, 1, 8, torch.tensor(offset))
    assert cut.shape == (2, 16, 2, 192)
    rolled = images.roll((-offset[0], -offset[1]), (-2, -1))
    for row, column in ((0, 0), (1, 0), (2, 3), (3, 3)):
        tile = rolled[1, 0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(cut[1, 4 * row + column, 0], tile.reshape(-1))


def drift_direction(images: torch.Tensor, true: torch.Tensor) -> float:
    """Mean descent direction over mean absolute descent direction: -1 where all pixels want to be darker."""
    images = images.clone().requires_grad_()
    loss, size = drifting_loss(images, true)
    loss.backward()
    assert torch.isfinite(loss)
    assert size > 0
    return (-images.grad.mean() / images.grad.abs().mean()).item()


def test_the_drift_points_to_the_data_and_not_anywhere_at_the_data():
    true = noise(0)
    assert drift_direction(noise(1) + 0.5, true) < -0.5
    assert drift_direction(noise(1) - 0.5, true) > 0.5
    assert abs(drift_direction(noise(1), true)) < 0.2
