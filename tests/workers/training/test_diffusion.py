"""The diffusion baseline: its three phases learn, resuming changes nothing, and every word of a caption has a token."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.scenes.prompts import write_caption
from millijoule.workers.scenes.scenes import sample_training_scenes
from millijoule.workers.training.diffusion import DiffusionTrainer
from millijoule.workers.training.diffusion_networks import (
    DiffusionConfig,
    build_tokenizer,
    caption_ids,
    draw_images,
)
from millijoule.workers.training.loop import run_training, save_checkpoint

pytest.importorskip("diffusers")

SMALL = DiffusionConfig(
    steps=8,
    text_steps=2,
    autoencoder_steps=3,
    text_batch=4,
    batch=4,
    autoencoder_batch=4,
    warm_up=2,
    decoder_width=8,
    decoder_blocks=(1, 1, 1),
    unet_widths=(16, 16),
    attention_levels=(False, True),
    head_width=8,
    text_width=16,
    text_layers=1,
    text_heads=2,
)


@pytest.fixture(scope="module", autouse=True)
def _few_patches():
    """Components of 128 images tell a denoiser's test as much as those of 2,048, which take seconds in every trainer."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("millijoule.workers.training.diffusion.PRINCIPAL_IMAGES", 128)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from its first to its last step."""
    trainer = DiffusionTrainer(SMALL)
    run_training(trainer, tmp_path_factory.mktemp("whole"))
    return trainer


@pytest.mark.long
def test_the_text_encoder_learns_to_read_captions():
    config = replace(SMALL, text_steps=100, text_batch=16, text_learning_rate=4e-3, text_width=64)
    trainer = DiffusionTrainer(config)
    losses = [row["loss"] for row in rows_of(trainer, config.text_steps)]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])  # nothing read would be 10
    ours, average = trainer.denoiser["text"].state_dict(), trainer.average["denoiser"]["text"].state_dict()
    assert [k for k in ours if not torch.equal(ours[k], average[k])] == []


@pytest.mark.long
def test_the_autoencoder_comes_closer_to_the_data():
    trainer = DiffusionTrainer(
        replace(
            SMALL,
            text_steps=0,
            steps=81,
            autoencoder_steps=80,
            decoder_width=16,
            autoencoder_learning_rate=4e-3,
        )
    )
    rows = rows_of(trainer, 79)
    for name in ("loss", "squared_error"):
        values = [row[name] for row in rows]
        assert np.mean(values[-20:]) < 0.8 * np.mean(values[:20]), name


@pytest.mark.long
def test_the_encoder_keeps_what_a_projection_of_patches_keeps(monkeypatch):
    """Latents, projected back by least squares, are the best linear code of their size: nothing of a patch got lost on
    the way through the convolutions."""
    monkeypatch.setattr("millijoule.workers.training.diffusion.PRINCIPAL_IMAGES", 1024)
    trainer = DiffusionTrainer(SMALL)
    images = draw_images(64, 0)
    with torch.no_grad():
        latents = trainer.autoencoder.encode(images).latents
    values = torch.nn.functional.pixel_unshuffle(images, 4).transpose(0, 1).flatten(1).double()
    codes = latents.transpose(0, 1).flatten(1).double()
    codes = torch.cat([codes, torch.ones(1, codes.shape[1])])
    back = torch.linalg.lstsq(codes.t(), values.t()).solution
    error = (codes.t() @ back - values.t()).square().mean().item()
    variances = torch.linalg.eigvalsh(torch.cov(values))
    best = variances[: -trainer.config.latent_channels].sum().item() / len(variances)
    assert best < 0.01 < variances[-1].item() / len(variances)
    assert error < 1.15 * best  # its components are those of other images
    assert latents.abs().flatten().kthvalue(int(0.995 * latents.numel())).values < 3
    scaled = latents * trainer.autoencoder.config.scaling_factor
    assert scaled.var((0, 2, 3)).mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.long
def test_the_denoiser_comes_closer_to_the_data():
    # 32 channels: with fewer, group normalisation leaves nothing of a flat image's colour
    config = replace(SMALL, unet_widths=(32, 32), batch=8, learning_rate=4e-3)
    config = replace(config, text_steps=0, autoencoder_steps=2, autoencoder_batch=2)
    trainer = DiffusionTrainer(replace(config, steps=62))
    losses = [row["loss"] for row in rows_of(trainer, 62)]
    assert np.mean(losses[-10:]) < 0.85 * np.mean(losses[2:12])


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 2, 4, 5, 7])  # in every phase and at their borders
def test_resuming_gives_the_bits_of_an_unbroken_run(tmp_path, whole, stop):
    broken, resumed = DiffusionTrainer(SMALL), DiffusionTrainer(SMALL)
    for _ in range(stop):
        broken.train_step()
    (tmp_path / "broken").mkdir()
    save_checkpoint(broken, tmp_path / "broken")
    run_training(resumed, tmp_path / "broken", resume=True)
    assert resumed.step == whole.step == SMALL.steps
    ours, theirs = _tensors(resumed.state()), _tensors(whole.state())
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


@pytest.mark.long
def test_a_run_can_start_from_a_finished_one(tmp_path):
    trainer = DiffusionTrainer(SMALL)
    for _ in range(4):
        trainer.train_step()
    trainer.export(tmp_path)
    exported = trainer.average["autoencoder"].half().float().state_dict()
    texts = trainer.average["denoiser"]["text"].half().float().state_dict()
    for text_steps in (2, 0):
        other = DiffusionTrainer(replace(SMALL, seed=5, text_steps=text_steps, autoencoder_steps=0))
        other.start_from(tmp_path / "model")
        for autoencoder in (other.autoencoder, other.average["autoencoder"]):
            assert all(torch.equal(v, exported[k]) for k, v in autoencoder.state_dict().items())
            assert autoencoder.config.scaling_factor == trainer.autoencoder.config.scaling_factor
        taken = [torch.equal(v, texts[k]) for k, v in other.denoiser["text"].state_dict().items()]
        assert all(taken) == (text_steps == 0)
        rows_of(other, 3)
    with pytest.raises(InputError, match="no autoencoder of this recipe's sizes"):
        DiffusionTrainer(replace(SMALL, decoder_width=16)).start_from(tmp_path / "model")
    with pytest.raises(InputError, match="do not fit"):
        DiffusionTrainer(replace(SMALL, text_steps=0, text_layers=2)).start_from(tmp_path / "model")


def test_every_word_of_a_caption_has_a_token_and_every_caption_fits():
    tokenizer = build_tokenizer(SMALL)
    scenes = [scene for _, scene in sample_training_scenes(np.random.default_rng(3), 3000)]
    rows = tokenizer([write_caption(scene) for scene in scenes]).input_ids
    assert not any(tokenizer.unk_token_id in ids for ids in rows)
    assert max(len(ids) for ids in rows) == SMALL.max_length
    end = tokenizer.eos_token_id
    padded = [[*ids, *[end] * (SMALL.max_length - len(ids))] for ids in rows]
    assert caption_ids(scenes, SMALL).tolist() == padded


def rows_of(trainer, steps):
    rows = [trainer.train_step() for _ in range(steps)]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    return rows


def _tensors(state, prefix=""):
    found = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, (dict, list)):
            found |= _tensors(value, f"{prefix}{key}.")
    return found
