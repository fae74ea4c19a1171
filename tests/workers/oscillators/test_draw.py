"""Images: only inked cells are drawn, and no pixel changes by that, nor by the batch."""

import numpy as np
import pytest
import torch
from support.tiny_oscillators import NOUNS

from millijoule.workers.oscillators.config import SIDES
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.operations import BLENDING, GROUND, operations
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene, scene_tokens


def scenes(count, nouns=NOUNS):
    rng = np.random.default_rng(5)
    return [complete(sample_scene(FAMILIES[i % 6], rng, nouns=nouns), i) for i in range(count)]


@pytest.fixture(scope="module")
def tokens():
    return scene_tokens(scenes(60))


SEEDS = np.arange(60, dtype=np.uint64)


def test_leaving_out_cells_without_ink_changes_no_pixel(painter, tokens):
    drawn = Drawing(painter).draw(tokens, SEEDS)
    assert np.array_equal(drawn, Drawing(painter).draw(tokens, SEEDS, dense=True))
    shares = [painter.ink.counts(bool(whole)).float().mean() / side**2 for whole, side in enumerate(SIDES)]
    assert all(0.02 < share < 0.98 for share in shares), shares


def test_an_image_does_not_depend_on_its_batch(painter, tokens):
    together = Drawing(painter).draw(tokens, SEEDS)
    order = np.random.default_rng(0).permutation(60)
    assert np.array_equal(Drawing(painter).draw(tokens[order], SEEDS[order]), together[order])
    for i in (0, 7, 59):
        assert np.array_equal(Drawing(painter).draw(tokens[i : i + 1], SEEDS[i : i + 1])[0], together[i])


def test_seeds_vary_images(painter, tokens):
    assert not np.array_equal(
        Drawing(painter).draw(tokens[:1], SEEDS[:1]), Drawing(painter).draw(tokens[:1], SEEDS[1:2])
    )


def test_operations_are_those_of_the_layers_for_the_cells_drawn(painter, tokens):
    found = operations(painter.network.config, painter.ink, tokens)
    config, network = painter.network.config, painter.network
    for row, tokens_of_image in enumerate(tokens[:12]):
        icons = tokens_of_image[:-1].reshape(-1, 4)
        icons = icons[icons[:, 0] > 0]
        once = {(noun, size, window == 1) for noun, _, size, window in icons.tolist()}
        decoder = 0
        for noun, size, whole in once:
            cells = int(painter.ink.counts(whole)[noun - 1, size - 1])
            decoder += 16 * 2 * 9 * 2 * config.channels * config.width
            decoder += 16 * 2 * 4 * config.width**2 if whole else 0
            decoder += cells * 2 * (9 * config.width**2 + config.width * config.mix + 64 * config.mix)
        assert found["decoder"][row] == decoder
        text = 2 * config.hidden * (config.code + 3 * 16 * config.channels)
        assert found["text"][row] == len(once) * text
        pixels = sum((SIDES[window == 1] * 8) ** 2 for *_, window in icons.tolist())
        assert found["canvas"][row] == BLENDING * pixels + GROUND * 64 * 64
    assert (found["dynamics"] > 0).all()
    dense = operations(painter.network.config, painter.ink, tokens, dense=True)
    assert (dense["decoder"] > found["decoder"]).any()
    assert network.config.steps == 10
    assert torch.equal(
        operations(painter.network.config, painter.ink, tokens, steps=20)["dynamics"], 2 * found["dynamics"]
    )
