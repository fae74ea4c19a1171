"""The oscillator generator as a float network, for training; `workers.oscillator` runs its integer form.

    d theta_i / dt = omega_i(e) + sum_j K_ij sin(theta_j - theta_i) + a_i(e) cos(theta_i) - b_i(e) sin(theta_i)

theta starts uniform on the circle (that is the noise), runs `steps` explicit Euler steps to time `horizon`, and a
convolutional decoder reads sin and cos of the final phases on a grid. The prompt enters as tokens e through the drive
(a, b) and a shift of the frequencies omega. After Un-0 (phases, readout without projection) with a complex drive in
place of its random-phase drivers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Factor on the drive's default initialisation. Much stronger drives (3 rad per unit of time) did not learn: the loss
#: rose from 3.7 at step 100 to 5.4 at step 225, where this start reached 2.0 at step 250.
FIRST_DRIVE = 3.0


@dataclass(frozen=True)
class OscillatorConfig:
    """Sizes of the model. `grid * grid * channels` oscillators; images have `grid * 2 ** (len(widths) - 1)` pixels a side."""

    vocabulary: int
    tokens: int
    grid: int = 8
    channels: int = 16  # oscillators per cell
    token_width: int = 48
    hidden: int = 256
    widths: tuple[int, ...] = (64, 40, 24)  # decoder channels at grid, 2 grid, 4 grid
    steps: int = 10
    horizon: float = 1.0

    @property
    def oscillators(self) -> int:
        return self.grid * self.grid * self.channels

    @property
    def image_size(self) -> int:
        return self.grid * 2 ** (len(self.widths) - 1)


class PromptEncoder(nn.Module):
    """Tokens int64 `[batch, tokens]` -> drive and frequencies, float `[batch, 3, n]` (a, b, omega; radians per time)."""

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        n = config.oscillators
        self.embedding = nn.Embedding(config.vocabulary, config.token_width)
        self.hidden1 = nn.Linear(config.tokens * config.token_width, config.hidden)
        self.hidden2 = nn.Linear(config.hidden, config.hidden)
        self.drive = nn.Linear(config.hidden, 3 * n)
        with torch.no_grad():
            self.drive.weight.mul_(FIRST_DRIVE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).flatten(1)
        x = F.silu(self.hidden1(x))
        x = x + F.silu(self.hidden2(x))
        return self.drive(x).unflatten(1, (3, -1))


class Decoder(nn.Module):
    """sin and cos of the phases, float `[batch, 2 * channels, grid, grid]` -> images `[batch, 3, size, size]` in [-1, 1]."""

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        first, *rest = config.widths
        self.input = nn.Conv2d(2 * config.channels, first, 3, padding=1)
        self.mix = nn.Conv2d(first, first, 3, padding=1)
        self.up = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1) for i, o in zip(config.widths[:-1], rest, strict=True)
        )
        self.output = nn.Conv2d(config.widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.input(x), 0.2)
        x = F.leaky_relu(self.mix(x), 0.2)
        for conv in self.up:
            x = F.leaky_relu(conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), 0.2)
        return torch.tanh(self.output(x))


class OscillatorModel(nn.Module):
    """The whole generator. `forward` takes tokens `[batch, tokens]` and start phases `[batch, n]` in radians."""

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        self.config = config
        n = config.oscillators
        self.encoder = PromptEncoder(config)
        self.coupling = nn.Parameter(
            torch.randn(n, n)
        )  # forward scale n ** -0.5: Adam's rate is width-independent
        self.decoder = Decoder(config)

    def coupling_matrix(self) -> Tensor:
        """K, float `[n, n]`, zero on the diagonal: row i is what moves oscillator i."""
        n = self.config.oscillators
        return self.coupling * ((1.0 - torch.eye(n)) * n**-0.5)

    def relax(self, drive: Tensor, phases: Tensor, operands: torch.dtype = torch.float32) -> Tensor:
        """Final phases `[batch, n]`, radians, unwrapped. Phases stay float32; only matrix operands may be narrower."""
        a, b, omega = drive.float().unbind(1)
        transposed = self.coupling_matrix().t().to(operands)
        dt = self.config.horizon / self.config.steps
        for _ in range(self.config.steps):
            sin, cos = torch.sin(phases), torch.cos(phases)
            pulls = (torch.cat([sin, cos]).to(operands) @ transposed).float()
            from_sin, from_cos = pulls.chunk(2)
            phases = phases + dt * (omega + cos * (from_sin + a) - sin * (from_cos + b))
        return phases

    def decode(self, phases: Tensor) -> Tensor:
        """Images `[batch, 3, size, size]` in [-1, 1] from phases in radians."""
        return self.decoder(grid_features(torch.sin(phases), torch.cos(phases), self.config))

    def forward(self, tokens: Tensor, phases: Tensor, operands: torch.dtype = torch.float32) -> Tensor:
        return self.decode(self.relax(self.encoder(tokens), phases, operands))


def grid_features(sin: Tensor, cos: Tensor, config: OscillatorConfig) -> Tensor:
    """`[batch, n]` sines and cosines -> `[batch, 2 * channels, grid, grid]`; oscillator = channel * grid**2 + cell."""
    shape = (-1, config.channels, config.grid, config.grid)
    return torch.cat([sin.reshape(shape), cos.reshape(shape)], 1)


def start_phases(count: int, n: int, generator: torch.Generator) -> Tensor:
    """Uniform phases for training, float32 `[count, n]`."""
    return torch.rand(count, n, generator=generator) * (2 * math.pi)
