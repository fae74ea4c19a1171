"""Training: a run learns something, resuming changes nothing, and what is exported draws what was trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.generators.oscillator import OscillatorGenerator, save_weights
from millijoule.workers.generators.oscillator_model import (
    FloatCoupling,
    OscillatorConfig,
    OscillatorModel,
)
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import complete, scene_tokens
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training.loop import run_training, save_checkpoint
from millijoule.workers.training.oscillator import (
    OscillatorTrainer,
    OscillatorTrainingConfig,
)
from millijoule.workers.training.sample_sheet import write_sample_sheet

SMALL_MODEL = OscillatorConfig(
    channels=4, driven=4, read=4, noise_channels=4, rank=2, hidden=32, widths=(16, 12, 8), mix=16
)
SMALL = OscillatorTrainingConfig(steps=40, scenes=4, samples=3, renders=4, warm_up=4, model=SMALL_MODEL)


@pytest.mark.long
@pytest.mark.parametrize("loss", ["energy", "drifting"])
def test_a_short_run_comes_closer_to_the_data(loss):
    trainer = OscillatorTrainer(replace(SMALL, steps=60, scenes=2, learning_rate=8e-3, loss=loss))
    rows = [trainer.train_step() for _ in range(60)]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    energy = [row.get("energy", row["loss"]) for row in rows]
    assert np.mean(energy[-10:]) < 0.8 * np.mean(energy[:10])


@pytest.mark.parametrize("coupling", ["trained", "frozen", "none", "mlp"])
def test_controls_train_what_they_should(coupling):
    trainer = OscillatorTrainer(replace(SMALL, steps=3, model=replace(SMALL_MODEL, coupling=coupling)))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.train_step()
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    coupled = {k for k in before if k.startswith("coupling.")}
    assert bool(coupled) == (coupling in ("trained", "frozen"))
    assert coupled & moved == (coupled if coupling == "trained" else set())
    assert any(k.startswith("mlp.") for k in moved) == (coupling == "mlp")
    assert any(k.startswith("decoder.") for k in moved)


@pytest.mark.parametrize(("coupling", "told"), [("trained", True), ("none", False)])
def test_what_is_not_driven_hears_of_the_prompt_by_coupling_alone(coupling, told):
    model = OscillatorModel(replace(SMALL_MODEL, noise_channels=2, driven=2, read=2, coupling=coupling))
    prompts = [scene_tokens([complete(parse_prompt(p)[0], 0)]) for p in ("a red cat", "a blue star")]
    phases = torch.zeros(1, model.config.oscillators)
    with torch.no_grad():
        images = [model(torch.from_numpy(tokens), phases) for tokens in prompts]
    assert torch.equal(*images) != told


def test_channels_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="5 driven, 4 read, of 4"):
        OscillatorModel(replace(SMALL_MODEL, driven=5))


def test_exported_weights_keep_a_share_of_the_coupling():
    trainer = OscillatorTrainer(replace(SMALL, coupling_share=0.25))
    exported, averaged = (m.coupling for m in (trainer.exported_model(), trainer.average))
    sources = torch.randn(2, SMALL_MODEL.oscillators)
    with torch.no_grad():
        weak, full = (c(sources, c.weights(), None) for c in (exported, averaged))
    assert full.abs().max() > 0.01
    torch.testing.assert_close(weak, 0.25 * full)


def test_a_coupling_that_starts_at_nothing_is_found_by_training():
    trainer = OscillatorTrainer(replace(SMALL, coupling_start=0.0))
    for weights in (trainer.model.coupling.local, trainer.model.coupling.spread):
        assert not weights.any()
    for _ in range(3):
        trainer.train_step()
    for weights in (trainer.model.coupling.local, trainer.model.coupling.spread):
        assert weights.any()


def test_the_mlp_control_has_as_many_parameters_as_the_coupling():
    config = OscillatorConfig()
    coupling = sum(p.numel() for p in FloatCoupling(config).parameters())
    mlp = sum(p.numel() for p in OscillatorModel(replace(config, coupling="mlp")).mlp.parameters())
    assert abs(mlp / coupling - 1) < 0.02


@pytest.mark.long
def test_resuming_gives_the_bits_of_an_unbroken_run(tmp_path):
    config = replace(SMALL, steps=6)
    whole, broken, resumed = (OscillatorTrainer(config) for _ in range(3))
    run_training(whole, tmp_path / "whole")
    for _ in range(3):
        broken.train_step()
    (tmp_path / "broken").mkdir()
    save_checkpoint(broken, tmp_path / "broken")
    run_training(resumed, tmp_path / "broken", resume=True)
    for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    save_checkpoint(OscillatorTrainer(SMALL), tmp_path)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        run_training(OscillatorTrainer(replace(SMALL, seed=1)), tmp_path, resume=True)


def requests(count: int) -> list[ImageRequest]:
    return [ImageRequest(str(i), 0, "a red cat left of a blue star", seed=i) for i in range(count)]


def test_the_integer_form_draws_what_the_float_form_draws(tmp_path):
    torch.manual_seed(0)
    model = OscillatorModel(replace(SMALL_MODEL, channels=8, driven=8, read=8, rank=4)).eval()
    with torch.no_grad():
        model.decoder.output.weight.mul_(20)  # a fresh decoder draws gray
    save_weights(model, tmp_path / "m.safetensors", "small")
    save_weights(model, tmp_path / "f.safetensors", "small-float", integer=False)
    integer, exact = (
        load_generator(str(tmp_path / name)).generate(requests(8)).images.astype(float)
        for name in ("m.safetensors", "f.safetensors")
    )
    assert exact.std() > 5
    assert 10 * np.log10(255**2 / np.mean((integer - exact) ** 2)) > 35
    write_sample_sheet(OscillatorGenerator.load(tmp_path / "m.safetensors"), tmp_path / "sheet.png", count=4)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_run_can_start_from_finished_weights(tmp_path):
    trainer = OscillatorTrainer(SMALL)
    save_weights(trainer.average, tmp_path / "f.safetensors", "x", integer=False)
    other = OscillatorTrainer(replace(SMALL, seed=5))
    other.start_from(tmp_path / "f.safetensors")
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    larger = OscillatorTrainer(replace(SMALL, model=replace(SMALL_MODEL, rank=3)))
    with pytest.raises(InputError, match="this recipe's sizes"):
        larger.start_from(tmp_path / "f.safetensors")
