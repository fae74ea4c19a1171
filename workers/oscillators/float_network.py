"""The network of the oscillator generator in floating point, for training; `integer_network` runs what becomes of it.

Everything that is drawn is icons; a scene is laid out of them (`canvas`). An icon enters as the code of its noun, a hundred
numbers, and its size. Through two linear layers they drive a square of 4 x 4 cells of oscillators,

    d theta_i / dt = omega_i + sum_j K_ij sin(theta_j - theta_i) + a_i cos(theta_i) - b_i sin(theta_i)

from rest, `steps` explicit Euler steps to time `horizon` (Kuramoto 1975, with a complex drive in place of the random-phase
drivers of Un-0). A decoder of convolutions reads sine and cosine of the final phases and says, for each pixel of each cell of
the icon's window, how much of it the icon covers. What the cells are told apart by is the second layer, which all nouns
share; no tensor grows with nouns times cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from millijoule.kernels.oscillator import STENCIL, dense_local
from millijoule.workers.oscillators.config import GRID, PIXELS, SIDES, VARIANTS, OscillatorConfig

#: Standard deviation of drives at the start, radians per unit of time: gentle; strong drives at once did not learn.
START_DRIVE = 0.5


class RoundedActivation(nn.Module):
    """ReLU up to `most`, in steps of a 127th of it, as the integer network has it; the gradient passes through rounding.

    `most` is a buffer that follows the largest value seen in training, slowly downwards; also before anything is rounded, so that
    a network can be quantised whenever its training ends.
    """

    most: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("most", torch.ones(()))

    def forward(self, x: Tensor, rounded: bool) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.most.copy_(torch.maximum(x.detach().amax().float(), 0.999 * self.most).clamp_min(1e-3))
        if not rounded:
            return F.relu(x)
        most = self.most.clone().to(x.dtype)  # the next call changes it before the gradient is taken
        step = most / 127
        y = x.clamp(torch.zeros_like(most), most)
        return y + (torch.round(y / step) * step - y).detach()


def rounded_rows(weights: Tensor) -> Tensor:
    """Weights in 127 steps of each row's largest, with the gradient of the identity."""
    flat = weights.flatten(1)
    step = (flat.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
    rounded = torch.round(flat / step) * step
    return weights + (rounded.view_as(weights) - weights).detach()


class FloatNetwork(nn.Module):
    """Icons to logits of pixel shares. `rounded`: weights and activations take the integer network's values."""

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        self.config = config
        c, width = config.channels, config.width
        self.code = nn.Embedding(config.nouns, config.code)
        self.size = nn.Embedding(VARIANTS, config.hidden)
        self.read_code = nn.Linear(config.code, config.hidden)
        self.drive = nn.Linear(config.hidden, config.cells * 3 * c, bias=False)
        self.place = nn.Parameter(0.6 * START_DRIVE * torch.randn(len(SIDES), config.cells, 3 * c))
        nn.init.normal_(self.drive.weight, 0, START_DRIVE * config.hidden**-0.5)
        if config.coupling in ("trained", "frozen"):
            self.local = nn.Parameter(0.1 * torch.randn(c, len(STENCIL) * c) * (len(STENCIL) * c) ** -0.5)
            self.gather = nn.Parameter(
                torch.randn(config.oscillators, config.rank) * config.oscillators**-0.5
            )
            self.spread = nn.Parameter(0.1 * torch.randn(config.oscillators, config.rank) * config.rank**-0.5)
            for weights in (self.local, self.gather, self.spread):
                weights.requires_grad_(config.coupling == "trained")
        if config.coupling == "mlp":
            self.cell_in = nn.Linear(3 * c, 2 * c)
            self.cell_out = nn.Linear(2 * c, 2 * c)
        self.near = nn.Conv2d(2 * c, width, 3, padding=1)
        self.enlarge = nn.ConvTranspose2d(width, width, 2, 2)
        self.near_again = nn.Conv2d(width, width, 3, padding=1)
        self.mix = nn.Conv2d(width, config.mix, 1)
        self.share = nn.Conv2d(config.mix, PIXELS, 1)
        self.rounding = nn.ModuleDict(
            {name: RoundedActivation() for name in ("hidden", "near", "near_again", "mix")}
        )

    def forward(self, noun: Tensor, size: Tensor, whole: bool, *, rounded: bool = False) -> Tensor:
        """Logits `[icons, side, side, 64]` of the shares of the pixels of each cell, row by row, of icons of one kind of
        window; `noun` and `size` int64 `[icons]`."""
        sin, cos = self.waves(*self.drives(noun, size, whole, rounded), rounded)
        return self.decode(torch.cat([sin, cos], 2), whole, rounded)

    def drives(self, noun: Tensor, size: Tensor, whole: bool, rounded: bool) -> tuple[Tensor, Tensor, Tensor]:
        """a, b, omega in radians per unit of time, each float32 `[icons, cells, channels]`."""
        hidden = F.linear(self.code(noun), self._weights(self.read_code, rounded), self.read_code.bias)
        hidden = self._activate("hidden", hidden + self.size(size + VARIANTS // 2 * whole), rounded)
        drive = F.linear(hidden, self._weights(self.drive, rounded)).float()
        drive = drive.view(-1, self.config.cells, 3 * self.config.channels) + self.place[int(whole)]
        a, b, omega = drive.chunk(3, 2)
        return a, b, omega

    def waves(
        self, a: Tensor, b: Tensor, omega: Tensor, rounded: bool = False, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sine and cosine of the final phases, `[icons, cells, channels]`; from rest, or from phases `start` in radians."""
        config = self.config
        if config.coupling == "mlp":
            found = self.cell_out(F.silu(self.cell_in(torch.cat([a, b, omega], 2))))
            sin, cos = torch.tanh(found).chunk(2, 2)
            return sin, cos
        dt = config.horizon / config.steps
        coupling = None if config.coupling == "none" else self.dense_coupling(rounded).t()
        phases = torch.zeros_like(a) if start is None else start
        for _ in range(config.steps):
            sin, cos = torch.sin(phases), torch.cos(phases)
            if coupling is None:
                phases = phases + dt * (omega + cos * a - sin * b)
            else:
                pulls = torch.cat([sin, cos]).flatten(1) @ coupling
                from_sin, from_cos = pulls.float().view(2, *a.shape)
                phases = phases + dt * (omega + cos * (from_sin + a) - sin * (from_cos + b))
        return torch.sin(phases), torch.cos(phases)

    def dense_coupling(self, rounded: bool = False) -> Tensor:
        """K as a full matrix `[oscillators, oscillators]`, row = target: in training one product instead of many small ones."""
        gathered = self.gather.t()
        if not rounded:
            return dense_local(self.local, GRID) + self.spread @ gathered
        return dense_local(rounded_rows(self.local), GRID) + rounded_rows(self.spread) @ rounded_rows(
            gathered
        )

    @torch.no_grad()
    def remove_coupling(self) -> None:
        """Set K to zero; all else stays as it was trained."""
        for weights in (self.local, self.gather, self.spread):
            weights.zero_()

    def decode(self, waves: Tensor, whole: bool, rounded: bool) -> Tensor:
        """Logits from sine and cosine `[icons, cells, 2 channels]`."""
        x = waves.transpose(1, 2).unflatten(2, (GRID, GRID))
        x = F.conv2d(x, self._weights(self.near, rounded), self.near.bias, padding=1)
        x = self._activate("near", x, rounded)
        if whole:
            weights = self.enlarge.weight.permute(1, 2, 3, 0)  # of each output: [out, y, x, in]
            if rounded:
                weights = rounded_rows(weights.flatten(0, 2)).view_as(weights)
            x = F.conv_transpose2d(x, weights.permute(3, 0, 1, 2), self.enlarge.bias, 2)
            x = self._activate("near", x, rounded)  # on one scale with what half windows go on from
        x = F.conv2d(x, self._weights(self.near_again, rounded), self.near_again.bias, padding=1)
        x = self._activate("near_again", x, rounded)
        x = F.conv2d(x, self._weights(self.mix, rounded), self.mix.bias)
        x = self._activate("mix", x, rounded)
        return F.conv2d(x, self._weights(self.share, rounded), self.share.bias).permute(0, 2, 3, 1)

    def _weights(self, layer: nn.Linear | nn.Conv2d, rounded: bool) -> Tensor:
        return rounded_rows(layer.weight) if rounded else layer.weight

    def _activate(self, name: str, x: Tensor, rounded: bool) -> Tensor:
        return self.rounding[name](x, rounded)
