"""Training of the oscillator generator on rendered scenes, on CPU or one GPU.

A step draws scenes, renders each many times, lets the model draw each many times, and compares the two sets
(`workers.losses`). The model trains with the integer core's rounding in place, and a moving average of it is what
is exported.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.losses import drifting_loss, energy_distance
from millijoule.workers.oscillator_model import OscillatorConfig, OscillatorModel, random_noise, start_phases
from millijoule.workers.scene_prompts import write_prompt
from millijoule.workers.scene_renderer import SceneRenderer
from millijoule.workers.scenes import FAMILIES, sample_scene, sample_training_scenes, scene_tokens
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training_loop import schedule, update_average

LOSSES = ("energy", "drifting")


@dataclass(frozen=True)
class OscillatorTrainingConfig:
    """One training run; with the same config, the same steps follow, bit for bit on one machine and thread count.

    `steps` also sets the learning-rate schedule: warm-up, then cosine to zero.
    """

    steps: int = 5000
    scenes: int = 64  # per step
    samples: int = 2  # generated images per scene
    renders: int = 3  # true images per scene
    loss: str = "energy"  # one of LOSSES
    ink_weight: float = 4.0  # of patches that show more than background, in the energy distance
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.0
    clip: float = 2.0
    ema: float = 0.998
    seed: int = 0
    coupling_share: float = 1.0  # of the coupling's strength that exported weights keep
    model: OscillatorConfig = field(default_factory=OscillatorConfig)


class OscillatorTrainer:
    """Model, its moving average, optimiser and step count."""

    def __init__(
        self, config: OscillatorTrainingConfig, *, device: str = "cpu", compiled: bool = False
    ) -> None:
        if config.loss not in LOSSES:
            raise ValueError(f"loss {config.loss!r}: one of {', '.join(LOSSES)}")
        torch.manual_seed(config.seed)
        self.config = config
        self.device = device
        self.model = OscillatorModel(config.model)
        self.average = OscillatorModel(config.model)
        self.average.load_state_dict(self.model.state_dict())
        self.model.to(device)
        self.average.to(device).eval()
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        if compiled:  # not the encoder: how many icons stand in which window changes from step to step
            mode = "reduce-overhead" if device.startswith("cuda") else "default"  # CUDA graphs
            self.model.waves = torch.compile(self.model.waves, mode=mode)  # type: ignore[method-assign]
            self.model.decoder.forward = torch.compile(self.model.decoder.forward, mode=mode)  # type: ignore[method-assign]
        self.renderer = SceneRenderer()
        self.step = 0

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a finished run, its float.safetensors.

        Raises:
            InputError: not such a file, or of a model with other sizes.
        """
        from millijoule.workers.oscillator import OscillatorGenerator

        other = OscillatorGenerator.load(path)
        if other.coupling is not None or other.config != self.config.model:
            raise InputError(f"{path}: not the float form of a model with this recipe's sizes")
        self.model.load_state_dict(other.model.state_dict())
        self.average.load_state_dict(other.model.state_dict())

    def train_step(self) -> dict[str, float]:
        config = self.config
        rng = np.random.default_rng((config.seed, self.step))
        scenes = [completed for _, completed in sample_training_scenes(rng, config.scenes)]
        renders = self.renderer.render(scenes, config.renders, int(rng.integers(2**62)))
        true = torch.from_numpy(renders).to(self.device).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        tokens = torch.from_numpy(scene_tokens(scenes)).repeat_interleave(config.samples, 0).to(self.device)
        phases = start_phases(
            random_noise(len(tokens), config.model, noise).to(self.device), tokens, config.model
        )
        offset = int(rng.integers(8)), int(rng.integers(8))
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(self.step, config.steps, config.warm_up)
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16):
            images = self.model(tokens, phases, quantized=True, operands=torch.bfloat16).float()
        images = images.unflatten(0, (config.scenes, config.samples))
        logged: dict[str, float] = {}
        if config.loss == "energy":
            loss = energy_distance(images, true, offset, ink_weight=config.ink_weight)
        else:
            loss, drift = drifting_loss(images, true, offset)
            logged["drift"] = drift.item()
            with torch.no_grad():
                logged["energy"] = energy_distance(images, true, offset).item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        update_average(self.average, self.model, config.ema, self.step)
        self.step += 1
        return {"loss": loss.item(), **logged, "gradient": norm.item()}

    def exported_model(self) -> OscillatorModel:
        """The averaged weights, with the share of the coupling that the config keeps."""
        model = deepcopy(self.average)
        if model.config.coupling in ("trained", "frozen"):
            with torch.no_grad():
                for weights in (model.coupling.local, model.coupling.spread):
                    weights.mul_(self.config.coupling_share)
        return model

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def write_sample_sheet(weights: Path, path: Path, count: int = 32) -> None:
    """Draw fixed prompts of the six families, in held-out combinations, with seeds 0, 1, 2 ... as one PNG. None are picked."""
    from PIL import Image

    from millijoule.workers.contact_sheet import draw_contact_sheet
    from millijoule.workers.oscillator import OscillatorGenerator

    rng = np.random.default_rng(0)
    scenes = [sample_scene(FAMILIES[i % len(FAMILIES)], rng, held_out=True) for i in range(count)]
    prompts = [write_prompt(scene, rng) for scene in scenes]
    requests = [ImageRequest(str(i), 0, prompt, seed=i) for i, prompt in enumerate(prompts)]
    images = OscillatorGenerator.load(weights).generate(requests).images
    path.write_bytes(draw_contact_sheet([Image.fromarray(image) for image in images], prompts))
