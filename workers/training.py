"""Training of the oscillator generator: renders in, weights out.

Each step draws some scenes, many true renders and many generated images of each, and lowers the energy distance
between the two sets, per scene and per image patch. The energy distance 2 E|x - y| - E|x - x'| - E|y - y'| is a
proper scoring rule (Szekely and Rizzo 2013), unbiased at any number of samples, and needs no pretrained features.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.workers.errors import InputError
from millijoule.workers.oscillator_model import OscillatorConfig, OscillatorModel, start_phases
from millijoule.workers.scenes import (
    NUM_TOKENS,
    VOCABULARY,
    SceneRenderer,
    sample_scenes,
    scene_tokens,
    write_prompt,
)
from millijoule.workers.schemas import ImageRequest

#: (down-sampling, patch side, stride) of the patch sets the loss looks at; side 0 is the whole image.
PATCHES = ((1, 0, 0), (1, 8, 4), (1, 4, 4), (2, 8, 4), (4, 0, 0))

CHECKPOINT = "checkpoint.pt"


def default_model() -> OscillatorConfig:
    """The sizes of the shipped model."""
    return OscillatorConfig(vocabulary=len(VOCABULARY), tokens=NUM_TOKENS)


@dataclass(frozen=True)
class TrainingConfig:
    """One training run; with the same config, the same steps follow, bit for bit on one machine.

    `steps` also sets the learning-rate schedule: warm-up, then cosine to zero.
    """

    steps: int = 3400
    scenes: int = 20  # per step
    samples: int = 6  # generated images per scene
    renders: int = 8  # true images per scene
    learning_rate: float = 1.5e-3
    warm_up: int = 100
    weight_decay: float = 0.0
    clip: float = 2.0
    ema: float = 0.998
    seed: int = 0
    model: OscillatorConfig = field(default_factory=default_model)


class Trainer:
    """Model, its moving average, optimiser and step count; saves and resumes all of it."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.model = OscillatorModel(config.model)
        self.average = OscillatorModel(config.model)
        self.average.load_state_dict(self.model.state_dict())
        self.average.eval()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        self.renderer = SceneRenderer()
        self.step = 0

    def train_step(self) -> float:
        """One step; returns the loss. What a step sees depends on the seed and its number alone."""
        config, step = self.config, self.step
        rng = np.random.default_rng((config.seed, step))
        scenes = sample_scenes(rng, config.scenes)
        true = torch.from_numpy(self.renderer.render(scenes, config.renders, int(rng.integers(2**62))))
        true = true.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        tokens = torch.from_numpy(scene_tokens(scenes)).repeat_interleave(config.samples, 0)
        phases = start_phases(len(tokens), config.model.oscillators, noise)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            images = self.model(tokens, phases, torch.bfloat16).float()
        loss = energy_distance(images.unflatten(0, (config.scenes, config.samples)), true)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        decay = min(config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "config": json.dumps(asdict(self.config)),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write the checkpoint; an older one is replaced in one move."""
        temporary = folder / (CHECKPOINT + ".part")
        torch.save(self.state(), temporary)
        temporary.replace(folder / CHECKPOINT)

    def resume(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`.

        Raises:
            InputError: it was made with another config.
        """
        state = torch.load(folder / CHECKPOINT, weights_only=True)
        if json.loads(state["config"]) != json.loads(json.dumps(asdict(self.config))):
            raise InputError(
                f"{folder / CHECKPOINT}: made with other settings; give the same, or another --output"
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def schedule(step: int, config: TrainingConfig) -> float:
    """Share of the learning rate at `step`."""
    if step < config.warm_up:
        return (step + 1) / config.warm_up
    done = (step - config.warm_up) / max(1, config.steps - config.warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def energy_distance(images: Tensor, true: Tensor) -> Tensor:
    """Sum over patch sets of the mean energy distance between generated and true images of the same scene.

    Args:
        images: generated, `[scenes, samples, 3, size, size]`, differentiable.
        true: `[scenes, renders, 3, size, size]`.

    Returns:
        A scalar; the constant term E|y - y'| is left out.
    """
    total = images.new_zeros(())
    for scale, side, stride in PATCHES:
        x, y = (patches(z, scale, side, stride) for z in (images, true))
        samples = x.shape[-2]
        between = distances(x, y).mean()
        within = distances(x, x).sum() / (x.shape[0] * x.shape[1] * samples * (samples - 1))
        total = total + (2 * between - within) / math.sqrt(x.shape[-1])
    return total


def patches(images: Tensor, scale: int, side: int, stride: int) -> Tensor:
    """`[scenes, samples, 3, h, w]` -> `[scenes, positions, samples, dimensions]`."""
    scenes, samples = images.shape[:2]
    flat = images.flatten(0, 1)
    if scale > 1:
        flat = F.avg_pool2d(flat, scale)
    if not side:
        return flat.reshape(scenes, 1, samples, -1)
    cut = F.unfold(flat, side, stride=stride)  # [scenes * samples, dimensions, positions]
    return cut.unflatten(0, (scenes, samples)).permute(0, 3, 1, 2)


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances `[..., samples_x, samples_y]`; smooth at zero, so that a sample's distance to itself has a gradient."""
    squares = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * x @ y.transpose(-1, -2)
    return torch.sqrt(squares.clamp_min(0) + 1e-6) - 1e-3


def train(
    config: TrainingConfig,
    folder: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    report_every: int = 50,
) -> Trainer:
    """Train to the last step, or as far as `minutes` allow; checkpoints and sample sheets go to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config)
    if resume and (folder / CHECKPOINT).exists():
        trainer.resume(folder)
    began = saved = time.monotonic()
    first, losses = trainer.step, []
    while trainer.step < config.steps:
        losses.append(trainer.train_step())
        now = time.monotonic()
        if trainer.step % report_every == 0 or trainer.step == config.steps:
            print(
                f"step {trainer.step}/{config.steps} loss {np.mean(losses):.4f} "
                f"{(now - began) / (trainer.step - first):.2f} s/step",
                flush=True,
            )
            losses = []
        if now - saved > 300 or trainer.step == config.steps:
            trainer.save(folder)
            saved = now
        if minutes is not None and now - began > 60 * minutes:
            trainer.save(folder)
            break
    return trainer


def write_sample_sheet(weights: Path, path: Path, count: int = 32) -> None:
    """Draw fixed prompts with seeds 0, 1, 2 ... by the exported model, as one PNG. None are picked."""
    from PIL import Image

    from millijoule.workers.contact_sheet import draw_contact_sheet
    from millijoule.workers.oscillator import OscillatorGenerator

    rng = np.random.default_rng(0)
    prompts = [write_prompt(scene, rng) for scene in sample_scenes(rng, count)]
    requests = [ImageRequest(str(i), 0, prompt, seed=i) for i, prompt in enumerate(prompts)]
    images = OscillatorGenerator.load(weights).generate(requests).images
    path.write_bytes(draw_contact_sheet([Image.fromarray(image) for image in images], prompts))
