"""Training: the loss is what it says, a run learns something, and resuming changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.generator import load_generator
from millijoule.workers.oscillator import save_weights
from millijoule.workers.oscillator_model import OscillatorConfig, OscillatorModel
from millijoule.workers.scenes import NUM_TOKENS, VOCABULARY, parse_prompt, scene_tokens
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training import Trainer, TrainingConfig, energy_distance, train, write_sample_sheet

SMALL = TrainingConfig(
    steps=40,
    scenes=4,
    samples=3,
    renders=4,
    warm_up=4,
    model=OscillatorConfig(
        vocabulary=len(VOCABULARY), tokens=NUM_TOKENS, channels=2, hidden=32, widths=(16, 12, 8)
    ),
)


def test_the_loss_is_least_where_the_distributions_agree():
    g = torch.Generator().manual_seed(0)
    true = torch.randn(2, 64, 3, 32, 32, generator=g) * 0.3
    same = torch.randn(2, 64, 3, 32, 32, generator=g) * 0.3
    shifted = same + 0.3
    collapsed = torch.zeros(2, 64, 3, 32, 32)
    best = energy_distance(same, true)
    assert best < energy_distance(shifted, true)
    assert best < energy_distance(collapsed, true)  # the mean image is not a sample


def test_a_short_run_lowers_the_loss():
    trainer = Trainer(replace(SMALL, steps=120, learning_rate=4e-3))
    losses = [trainer.train_step() for _ in range(120)]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:20])


def test_resuming_gives_the_bits_of_an_unbroken_run(tmp_path):
    whole = train(replace(SMALL, steps=6), tmp_path / "whole")
    broken = Trainer(replace(SMALL, steps=6))
    for _ in range(3):
        broken.train_step()
    (tmp_path / "broken").mkdir()
    broken.save(tmp_path / "broken")
    resumed = train(replace(SMALL, steps=6), tmp_path / "broken", resume=True)
    for a, b in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    Trainer(SMALL).save(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        train(replace(SMALL, seed=1), tmp_path, resume=True)


def test_exported_weights_load_and_draw_what_the_float_model_draws(tmp_path):
    torch.manual_seed(0)
    model = OscillatorModel(SMALL.model).eval()
    save_weights(model, tmp_path / "m.safetensors", "small")
    generator = load_generator(str(tmp_path / "m.safetensors"))
    requests = [ImageRequest(str(i), 0, "a red cat left of a blue star", seed=i) for i in range(8)]
    images = generator.generate(requests).images
    from millijoule.kernels.phase import TURN, start_phases

    phases = start_phases(np.arange(8, dtype=np.uint64), SMALL.model.oscillators)
    tokens = torch.from_numpy(scene_tokens([parse_prompt(r.prompt)[0] for r in requests]))
    with torch.inference_mode():
        drawn = model(tokens, phases.float() * 2 * torch.pi / TURN)
    expected = ((drawn + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy()
    mse = np.mean((images.astype(float) - expected) ** 2)
    assert 10 * np.log10(255**2 / mse) > 40
    write_sample_sheet(tmp_path / "m.safetensors", tmp_path / "sheet.png", count=4)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
