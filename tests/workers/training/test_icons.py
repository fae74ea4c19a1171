"""Training of the oscillator generator: it learns, goes on where it stopped, and exports what it trained."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from millijoule.jobs.recipe import load_recipe
from millijoule.workers.errors import InputError
from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.scenes.renderer import icon_masks
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training.icons import IconTrainer, IconTrainingConfig, overlap, true_covers
from millijoule.workers.training.loop import run_training

TINY = OscillatorConfig(nouns=6, code=16, hidden=24, channels=8, rank=4, width=24, mix=32)


def config(steps, **settings):
    model = OscillatorConfig(**{**vars(TINY), **settings.pop("model", {})})
    return IconTrainingConfig(steps=steps, half=24, whole=8, warm_up=5, model=model, **settings)


def weights_of(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_true_covers_are_the_font_s():
    covers = true_covers(3)
    masks = icon_masks(3)
    for whole, pixels in enumerate((32, 64)):
        margin = (masks.shape[-1] - pixels) // 2
        side = pixels // 8
        cells = covers[whole].view(3, 3, side, side, 8, 8).transpose(3, 4).reshape(3, 3, pixels, pixels)
        assert np.array_equal(cells.numpy(), masks[:, whole, :, margin:-margin, margin:-margin])


@pytest.mark.parametrize("coupling", ["none", "trained", "mlp"])
def test_shapes_are_learned(coupling):
    rates = {"matrix_rate": 0.05, "learning_rate": 0.01}
    trainer = IconTrainer(config(150, seed=1, model={"coupling": coupling}, **rates))
    before = overlap(trainer.exported_network(), trainer.covers).mean()
    while trainer.step < 150:
        trainer.train_step()
    after = overlap(trainer.exported_network(), trainer.covers).mean()
    assert before < 0.3
    assert after > 0.7


def test_a_frozen_coupling_stays_as_it_was_drawn():
    trainer = IconTrainer(config(3, model={"coupling": "frozen"}))
    before = weights_of(trainer)
    for _ in range(3):
        trainer.train_step()
    after = weights_of(trainer)
    assert torch.equal(before["local"], after["local"])
    assert not torch.equal(before["drive.weight"], after["drive.weight"])


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    whole = IconTrainer(config(8))
    run_training(whole, tmp_path / "whole")
    stopped = IconTrainer(config(8))
    run_training(stopped, tmp_path / "parts", minutes=0)
    assert stopped.step < 8
    resumed = IconTrainer(config(8))
    run_training(resumed, tmp_path / "parts", resume=True)
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name


def test_a_gradient_that_is_not_finite_is_left_out():
    trainer = IconTrainer(config(4))
    trainer.train_step()
    before = weights_of(trainer)
    with torch.no_grad():
        trainer.model.share.bias[0] = float("nan")
    assert float(trainer.train_step()["skipped"]) == 1
    after = weights_of(trainer)
    for name in ("drive.weight", "code.weight", "near.weight"):
        assert torch.equal(before[name], after[name]), name


def test_what_is_exported_draws_and_goes_on(tmp_path):
    trainer = IconTrainer(config(20))
    for _ in range(20):
        trainer.train_step()
    path = trainer.export(tmp_path, "tiny")
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["steps"] == "20"
        assert json.loads(opened.metadata()["config"])["nouns"] == 6
    drawn = OscillatorGenerator.load(path).generate([ImageRequest("a", 0, "a red anchor", seed=1)])
    assert drawn.images.shape == (1, 64, 64, 3)
    assert (tmp_path / "samples.png").stat().st_size > 1000
    again = IconTrainer(config(20))
    again.start_from(tmp_path / "float.safetensors")
    for name, value in trainer.exported_network().state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    with pytest.raises(InputError, match="other sizes"):
        IconTrainer(config(20, model={"width": 28})).start_from(tmp_path / "float.safetensors")


def test_what_is_exported_before_anything_is_rounded_is_what_was_trained():
    trainer = IconTrainer(config(300, seed=1, matrix_rate=0.05, learning_rate=0.01))
    while trainer.step < 150:  # rounding begins at 180
        trainer.train_step()
    network = trainer.exported_network()
    noun = torch.arange(6)
    with torch.no_grad():
        plain, rounded = (network(noun, noun % 3, False, rounded=r).sigmoid() for r in (False, True))
    assert float(network.rounding["near"].most) > 1.5  # what it began with would cut this off
    assert (plain - rounded).abs().mean() < 0.05
    assert overlap(network, trainer.covers).mean() > 0.6


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"half": 0}, "half"), ({"model": {"steps": 2}}, "steps"), ({"model": {"nouns": 1500}}, "nouns")],
)
def test_settings_that_nothing_can_run_are_refused_by_name(settings, name, tmp_path):
    recipe = tmp_path / "own.toml"
    model = "".join(f"{k} = {v}\n" for k, v in settings.pop("model", {}).items())
    recipe.write_text(
        'kind = "icons"\n[training]\n'
        + "".join(f"{k} = {v}\n" for k, v in settings.items())
        + "[training.model]\n"
        + model
    )
    with pytest.raises(InputError, match=name):
        load_recipe(str(recipe), {})
