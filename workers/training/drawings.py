"""A task in which oscillators have to agree: nouns with several right drawings, chosen by noise.

Oscillators start at random. With noise of its own at each of them nothing but the coupling, or convolutions
that see many cells, can make all cells of an icon show the same of its noun's drawings; noise that all cells share settles it
without either. Training knows the drawings of a noun, not which of them an image is to be: of each step's samples of a noun
as many are compared with each of its drawings, assigned so that the sum of their cross entropies is least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.generators.model_files import write_model_file
from millijoule.workers.oscillators.config import GRID, PIXELS, OscillatorConfig
from millijoule.workers.oscillators.float_network import FloatNetwork
from millijoule.workers.scenes.drawings import several_drawings
from millijoule.workers.scenes.scenes import CELL
from millijoule.workers.training.loop import schedule
from millijoule.workers.training.optimizer import (
    Muon,
    adamw,
    clip_and_step,
    load_optimizer,
    set_learning_rate,
)


@dataclass(frozen=True)
class DrawingsConfig:
    """One run. `model.nouns` is set to how many nouns have several drawings."""

    noise: Literal["own", "shared"] = "own"  # of each cell, or one for all cells of an icon
    noisy: int = 4  # channels that start at random when training begins; how far each does is learned
    decoder: Literal["cell", "near"] = "cell"  # sees one cell, or is the generator's, which sees all around
    steps: int = 5000
    nouns: int = 8  # of a step
    samples: int = 16  # of each of its nouns, a multiple of the number of drawings
    learning_rate: float = 2e-3  # of codes, places, biases
    coupling_rate: float = 1e-3  # of K
    coupling_decay: float = 0.5
    matrix_rate: float = 1e-2
    matrix_decay: float = 0.1
    warm_up: int = 100
    clip: float = 1.0
    seed: int = 0
    model: OscillatorConfig = field(default_factory=lambda: OscillatorConfig(coupling="trained"))


class DrawingsNetwork(nn.Module):
    """The generator's oscillators, started at random, and a decoder."""

    def __init__(self, config: DrawingsConfig) -> None:
        super().__init__()
        self.config = config
        self.oscillators = FloatNetwork(config.model)
        width, mix = config.model.width, config.model.mix
        #: Standard deviation of start phases of each channel, radians.
        self.spread = nn.Parameter((torch.arange(config.model.channels) < config.noisy).float())
        self.cell = nn.Sequential(
            nn.Linear(2 * config.model.channels, width),
            nn.ReLU(),
            nn.Linear(width, mix),
            nn.ReLU(),
            nn.Linear(mix, PIXELS),
        )

    def forward(self, noun: Tensor, samples: int, noise: Tensor) -> Tensor:
        """Icons of nouns int64 `[n]`: logits of shares, float32 `[n, samples, 32, 32]`; `noise` as from `noise`."""
        drives = self.oscillators.drives(noun, torch.zeros_like(noun), False, False)
        a, b, omega = (drive.repeat_interleave(samples, 0) for drive in drives)
        waves = torch.cat(self.oscillators.waves(a, b, omega, start=self.spread * noise), 2)
        if self.config.decoder == "cell":
            logits = self.cell(waves).unflatten(1, (GRID, GRID))
        else:
            logits = self.oscillators.decode(waves, False, False)
        rows = logits.float().unflatten(3, (CELL, CELL)).transpose(2, 3)
        return rows.reshape(len(noun), samples, GRID * CELL, GRID * CELL)

    def noise(self, icons: int, generator: torch.Generator) -> Tensor:
        """Standard normal, `[icons, cells, channels]`."""
        cells, channels = self.config.model.cells, self.config.model.channels
        own = torch.randn(icons, cells if self.config.noise == "own" else 1, channels, generator=generator)
        return own.expand(-1, cells, -1)

    def used_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that `forward` reads; the other decoder's are left out."""
        decoder = ("oscillators.near", "oscillators.mix", "oscillators.share")
        unused = (
            (*decoder, "oscillators.enlarge")
            if self.config.decoder == "cell"
            else ("cell", "oscillators.enlarge")
        )
        return ((name, p) for name, p in self.named_parameters() if not name.startswith(unused))


#: Parameters of K, by the beginning of their names.
COUPLING = ("oscillators.local", "oscillators.gather", "oscillators.spread")


