"""On an NVIDIA GPU: the same bits as on a CPU where integers decide, the same training, a counter that counts.

Skipped where there is none. `make accelerator` runs them; they need no cluster. `make gpu-rehearsal` takes the CPU in the GPU's
place.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.accelerator import DEVICE, MISSING, REHEARSAL
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.kernels.oscillator import Drive, quantize_coupling, relax, relax_reference
from millijoule.kernels.phase import random_phases
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.renderer import SceneRenderer, draw_variation, render_scenes
from millijoule.workers.scenes.scenes import (
    FAMILIES,
    sample_scene,
    sample_training_scenes,
    scene_tokens,
)
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training.icons import IconTrainer, IconTrainingConfig
from millijoule.workers.training.loop import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(MISSING, reason="no CUDA device")

on_a_board = pytest.mark.skipif(REHEARSAL, reason="a rehearsal: there is no board to read")

SMALL = IconTrainingConfig(
    steps=60,
    half=24,
    whole=8,
    warm_up=5,
    matrix_rate=0.05,
    learning_rate=0.01,
    model=OscillatorConfig(nouns=6, code=16, hidden=24, channels=8, rank=4, width=24, mix=32),
)


def scenes(count):
    return [s for _, s in sample_training_scenes(np.random.default_rng(3), count)]


def requests(count):
    rng = np.random.default_rng(5)
    prompts = [write_prompt(sample_scene(FAMILIES[i % 6], rng, held_out=True), rng) for i in range(count)]
    return [ImageRequest(str(i), 0, prompt, seed=2**63 + i * 7919) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_pixels_are_a_cpus(batch):
    """Integers to the last pixel, with coupled oscillators as without."""
    asked = requests(batch)
    expected = load_generator("default").generate(asked).images
    assert np.array_equal(load_generator("default", device=DEVICE).generate(asked).images, expected)
    tokens = scene_tokens(scenes(batch))
    tokens[:, :-1:4] = tokens[:, :-1:4].clip(0, NOUNS)
    seeds = np.arange(batch, dtype=np.uint64)
    coupled = painter_of(tiny_oscillators("trained"))
    expected = Drawing(coupled).draw(tokens, seeds)
    assert np.array_equal(Drawing(coupled, DEVICE).draw(tokens, seeds), expected)


@pytest.mark.parametrize("coupling", ["trained", "none", "mlp"])
def test_icons_are_learned_as_on_a_cpu(coupling):
    """Most of the steps are replays of captured graphs: they lead where a CPU's do, but for roundings."""
    config = replace(SMALL, model=replace(SMALL.model, coupling=coupling))
    losses = {}
    for device in ("cpu", DEVICE):
        trainer = IconTrainer(config, device=device, data_processes=2 * (device != "cpu"))
        losses[device] = [float(trainer.train_step()["loss"]) for _ in range(60)]
    assert losses[DEVICE][0] == pytest.approx(losses["cpu"][0], rel=0.02)
    assert losses[DEVICE][-1] == pytest.approx(losses["cpu"][-1], rel=0.25)
    assert losses[DEVICE][-1] < 0.6 * losses[DEVICE][0]
    assert len(set(losses[DEVICE])) == 60


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_core_gives_the_same_bits_as_the_reference(batch):
    g = torch.Generator().manual_seed(batch)
    channels, rank, n = 32, 32, 64 * 32

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    coupling = quantize_coupling(
        normal(channels, 5 * channels) * 0.1, normal(n, rank) * 0.02, normal(n, rank) * 0.2
    )
    a, b = (torch.round(70_000 * normal(batch, n)).to(torch.int32) for _ in range(2))
    drive = Drive(a, b, torch.round(1000 * normal(batch, n)).to(torch.int32), 0.1)
    phases = random_phases(np.arange(batch, dtype=np.uint64), n)
    on_gpu = Drive(*(x.to(DEVICE) for x in (drive.a, drive.b, drive.omega)), drive.dt)
    found = relax(phases.to(DEVICE), coupling.to(DEVICE), on_gpu, 10)
    assert torch.equal(found.cpu(), relax_reference(phases, coupling, drive, 10))


