"""Drawing from a network as it was trained, beside its integer form."""

import numpy as np
import pytest
import torch
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.draw import Drawing, Painter
from millijoule.workers.oscillators.float_shapes import FloatShapes
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene, scene_tokens


def tokens_of_scenes():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(FAMILIES[i % len(FAMILIES)], rng, nouns=NOUNS) for i in range(24)]
    return scene_tokens([complete(s, i) for i, s in enumerate(scenes)])


@pytest.mark.parametrize("coupling", ["none", "trained"])
def test_images_are_nearly_those_of_the_integer_form(coupling):
    network = tiny_oscillators(coupling)
    tokens, seeds = tokens_of_scenes(), np.arange(24, dtype=np.uint64)
    floats = Drawing(Painter.of(FloatShapes(network))).draw(tokens, seeds).astype(int)
    integers = Drawing(painter_of(network)).draw(tokens, seeds).astype(int)
    assert integers.std() > 20
    assert np.abs(floats - integers).mean() < 3
    assert not np.array_equal(floats, integers)


def test_a_form_without_an_integer_form_draws_its_own_shares():
    network = tiny_oscillators("mlp")
    shapes = FloatShapes(network)
    noun, size = torch.tensor([0, 3]), torch.tensor([1, 1])
    icon, cell = torch.tensor([0, 1, 1]), torch.tensor([5, 0, 63])
    with torch.no_grad():
        waves = shapes.phases(noun, size + VARIANTS // 2)
        found = shapes.shares(waves, True, icon, cell)
        logits = network(noun, size, True, rounded=True).view(2, SIDES[1] ** 2, 64)
    assert torch.equal(found, torch.round(255 * torch.sigmoid(logits[icon, cell])).to(torch.uint8))
    with pytest.raises(ValueError, match="number of steps"):
        shapes.phases(noun, size, steps=3)


def test_without_its_coupling_a_network_is_the_uncoupled_one():
    coupled, plain = tiny_oscillators("trained"), tiny_oscillators("none")
    plain.load_state_dict({k: v for k, v in coupled.state_dict().items() if k in plain.state_dict()})
    noun = torch.arange(NOUNS)
    with torch.no_grad():
        before = coupled(noun, noun % 3, True)
        coupled.remove_coupling()
        assert not torch.allclose(before, plain(noun, noun % 3, True), atol=1e-3)
        assert torch.allclose(coupled(noun, noun % 3, True), plain(noun, noun % 3, True), atol=1e-4)
