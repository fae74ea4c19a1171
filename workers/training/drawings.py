"""A task in which oscillators have to agree: nouns with several right drawings, chosen by noise.

Phases start at random. With noise of its own at each oscillator nothing but the coupling, or convolutions that see many cells,
can make all cells of an icon show the same of its noun's drawings; noise that all cells share settles it without either.
Training knows the drawings of a noun alone, not which of them an image is to be: the energy distance (Szekely and Rizzo 2013)
between samples and drawings, on whole icons and on tiles of them, is least where samples are drawings, each as often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

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

#: Sides of the tiles that samples and drawings are compared on, and their weights; the first is the whole icon.
TILES = ((32, 1.0), (16, 0.5), (8, 0.5))


@dataclass(frozen=True)
class DrawingsConfig:
    """One run. `model.nouns` is set to how many nouns have several drawings."""

    noise: Literal["own", "shared"] = (
        "own"  # start phases: of each oscillator, or of each channel for all cells
    )
    decoder: Literal["cell", "near"] = "cell"  # sees one cell, or is the generator's, which sees all around
    steps: int = 4000
    nouns: int = 16  # of a step
    samples: int = 8  # of each of its nouns
    learning_rate: float = 2e-3
    matrix_rate: float = 1e-2
    matrix_decay: float = 0.1
    warm_up: int = 100
    clip: float = 1.0
    seed: int = 0
    model: OscillatorConfig = field(default_factory=lambda: OscillatorConfig(coupling="trained", horizon=2.0))


class DrawingsNetwork(nn.Module):
    """The generator's oscillators, started at random, and a decoder."""

    def __init__(self, config: DrawingsConfig) -> None:
        super().__init__()
        self.config = config
        self.oscillators = FloatNetwork(config.model)
        width, mix = config.model.width, config.model.mix
        self.cell = nn.Sequential(
            nn.Linear(2 * config.model.channels, width),
            nn.ReLU(),
            nn.Linear(width, mix),
            nn.ReLU(),
            nn.Linear(mix, PIXELS),
        )

    def forward(self, noun: Tensor, samples: int, start: Tensor) -> Tensor:
        """Icons of nouns int64 `[n]`, shares float32 `[n, samples, 32, 32]`, from phases `start` `[n * samples, cells, channels]`."""
        drives = self.oscillators.drives(noun, torch.zeros_like(noun), False, False)
        a, b, omega = (drive.repeat_interleave(samples, 0) for drive in drives)
        waves = torch.cat(self.oscillators.waves(a, b, omega, start=start), 2)
        if self.config.decoder == "cell":
            logits = self.cell(waves).unflatten(1, (GRID, GRID))
        else:
            logits = self.oscillators.decode(waves, False, False)
        rows = logits.float().sigmoid().unflatten(3, (CELL, CELL)).transpose(2, 3)
        return rows.reshape(len(noun), samples, GRID * CELL, GRID * CELL)

    def start(self, icons: int, generator: torch.Generator) -> Tensor:
        """Random phases in radians."""
        cells = self.config.model.cells if self.config.noise == "own" else 1
        shape = icons, cells, self.config.model.channels
        return 2 * math.pi * torch.rand(shape, generator=generator).expand(-1, self.config.model.cells, -1)

    def used_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that `forward` reads; the other decoder's are left out."""
        decoder = ("oscillators.near", "oscillators.mix", "oscillators.share")
        unused = (
            (*decoder, "oscillators.enlarge")
            if self.config.decoder == "cell"
            else ("cell", "oscillators.enlarge")
        )
        return ((name, p) for name, p in self.named_parameters() if not name.startswith(unused))


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
        others = [p for _, p in named if not any(p is matrix for matrix in matrices)]
        self.optimizer = adamw(others, "cpu", lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.muon = Muon(matrices, "cpu", lr=config.matrix_rate, weight_decay=config.matrix_decay)
        self.narrow = multiplies_bfloat16("cpu")

    def train_step(self) -> dict[str, Tensor]:
        config = self.config
        share = schedule(self.step, config.steps, config.warm_up)
        set_learning_rate(self.optimizer, config.learning_rate * share)
        set_learning_rate(self.muon, config.matrix_rate * share)
        generator = torch.Generator().manual_seed(config.seed * 2**32 + self.step)
        noun = torch.randint(config.model.nouns, (config.nouns,), generator=generator)
        start = self.model.start(config.nouns * config.samples, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            images = self.model(noun, config.samples, start)
        loss = energy_distance(images, self.drawings[noun])
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
            drawn.append(self.model(noun, samples, self.model.start(len(noun) * samples, generator)))
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


def energy_distance(images: Tensor, true: Tensor) -> Tensor:
    """Weighted sum over `TILES` of 2 E|x - y| - E|x - x'| in units of a pixel, without the constant term - E|y - y'|.

    Args:
        images: `[n, samples, 32, 32]`, differentiable, at least two samples.
        true: all that are right, each as often, `[n, drawings, 32, 32]`.
    """
    total = images.new_zeros(())
    for side, weight in TILES:
        x, y = _tiles(images, side), _tiles(true, side)
        samples = x.shape[-2]
        within = _distances(x, x).sum((-1, -2)) / (samples * (samples - 1))
        total = total + weight * (2 * _distances(x, y).mean((-1, -2)) - within).mean() / side
    return total


def _tiles(images: Tensor, side: int) -> Tensor:
    """`[n, samples, 32, 32]` -> `[n, tiles, samples, side * side]`."""
    n, samples, size, _ = images.shape
    tiles = images.view(n, samples, size // side, side, size // side, side)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(n, (size // side) ** 2, samples, side * side)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, smooth at zero, so that a sample's distance to itself has a gradient."""
    squares = (x * x).sum(-1)[..., :, None] + (y * y).sum(-1)[..., None, :] - 2 * x @ y.transpose(-1, -2)
    return torch.sqrt(squares.clamp_min(0) + 1e-6) - 1e-3


#: An image is one drawing, and no blend, if of the mixture of its noun's drawings that is nearest to it one has at least this share.
ONE_DRAWING = 0.9


def score(images: Tensor, drawings: Tensor) -> dict[str, float]:
    """How far images are single drawings, and how evenly those are chosen.

    Args:
        images: `[nouns, samples, size, size]`, in [0, 1].
        drawings: `[nouns, drawings, size, size]`, in [0, 1].

    Returns:
        "one_drawing": share of images that are one drawing (`ONE_DRAWING`); "largest_share": mean share of the drawing that has
        most; "overlap": mean intersection over union with the nearest drawing; "evenness": entropy of which is nearest, mean over
        nouns, 1 where all are as often.
    """
    shares = mixture(images.flatten(2), drawings.flatten(2))
    either = torch.maximum(images[:, :, None], drawings[:, None]).sum((3, 4))
    overlaps = torch.minimum(images[:, :, None], drawings[:, None]).sum((3, 4)) / either
    nearest, which = overlaps.max(2)
    often = F.one_hot(which, drawings.shape[1]).double().mean(1)
    entropy = torch.special.entr(often).sum(1) / math.log(drawings.shape[1])
    largest = shares.amax(2)
    return {
        "one_drawing": float((largest >= ONE_DRAWING).double().mean()),
        "largest_share": float(largest.mean()),
        "overlap": float(nearest.mean()),
        "evenness": float(entropy.mean()),
    }


def mixture(images: Tensor, drawings: Tensor, rounds: int = 500) -> Tensor:
    """Shares of the drawings in the mixture (none below 0, sum 1) that is nearest to each image: `[nouns, samples, drawings]`, from
    `[nouns, samples, pixels]` and `[nouns, drawings, pixels]`; by projected gradient (Duchi et al. 2008 for the projection)."""
    kinds = drawings.shape[1]
    square = drawings @ drawings.transpose(1, 2)
    towards = images @ drawings.transpose(1, 2)
    step = 1 / torch.linalg.matrix_norm(square, 2)[:, None, None]
    shares = torch.full_like(towards, 1 / kinds)
    count = torch.arange(1, kinds + 1)
    for _ in range(rounds):
        shares = shares - step * (shares @ square - towards)
        ordered = shares.sort(-1, descending=True).values
        excess = ordered.cumsum(-1) - 1
        kept = (ordered > excess / count).sum(-1, keepdim=True)
        shares = (shares - excess.gather(-1, kept - 1) / kept).clamp_min(0)
    return shares