def test_the_baseline_s_images_do_not_depend_on_their_batch():
    pytest.importorskip("diffusers")
    generator = load_generator("baseline", device=DEVICE)
    wanted = [replace(r, num_inference_steps=4) for r in requests(5)]
    images = generator.generate(wanted).images
    assert np.array_equal(generator.generate(wanted[2:4]).images, images[2:4])
    on_cpu = load_generator("baseline", device="cpu").generate(wanted).images
    generator.pipeline.to(torch.float32)  # what remains is the device's own arithmetic
    assert np.abs(generator.generate(wanted).images.astype(int) - on_cpu.astype(int)).mean() < 1


def test_renders_are_those_of_the_cpu():
    chosen = scenes(200)
    made = {"tokens": torch.from_numpy(scene_tokens(chosen)), **draw_variation(200, 3, 7)}
    found = SceneRenderer(DEVICE).render(**{name: x.to(DEVICE) for name, x in made.items()})
    assert np.array_equal(found.permute(0, 1, 3, 4, 2).cpu().numpy(), render_scenes(chosen, 3, 7))


def test_a_run_continues_on_the_other_kind_of_device(tmp_path):
    here = IconTrainer(SMALL, device=DEVICE)
    for _ in range(6):
        here.train_step()
    save_checkpoint(here, tmp_path)
    for device in ("cpu", DEVICE):
        resumed = IconTrainer(SMALL, device=device)
        load_checkpoint(resumed, tmp_path)
        for a, b in zip(here.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a.cpu(), b.cpu())
        assert np.isfinite([float(resumed.train_step()["loss"]) for _ in range(5)]).all()
        assert resumed.step == 11


def test_the_baseline_trains_as_on_a_cpu():
    pytest.importorskip("diffusers")
    from millijoule.workers.training.diffusion import DiffusionTrainer
    from millijoule.workers.training.diffusion_networks import DiffusionConfig

    config = DiffusionConfig(
        steps=14, text_steps=3, autoencoder_steps=3, text_batch=16, batch=16, autoencoder_batch=4, warm_up=2,
        decoder_width=16, unet_widths=(32, 64), attention_levels=(False, True), head_width=16, text_width=32,
    )  # fmt: skip
    here, there = DiffusionTrainer(config), DiffusionTrainer(config, device=DEVICE, data_processes=2)
    rows = [(float(here.train_step()["loss"]), float(there.train_step()["loss"])) for _ in range(14)]
    ours, theirs = np.array(rows).T
    deterministic = [0, 1, 2, 3, 4, 5]  # the denoiser's noise is drawn on the device
    np.testing.assert_allclose(ours[deterministic], theirs[deterministic], rtol=0.05)
    np.testing.assert_allclose(ours[6:].mean(), theirs[6:].mean(), rtol=0.1)
    assert len(set(theirs)) == 14


@on_a_board
def test_the_board_s_counter_counts(tmp_path):
    index = torch.cuda.current_device()
    meter = open_meter([str(index)], book_directory=tmp_path)
    assert meter.domains
    uuid = str(torch.cuda.get_device_properties(index).uuid)
    assert any(uuid in domain for domain in meter.domains)
    before = meter.read()
    x = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    began = time.monotonic()
    while time.monotonic() - began < 2:
        for _ in range(20):
            x = (x @ x).clamp_(-1, 1)
        torch.cuda.synchronize()
    after = meter.read()
    (domain,) = (d for d in meter.domains if uuid in d)
    watts = (after.energy_mj[domain] - before.energy_mj[domain]) / 1e3 / (time.monotonic() - began)
    assert 40 < watts < 1200
    assert meter.watch()
    meter.close()
