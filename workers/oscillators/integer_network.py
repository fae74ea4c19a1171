"""The network of the oscillator generator in integers: from icons to shares of pixels, the same bits everywhere.

All products are of int8 with exact sums in int32 (`kernels.int8_product`); between layers a sum is multiplied by a fixed-point
number for each row, rounded, and cut to int8. An icon is drawn on the cells of its window that are asked for: no cell depends
on which others are drawn with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from millijoule.kernels.int8_product import Int8Matrix
from millijoule.kernels.oscillator import MULTIPLIER_BITS, PULL_BITS, Coupling, Drive, relax
from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos
from millijoule.workers.oscillators.config import GRID, SIDES, OscillatorConfig

#: Logits of shares in steps of a 64th, from -16 to 16, are looked up.
LOGIT_UNIT = 64
LOGIT_LIMIT = 1024

#: 255 / (1 + exp(-logit)), rounded; index: logit in steps + LOGIT_LIMIT.
SHARES = torch.round(
    255 * torch.sigmoid(torch.arange(-LOGIT_LIMIT, LOGIT_LIMIT, dtype=torch.float64) / LOGIT_UNIT)
).to(torch.uint8)


@dataclass(frozen=True)
class Layer:
    """int8 weights `[outputs, inputs]`, a bias in the unit of a sum, int32, and a multiplier, int64, for each output:
    (sum + bias) * multiplier / 2**24 is the output in its own unit."""

    weights: Tensor
    bias: Tensor
    multiplier: Tensor

    @cached_property
    def matrix(self) -> Int8Matrix:
        return Int8Matrix(self.weights.t())

    def outputs(self, x: Tensor) -> Tensor:
        """int8 `[rows, inputs]` -> int64 `[rows, outputs]`."""
        total = self.matrix.product(x).add_(self.bias).to(torch.int64)
        return (
            total.mul_(self.multiplier).add_(1 << (MULTIPLIER_BITS - 1)).bitwise_right_shift_(MULTIPLIER_BITS)
        )

    def activations(self, x: Tensor) -> Tensor:
        """The same, cut to 0 to 127, int8."""
        return self.outputs(x).clamp_(0, AMPLITUDE).to(torch.int8)

    def to(self, device: str) -> Layer:
        return Layer(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class IntegerNetwork:
    """See the module. `codes` int8 `[nouns, code]`; `sizes` int32 `[variants, hidden]`, in the unit of `read_code`'s sums;
    `place` int32 `[kinds of window, cells * 3 channels]`, in pull units (a, b) and phase units (omega) of one step; layers in
    their order, `enlarge` with the four cells of each as outputs, row by row."""

    config: OscillatorConfig
    codes: Tensor
    sizes: Tensor
    place: Tensor
    read_code: Layer
    drive: Layer
    near: Layer
    enlarge: Layer
    near_again: Layer
    mix: Layer
    share: Layer
    coupling: Coupling | None = None

    def phases(self, noun: Tensor, variant: Tensor, steps: int | None = None) -> Tensor:
        """Final phases of icons, int32 `[icons, cells, channels]`; `noun` and `variant` int64 `[icons]`."""
        steps = steps or self.config.steps
        drives = self._drives(noun, variant, steps)
        return self._relaxed(torch.zeros_like(drives.a), drives, steps)

    def trajectory(self, noun: Tensor, variant: Tensor) -> Iterator[Tensor]:
        """Phases at rest, then after each step, as `phases` has the last."""
        drives = self._drives(noun, variant, self.config.steps)
        theta = torch.zeros_like(drives.a)
        yield theta
        for _ in range(self.config.steps):
            theta = self._relaxed(theta, drives, 1)
            yield theta

    def coupled_start(self, noun: Tensor, variant: Tensor) -> tuple[Tensor, Coupling, Drive]:
        """Phases at rest, coupling and drives of icons, as `kernels.oscillator.relax` takes them; all `[icons, n]`.

        Raises:
            ValueError: the oscillators have no coupling.
        """
        if self.coupling is None:
            raise ValueError("these oscillators have no coupling")
        drives = self._drives(noun, variant, self.config.steps)
        a, b, omega = (x.flatten(1) for x in (drives.a, drives.b, drives.omega))
        return torch.zeros_like(a), self.coupling, Drive(a, b, omega, drives.dt)

    def without_coupling(self) -> IntegerNetwork:
        """The same network with K = 0."""
        return replace(self, config=replace(self.config, coupling="none"), coupling=None)

    def _drives(self, noun: Tensor, variant: Tensor, steps: int) -> Drive:
        """Of each of `steps` steps, all `[icons, cells, channels]`."""
        config = self.config
        layer = self.read_code
        total = (
            layer.matrix.product(self.codes[noun]).add_(layer.bias).add_(self.sizes[variant]).to(torch.int64)
        )
        hidden = (
            total.mul_(layer.multiplier)
            .add_(1 << (MULTIPLIER_BITS - 1))
            .bitwise_right_shift_(MULTIPLIER_BITS)
        )
        hidden = hidden.clamp_(0, AMPLITUDE).to(torch.int8)
        kind = variant // (len(self.sizes) // len(SIDES))
        drive = self.drive.outputs(hidden) + self.place[kind]
        if steps != config.steps:  # more and shorter steps, or fewer and longer ones
            drive = (2 * config.steps * drive + steps).div(2 * steps, rounding_mode="floor")
        a, b, omega = drive.to(torch.int32).view(-1, config.cells, 3, config.channels).unbind(2)
        return Drive(a, b, omega, config.horizon / steps)

    def _relaxed(self, theta: Tensor, drives: Drive, steps: int) -> Tensor:
        if self.coupling is not None:
            flat = Drive(drives.a.flatten(1), drives.b.flatten(1), drives.omega.flatten(1), drives.dt)
            return relax(theta.flatten(1), self.coupling, flat, steps).view_as(theta)
        for _ in range(steps):
            s, c = (x.to(torch.int32) for x in sin_cos(theta))
            pull = (c * drives.a).sub_(s * drives.b)
            pull = pull.add_(1 << (PULL_BITS - 1)).bitwise_right_shift_(PULL_BITS)
            theta = (theta + drives.omega).add_(pull).bitwise_and_(TURN - 1)
        return theta

    def shares(self, phases: Tensor, whole: bool, icon: Tensor, cell: Tensor) -> Tensor:
        """How much of the pixels of some cells icons cover, uint8 `[asked, 64]`, row by row.

        Args:
            phases: of icons, all in one kind of window, from `phases`.
            icon: whose cells are asked for, int64 `[asked]`.
            cell: which of its window, row by row, int64 `[asked]`.
        """
        side = SIDES[whole]
        waves = torch.cat(sin_cos(phases), 2)
        x = self.near.activations(_around(_framed(waves, GRID), GRID, None, None))
        x = x.view(len(phases), GRID * GRID, -1)
        if whole:
            width = self.config.width
            x = self.enlarge.activations(x.flatten(0, 1)).view(-1, GRID, GRID, 2, 2, width)
            x = x.permute(0, 1, 3, 2, 4, 5).reshape(len(phases), side * side, width)
        x = self.near_again.activations(_around(_framed(x, side), side, icon, cell))
        logits = self.share.outputs(self.mix.activations(x))
        return SHARES.to(x.device)[logits.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT - 1).add_(LOGIT_LIMIT)]

    def to(self, device: str) -> IntegerNetwork:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return IntegerNetwork(**{k: v.to(device) if hasattr(v, "to") else v for k, v in moved.items()})


def _framed(x: Tensor, side: int) -> Tensor:
    """`[icons, side * side, channels]` -> `[icons, (side + 2)**2, channels]`, with zeros around."""
    framed = x.new_zeros(len(x), side + 2, side + 2, x.shape[-1])
    framed[:, 1:-1, 1:-1] = x.view(len(x), side, side, -1)
    return framed.flatten(1, 2)


def _around(framed: Tensor, side: int, icon: Tensor | None, cell: Tensor | None) -> Tensor:
    """A cell and its eight neighbours, row by row, `[asked, 9 channels]`; None: all cells of all icons."""
    if icon is None or cell is None:
        icon = torch.arange(len(framed), device=framed.device).repeat_interleave(side * side)
        cell = torch.arange(side * side, device=framed.device).repeat(len(framed))
    frame = side + 2
    corner = icon * frame * frame + cell // side * frame + cell % side
    offsets = torch.tensor([y * frame + x for y in range(3) for x in range(3)], device=framed.device)
    rows = framed.flatten(0, 1)
    return rows[(corner[:, None] + offsets)].flatten(1)
