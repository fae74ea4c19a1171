"""Several drawings of one noun: what is scored as one drawing, and that networks learn to show one."""

import itertools

import numpy as np
import pytest
import torch

from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.scenes.drawings import several_drawings
from millijoule.workers.training.drawings import (
    DrawingsConfig,
    DrawingsTrainer,
    assigned,
    score,
)
from millijoule.workers.training.loop import run_training


def drawings():
    return torch.from_numpy(several_drawings()[1]).float() / 255


def tiny(steps, **settings):
    model = {
        "coupling": "trained",
        "code": 16,
        "hidden": 24,
        "channels": 8,
        "rank": 4,
        "width": 24,
        "mix": 32,
    }
    model.update(settings.pop("model", {}))
    return DrawingsConfig(
        steps=steps, nouns=4, samples=4, warm_up=5, model=OscillatorConfig(**model), **settings
    )


def test_every_noun_has_a_drawing_of_each_font():
    nouns, covers = several_drawings()
    assert covers.shape == (len(nouns), 4, 32, 32)
    assert covers.dtype == np.uint8
    assert {"bell", "umbrella", "light bulb"} < set(nouns)
    assert (covers.max((2, 3)) == 255).all()
    assert (covers.mean((2, 3)) > 10).all()
    same = [np.array_equal(a, b) for of_noun in covers for a, b in itertools.combinations(of_noun, 2)]
    assert not any(same)


def test_true_drawings_are_one_drawing_and_blends_are_none():
    true = drawings()
    found = score(true, true)
    assert found["one_drawing"] == 1
    assert found["overlap"] == pytest.approx(1)
    assert found["evenness"] == pytest.approx(1)
    assert score(true[:, :1].expand(-1, 8, -1, -1), true)["evenness"] == 0
    blends = (true[:, :2] + true[:, 2:]) / 2
    assert score(blends, true)["one_drawing"] == 0
    rough = (true + 0.3 * torch.randn(true.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert score(rough, true)["one_drawing"] > 0.95
    halves = torch.cat([true[:, :2, :16], true[:, 2:, 16:]], 2)  # the upper half of one, the lower of another
    assert score(halves, true)["one_drawing"] < 0.3


def test_samples_are_compared_with_the_drawings_they_are_nearest_to_each_as_often():
    true = drawings()[:3]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    samples = true.repeat(1, 2, 1, 1)[:, order]
    logits = 4 * samples - 2 + torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(assigned(logits, true), samples)
    alike = logits[:, :1].expand(
        -1, 8, -1, -1
    )  # all nearest to one drawing: the others are learned all the same
    found = assigned(alike, true)
    for k in range(4):
        assert (found == true[:, k : k + 1]).all((2, 3)).sum(1).tolist() == [2, 2, 2]


def test_the_assignment_has_the_least_cross_entropy():
    true = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    every = [float(loss(logits, true[:, list(order)])) for order in itertools.permutations(range(4))]
    assert float(loss(logits, assigned(logits, true))) == pytest.approx(min(every))
    assert min(every) < max(every)


@pytest.mark.parametrize("decoder", ["cell", "near"])
def test_networks_learn_and_noise_is_what_they_are_given(decoder):
    rates = {"learning_rate": 0.01, "matrix_rate": 0.05}
    trainer = DrawingsTrainer(tiny(60, decoder=decoder, noise="shared", **rates))
    losses = [float(trainer.train_step()["loss"]) for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    shared = trainer.model.noise(5, torch.Generator().manual_seed(0))
    assert torch.equal(shared[:, :1].expand_as(shared), shared)
    own = DrawingsTrainer(tiny(1)).model.noise(5, torch.Generator().manual_seed(0))
    assert not torch.equal(own[:, :1].expand_as(own), own)
    images = trainer.sample(3)
    assert not torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images, trainer.sample(3))


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    whole = DrawingsTrainer(tiny(6))
    run_training(whole, tmp_path / "whole")
    run_training(DrawingsTrainer(tiny(6)), tmp_path / "parts", minutes=0)
    resumed = DrawingsTrainer(tiny(6))
    run_training(resumed, tmp_path / "parts", resume=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
