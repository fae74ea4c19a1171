"""Composition against the renderer of true images: with true shares, the same pixels."""

import numpy as np
import pytest
import torch

from millijoule.workers.oscillators.canvas import Icons, Variation, ground, lay, window_covers
from millijoule.workers.scenes.renderer import SceneRenderer, icon_masks
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    JITTER,
    PALETTE,
    SHADE,
    SIZES,
    sample_training_scenes,
    scene_tokens,
)

NOUNS = 80


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(3)
    return scene_tokens([completed for _, completed in sample_training_scenes(rng, 120)])


def levels(names):
    return torch.tensor([PALETTE[name] for name in names])


def test_with_true_shares_images_are_the_renderer_s(tokens):
    variation = Variation.of(np.arange(len(tokens), dtype=np.uint64))
    images = ground(torch.from_numpy(tokens[:, -1]), levels(BACKGROUNDS), variation)
    icons = Icons.of(torch.from_numpy(tokens))
    masks = torch.from_numpy(icon_masks(NOUNS))
    assert icons.whole.any()
    assert not icons.whole.all()
    for whole in (False, True):
        some = icons.chosen(icons.whole == whole)
        margin = (masks.shape[-1] - 32 * (1 + whole)) // 2
        covers = masks[:, int(whole), :, margin:-margin, margin:-margin].flatten(0, 1)
        lay(images, some, covers, some.noun * len(SIZES) + some.size, levels(COLOURS), variation)
    shade, jitter = variation.shade[:, None].int(), variation.shift[:, None].int()
    expected = SceneRenderer(nouns=NOUNS).render(torch.from_numpy(tokens), shade, jitter)[:, 0]
    assert torch.equal(images.to(torch.uint8), expected.permute(0, 2, 3, 1))


def test_what_seeds_vary_is_uniform_and_the_seed_s_own():
    variation = Variation.of(np.arange(30_000, dtype=np.uint64))
    for values, most in ((variation.shade, SHADE), (variation.shift, JITTER)):
        found, counts = values.unique(return_counts=True)
        assert found.tolist() == list(range(-most, most + 1))
        assert (counts / counts.sum() * len(found) - 1).abs().max() < 0.05
    alone = Variation.of(np.array([77], dtype=np.uint64))
    assert torch.equal(alone.shade[0], variation.shade[77])
    assert torch.equal(alone.shift[0], variation.shift[77])


def test_cells_stand_in_their_window_row_by_row():
    shares = torch.arange(2 * 64, dtype=torch.uint8).view(2, 64)
    (cover,) = window_covers(shares, torch.tensor([0, 0]), torch.tensor([1, 6]), 1, False)
    assert torch.equal(cover[:8, 8:16], shares[0].view(8, 8))
    assert torch.equal(cover[8:16, 16:24], shares[1].view(8, 8))
    assert cover.count_nonzero() == shares.count_nonzero()