class DrawingsTrainer:
    """Network, optimisers and step count; a `loop.Trainer`."""

    def __init__(self, config: DrawingsConfig) -> None:
        torch.manual_seed(config.seed)
        _, drawings = several_drawings()
        self.config = config = replace(config, model=replace(config.model, nouns=len(drawings)))
        self.step = 0
        self.drawings = torch.from_numpy(drawings).float() / 255
        self.model = DrawingsNetwork(config)
        named = list(self.model.used_parameters())
        layers = ("read_code", "drive", "near", "mix", "share", "cell")
        matrices = [
            p for name, p in named if name.removeprefix("oscillators.").startswith(layers) and p.ndim > 1
        ]
        coupling = [p for name, p in named if name.startswith(COUPLING)]
        others = [
            p for name, p in named if not name.startswith(COUPLING) and not any(p is m for m in matrices)
        ]
        groups = [
            {"params": others, "peak": config.learning_rate, "weight_decay": 0.0},
            {"params": coupling, "peak": config.coupling_rate, "weight_decay": config.coupling_decay},
        ]
        self.optimizer = adamw(groups, "cpu", betas=(0.9, 0.98))
        self.muon = Muon(matrices, "cpu", lr=config.matrix_rate, weight_decay=config.matrix_decay)
        self.narrow = multiplies_bfloat16("cpu")

    def train_step(self) -> dict[str, Tensor]:
        config = self.config
        share = schedule(self.step, config.steps, config.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        set_learning_rate(self.muon, config.matrix_rate * share)
        generator = torch.Generator().manual_seed(config.seed * 2**32 + self.step)
        noun = torch.randint(config.model.nouns, (config.nouns,), generator=generator)
        noise = self.model.noise(config.nouns * config.samples, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            logits = self.model(noun, config.samples, noise)
        loss = F.binary_cross_entropy_with_logits(logits, assigned(logits.detach(), self.drawings[noun]))
        self.optimizer.zero_grad(set_to_none=True)
        self.muon.zero_grad(set_to_none=True)
        loss.backward()
        taken = clip_and_step(self.optimizer, [p for _, p in self.model.used_parameters()], config.clip)
        self.muon.step_unless(taken["skipped"])
        self.step += 1
        return {"loss": loss.detach(), **taken}

    @torch.no_grad()
    def sample(self, samples: int, seed: int = 0) -> Tensor:
        """Icons of all nouns, shares float32 `[nouns, samples, 32, 32]`."""
        generator = torch.Generator().manual_seed(2**40 + seed)
        drawn = []
        for noun in torch.arange(self.config.model.nouns).split(16):
            noise = self.model.noise(len(noun) * samples, generator)
            drawn.append(self.model(noun, samples, noise).sigmoid())
        return torch.cat(drawn)

    def state(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.muon)
        return dict(zip(("model", "optimizer", "muon"), (p.state_dict() for p in parts), strict=True))

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"], "cpu")
        load_optimizer(self.muon, state["muon"], "cpu")

    def export(self, folder: Path, name: str) -> Path:
        """Write the weights; nothing but this module reads them."""
        path = folder / "float.safetensors"
        described = {"format": "millijoule-drawings", "name": name, "config": str(asdict(self.config))}
        write_model_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, path, described)
        return path


def assigned(logits: Tensor, drawings: Tensor) -> Tensor:
    """What each sample is compared with: `[n, samples, 32, 32]`, every drawing `[n, drawings, 32, 32]` equally often, so that the
    sum of cross entropies is least (the assignment of Kuhn 1955)."""
    from scipy.optimize import linear_sum_assignment

    n, samples = logits.shape[:2]
    pool = drawings.repeat(1, samples // drawings.shape[1], 1, 1)
    # of the cross entropy, all that depends on which drawing it is
    gain = logits.flatten(2) @ pool.flatten(2).transpose(1, 2)
    chosen = [linear_sum_assignment(of.numpy(), maximize=True)[1] for of in gain]
    which = torch.from_numpy(np.stack(chosen))
    return pool[torch.arange(n)[:, None], which]


def score(images: Tensor, drawings: Tensor) -> dict[str, float]:
    """How far images are single drawings, and how evenly those are chosen.

    Args:
        images: `[nouns, samples, size, size]`, in [0, 1].
        drawings: `[nouns, drawings, size, size]`, in [0, 1].

    Returns:
        "one_drawing": share of images that are nearer (root mean square) to one of their noun's drawings than to the mean of any
        two or more of them, and so no blend; "overlap": mean intersection over union with the nearest drawing; "evenness":
        entropy of which drawing is nearest, mean over nouns, 1 where all are as often.
    """
    kinds = drawings.shape[1]
    sets = [list(some) for size in range(1, kinds + 1) for some in itertools.combinations(range(kinds), size)]
    blends = torch.stack([drawings[:, some].mean(1) for some in sets], 1)  # single drawings first
    nearest = torch.cdist(images.flatten(2), blends.flatten(2)).argmin(2)
    either = torch.maximum(images[:, :, None], drawings[:, None]).sum((3, 4))
    overlap = torch.minimum(images[:, :, None], drawings[:, None]).sum((3, 4)) / either
    most, which = overlap.max(2)
    often = F.one_hot(which, kinds).double().mean(1)
    return {
        "one_drawing": float((nearest < kinds).double().mean()),
        "overlap": float(most.mean()),
        "evenness": float((torch.special.entr(often).sum(1) / math.log(kinds)).mean()),
    }
