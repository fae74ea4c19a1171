"""Training of the oscillator generator on rendered scenes, on CPU or one GPU.

A step draws scenes, renders each many times, lets the model draw each many times, and compares the two sets
(`workers.training.losses`). The model trains with the integer core's rounding in place, and a moving average of it is what
is exported. On a GPU a step is one CUDA graph, renders included, fed by processes that draw scenes ahead.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.errors import InputError
from millijoule.workers.generators.oscillator import OscillatorGenerator, save_weights
from millijoule.workers.generators.oscillator_model import (
    OscillatorConfig,
    OscillatorModel,
    noise_size,
    start_phases,
)
from millijoule.workers.scenes.renderer import draw_variation
from millijoule.workers.scenes.scenes import sample_training_scenes, scene_tokens
from millijoule.workers.training.graphed_step import GraphedStep
from millijoule.workers.training.loop import GeneratorTrainer, newest_share, schedule, update_average
from millijoule.workers.training.losses import drifting_loss, energy_distance
from millijoule.workers.training.optimizer import adamw, clip_and_step, load_optimizer, set_learning_rate
from millijoule.workers.training.sample_sheet import write_sample_sheet


@dataclass(frozen=True)
class OscillatorTrainingConfig:
    """One training run; with the same config, the same steps follow, on a CPU bit for bit on one machine and thread count.

    `steps` also sets the learning-rate schedule: warm-up, then cosine to zero.
    """

    steps: int = 5000
    scenes: int = 64  # per step
    samples: int = 2  # generated images per scene
    renders: int = 3  # true images per scene
    loss: Literal["energy", "drifting"] = "energy"
    ink_weight: float = 4.0  # of patches that show more than background, in the energy distance
    learning_rate: float = 2e-3
    warm_up: int = 100
    weight_decay: float = 0.0
    clip: float = 2.0
    ema: float = 0.998
    seed: int = 0
    coupling_start: float = 1.0  # factor on the coupling's random start; at 0 it comes in only where it helps
    coupling_share: float = 1.0  # of the coupling's strength that exported weights keep
    model: OscillatorConfig = field(default_factory=OscillatorConfig)


@dataclass(frozen=True)
class OscillatorData:
    """What a step of `config` needs; see `StepData`."""

    config: OscillatorTrainingConfig

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config = self.config
        rng = np.random.default_rng((config.seed, step))
        scenes = [completed for _, completed in sample_training_scenes(rng, config.scenes)]
        seed = int(rng.integers(2**62))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.rand(config.scenes * config.samples, noise_size(config.model), generator=generator)
        return {
            "tokens": torch.from_numpy(scene_tokens(scenes)),
            "noise": noise * (2 * math.pi),  # radians, uniform on the circle
            "offset": torch.from_numpy(rng.integers(8, size=2)),
            **draw_variation(config.scenes, config.renders, seed),
        }


class OscillatorTrainer(GeneratorTrainer):
    """Model, its moving average, optimiser and step count; a `loop.Trainer`."""

    def __init__(
        self,
        config: OscillatorTrainingConfig,
        *,
        device: str = "cpu",
        compiled: bool = False,
        data_processes: int = 0,
    ) -> None:
        super().__init__(config, OscillatorData(config), device, data_processes)
        self.config = config
        self.model = OscillatorModel(config.model)
        _scale_coupling(self.model, config.coupling_start)
        self.average = deepcopy(self.model).to(device).eval()
        self.model.to(device)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        settings = {"lr": config.learning_rate, "betas": (0.9, 0.95), "weight_decay": config.weight_decay}
        self.optimizer = adamw(learning, device, **settings)
        self.narrow = multiplies_bfloat16(device)
        self.compare = self._compare
        if compiled:
            # not the encoder: on a CPU, how many icons stand in which window changes from step to step
            self.model.waves = torch.compile(self.model.waves)  # type: ignore[method-assign]
            self.model.decoder.forward = torch.compile(self.model.decoder.forward)  # type: ignore[method-assign]
            if self.on_gpu:
                self.compare = torch.compile(self.compare)
                self.renderer.render = torch.compile(self.renderer.render)  # type: ignore[method-assign]
        self._run = GraphedStep(self._compute) if self.on_gpu else self._compute

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a finished run, its float.safetensors.

        Raises:
            InputError: not such a file, or of a model with other sizes.
        """
        other = OscillatorGenerator.load(path)
        if other.coupling is not None or other.config != self.config.model:
            raise InputError(f"{path}: not the float form of a model with this recipe's sizes")
        self.model.load_state_dict(other.model.state_dict())
        self.average.load_state_dict(other.model.state_dict())

    def train_step(self) -> dict[str, Tensor]:
        config = self.config
        share = schedule(self.step, config.steps, config.warm_up)
        set_learning_rate(self.optimizer, config.learning_rate * share)
        self.newest_share.fill_(newest_share(config.ema, self.step))
        logged = self._run(**self.data.get(self.step))
        self.step += 1
        return logged

    def _compute(
        self, tokens: Tensor, noise: Tensor, offset: Tensor, **variation: Tensor
    ) -> dict[str, Tensor]:
        """The step itself, on what `OscillatorData` made."""
        config = self.config
        true = self.true_images(tokens, **variation)
        phases = start_phases(noise, tokens.repeat_interleave(config.samples, 0), config.model)
        # without its cache of cast weights, which would outlive the capture of a graph
        kind = self.device.split(":")[0]
        rounded = torch.bfloat16 if self.narrow else torch.float32
        with torch.autocast(kind, torch.bfloat16, enabled=self.narrow, cache_enabled=False):
            images = self.model(tokens, phases, rounded=rounded, samples=config.samples).float()
        logged = self.compare(images.unflatten(0, (config.scenes, config.samples)), true, offset)
        self.optimizer.zero_grad(set_to_none=True)
        logged["loss"].backward()
        taken = clip_and_step(self.optimizer, self.model.parameters(), config.clip)
        update_average(self.average, self.model, self.newest_share)
        return {name: value.detach() for name, value in logged.items()} | taken

    def _compare(self, images: Tensor, true: Tensor, offset: Tensor) -> dict[str, Tensor]:
        config = self.config
        if config.loss == "energy":
            return {"loss": energy_distance(images, true, offset, ink_weight=config.ink_weight)}
        loss, drift = drifting_loss(images, true, offset)
        return {"loss": loss, "drift": drift, "energy": energy_distance(images.detach(), true, offset)}

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"], self.device)

    def export(self, folder: Path, name: str, sheet: str = "samples.png") -> Path:
        """Write the float form always, the integer form where the model has one, and a sheet of the form that is used."""
        config, model = self.config, self.exported_model()
        made = {"steps": str(self.step), "planned_steps": str(config.steps), "seed": str(config.seed)}
        weights = folder / "float.safetensors"
        save_weights(model, weights, f"{name}-float", made, integer=False)
        if config.model.coupling in ("trained", "frozen"):
            weights = folder / "model.safetensors"
            save_weights(model, weights, name, made)
        write_sample_sheet(OscillatorGenerator.load(weights), folder / sheet)
        return weights

    def exported_model(self) -> OscillatorModel:
        """The averaged weights, with the share of the coupling that the config keeps."""
        model = deepcopy(self.average).cpu()
        _scale_coupling(model, self.config.coupling_share)
        return model


@torch.no_grad()
def _scale_coupling(model: OscillatorModel, factor: float) -> None:
    """Multiply K, that is L and U of L + U V^T; nothing where there is none."""
    if model.config.coupling in ("trained", "frozen"):
        for weights in (model.coupling.local, model.coupling.spread):
            weights.mul_(factor)
