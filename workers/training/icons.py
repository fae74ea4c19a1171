"""Training of the oscillator generator: how much of each pixel an icon covers, as the font says.

A step draws icons, a noun at a size in a half window or in the whole image, and compares the network's shares with the true
ones by cross entropy. Colours, grounds, places and what a seed varies are laid around the shares by `oscillators.canvas`, and
need no training. In its last part the network trains with the integer form's rounding in place; a moving average is exported.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.generators.model_files import (
    read_own_header,
    read_settings,
    refusing_damage,
    write_model_file,
)
from millijoule.workers.oscillators.config import SIDES, OscillatorConfig
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.float_network import FloatNetwork
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.oscillators.model_file import save_model
from millijoule.workers.oscillators.quantize import quantize
from millijoule.workers.scenes.renderer import icon_masks
from millijoule.workers.scenes.scenes import CELL, SIZES
from millijoule.workers.training.graphed_step import GraphedStep
from millijoule.workers.training.loop import newest_share, schedule, update_average
from millijoule.workers.training.optimizer import (
    Muon,
    adamw,
    clip_and_step,
    load_optimizer,
    set_learning_rate,
)
from millijoule.workers.training.sample_sheet import write_sample_sheet
from millijoule.workers.training.step_data import StepData

#: Of the file that a further training begins with.
FLOAT_FORMAT = "millijoule-oscillator-training"


AtLeastOne = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class IconTrainingConfig:
    """One training run; with the same config, the same steps follow, on a CPU bit for bit on one machine and thread count.

    `steps` also sets the learning-rate schedule: warm-up, then cosine to zero.
    """

    steps: AtLeastOne = 12_000
    half: AtLeastOne = 96  # icons in half windows per step
    whole: AtLeastOne = 32  # icons in the whole image per step
    learning_rate: float = 1.5e-3  # of codes, places, biases
    matrix_rate: float = 1e-2  # of weights that are matrices
    matrix_decay: float = 0.1
    rounded_from: float = 0.6  # share of the steps after which weights and activations are rounded
    warm_up: int = 100
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    model: OscillatorConfig = field(default_factory=OscillatorConfig)


@dataclass(frozen=True)
class IconData:
    """What a step of `config` needs; see `StepData`."""

    config: IconTrainingConfig

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed * 2**32 + step)
        count = config.half + config.whole
        return {
            "noun": torch.randint(config.model.nouns, (count,), generator=generator),
            "size": torch.randint(len(SIZES), (count,), generator=generator),
        }


class IconTrainer:
    """Network, its moving average, optimisers and step count; a `loop.Trainer`."""

    def __init__(self, config: IconTrainingConfig, *, device: str = "cpu", data_processes: int = 0) -> None:
        torch.manual_seed(config.seed)
        self.config, self.device, self.step = config, device, 0
        self.on_gpu = device.startswith("cuda")
        self.data = StepData(IconData(config), device, data_processes)
        self.newest_share = torch.ones((), device=device)
        self.covers = true_covers(config.model.nouns, device)
        self.model = FloatNetwork(config.model)
        self.average = deepcopy(self.model).to(device).eval()
        self.model.to(device).train()
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        layers = ("read_code", "drive", "cell_", "near", "enlarge", "mix", "share")
        matrices = [p for name, p in named if name.startswith(layers) and p.ndim > 1]
        others = [p for name, p in named if not (name.startswith(layers) and p.ndim > 1)]
        self.optimizer = adamw(others, device, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.muon = Muon(matrices, device, lr=config.matrix_rate, weight_decay=config.matrix_decay)
        self.narrow = multiplies_bfloat16(device)
        self._run = {
            rounded: GraphedStep(self._computes(rounded)) if self.on_gpu else self._computes(rounded)
            for rounded in (False, True)
        }

    def train_step(self) -> dict[str, Tensor]:
        config = self.config
        share = schedule(self.step, config.steps, config.warm_up)
        set_learning_rate(self.optimizer, config.learning_rate * share)
        set_learning_rate(self.muon, config.matrix_rate * share)
        self.newest_share.fill_(newest_share(config.ema, self.step))
        logged = self._run[self.step >= config.rounded_from * config.steps](**self.data.get(self.step))
        self.step += 1
        return logged

    def _computes(self, rounded: bool) -> Any:
        def compute(noun: Tensor, size: Tensor) -> dict[str, Tensor]:
            config, kind = self.config, self.device.split(":")[0]
            parts, losses = (config.half, config.whole), []
            for whole, (nouns, sizes) in enumerate(zip(noun.split(parts), size.split(parts), strict=True)):
                with torch.autocast(kind, torch.bfloat16, enabled=self.narrow, cache_enabled=False):
                    logits = self.model(nouns, sizes, bool(whole), rounded=rounded)
                true = self.covers[whole][nouns, sizes].float() / 255
                losses.append(F.binary_cross_entropy_with_logits(logits.float(), true))
            loss = torch.stack(losses).mean()
            self.optimizer.zero_grad(set_to_none=True)
            self.muon.zero_grad(set_to_none=True)
            loss.backward()
            taken = clip_and_step(self.optimizer, self.model.parameters(), config.clip)
            self.muon.step_unless(taken["skipped"])
            update_average(self.average, self.model, self.newest_share)
            return {"loss": loss.detach(), **taken}

        return compute

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "muon": self.muon.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        load_optimizer(self.optimizer, state["optimizer"], self.device)
        load_optimizer(self.muon, state["muon"], self.device)

    def start_from(self, path: Path) -> None:
        """Begin with the weights of a finished run, its float.safetensors.

        Raises:
            InputError: not such a file, or of a network with other sizes.
        """
        metadata = read_own_header(path, "oscillator training", FLOAT_FORMAT, "1").metadata
        with refusing_damage(path):
            if read_settings(OscillatorConfig, metadata["config"]) != self.config.model:
                raise ValueError("its network has other sizes than this recipe's")
            tensors = load_file(path)
            self.model.load_state_dict(tensors)
            self.average.load_state_dict(tensors)

    def export(self, folder: Path, name: str, sheet: str = "samples.png") -> Path:
        """Write float.safetensors, to go on from; where the network has an integer form, model.safetensors and a sheet of it."""
        network = self.exported_network()
        config = self.config
        made = {"steps": str(self.step), "planned_steps": str(config.steps), "seed": str(config.seed)}
        settings = {"format": FLOAT_FORMAT, "version": "1", "config": json.dumps(asdict(config.model))}
        weights = folder / "float.safetensors"
        write_model_file(
            {k: v.contiguous() for k, v in network.state_dict().items()}, weights, made | settings
        )
        if config.model.coupling != "mlp":
            weights = folder / "model.safetensors"
            save_model(Painter.of(quantize(network)), weights, name, made)
            write_sample_sheet(OscillatorGenerator.load(weights), folder / sheet)
        return weights

    def exported_network(self) -> FloatNetwork:
        """The averaged weights, with the ranges of activations that the training saw last."""
        network = deepcopy(self.average).cpu()
        network.rounding.load_state_dict(self.model.rounding.state_dict())
        return network.eval()


def true_covers(nouns: int, device: str = "cpu") -> list[Tensor]:
    """How much of each pixel of its window an icon covers, uint8 `[nouns, sizes, side, side, 64]`, by kind of window."""
    masks = torch.from_numpy(icon_masks(nouns))
    covers = []
    for whole, side in enumerate(SIDES):
        margin = (masks.shape[-1] - side * CELL) // 2
        window = masks[:, whole, :, margin : margin + side * CELL, margin : margin + side * CELL]
        cells = window.unflatten(3, (side, CELL)).unflatten(2, (side, CELL)).transpose(3, 4)
        covers.append(cells.flatten(4).contiguous().to(device))
    return covers


@torch.no_grad()
def overlap(network: FloatNetwork, covers: list[Tensor]) -> Tensor:
    """Intersection over union of drawn and true shares, float32 `[nouns, windows, sizes]`."""
    nouns = torch.arange(len(covers[0]))
    found = torch.zeros(len(nouns), len(SIDES), len(SIZES))
    for whole in range(len(SIDES)):
        for size in range(len(SIZES)):
            for noun in nouns.split(128):
                drawn = torch.sigmoid(network(noun, torch.full_like(noun, size), bool(whole), rounded=True))
                true = covers[whole][noun, size].float() / 255
                both, either = torch.minimum(drawn, true), torch.maximum(drawn, true)
                found[noun, whole, size] = both.sum((1, 2, 3)) / either.sum((1, 2, 3))
    return found
