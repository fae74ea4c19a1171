"""Phases of coupled oscillators in the image kernels' place of `relax_waves`; `kernels.oscillator` has the equation of a step.

A block takes some icons, all 16 cells of each, through all steps: a cell feels its own phases and its four neighbours' through five
blocks of weights, and all cells of its icon through a low rank. Sines and cosines go to one of two buffers and are read from the other,
so a step reads nothing that it writes, and nobody but the block waits for it. Drives and phases of its icons lie in memory of its own,
which is meant to stay in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.gpu.fixed_point import scaled
from millijoule.kernels.gpu.image_phases import drive_of, drive_weights, sin_cos
from millijoule.kernels.oscillator import (
    MULTIPLIER_BITS,
    PULL_BITS,
    STENCIL,
    Coupling,
    gather_multipliers,
    pull_multipliers,
)
from millijoule.kernels.phase import AMPLITUDE

#: Icons of a block.
COUPLED_ICONS = 16

#: The largest rank.
MAX_RANK = 64

_HALF = tl.constexpr(1 << (MULTIPLIER_BITS - 1))
_BITS = tl.constexpr(MULTIPLIER_BITS)
_PULL_BITS = tl.constexpr(PULL_BITS)
_PULL_HALF = tl.constexpr(1 << (PULL_BITS - 1))
_AMPLITUDE = tl.constexpr(AMPLITUDE)


@dataclass(frozen=True)
class PackedImageCoupling:
    """A coupling on a device, channels and rank padded with zeros.

    Attributes:
        local: int8 `[5, CHANNELS, CHANNELS]`: of a cell itself, left, right, up, down; target, source.
        gather: int8 `[16, RANK, CHANNELS]`.
        spread: int8 `[16, CHANNELS, RANK]`.
        real: what multipliers come from, not padded, on the host.
        horizon: units of time of all steps.
    """

    local: Tensor
    gather: Tensor
    spread: Tensor
    real: Coupling
    horizon: float

    @property
    def rank(self) -> int:
        return self.gather.shape[1]


@dataclass(frozen=True)
class CoupledSteps:
    """Fixed-point numbers of steps of one length: `local` `[CHANNELS]`, `gather` `[RANK]`, `spread` `[16, CHANNELS]`; int32, or int64 where
    one does not fit. `own`: int32 `[programs, 16, 4, icons, CHANNELS]`: of a program's icons a, b, omega, phases."""

    local: Tensor
    gather: Tensor
    spread: Tensor
    own: Tensor


def pack_coupling(
    coupling: Coupling, horizon: float, channels: int, rank: int, device: str | torch.device
) -> PackedImageCoupling:
    """`coupling` on `device`, padded to `channels` and `rank`."""
    c, cells = coupling.channels, coupling.grid**2
    wide, high = channels - c, rank - coupling.gather.shape[1]
    local = coupling.local.view(c, len(STENCIL), c).transpose(0, 1)
    gather = coupling.gather.view(cells, c, -1).transpose(1, 2)
    spread = coupling.spread.view(cells, c, -1)
    return PackedImageCoupling(
        local=F.pad(local, (0, wide, 0, wide)).contiguous().to(device),
        gather=F.pad(gather, (0, wide, 0, high)).contiguous().to(device),
        spread=F.pad(spread, (0, high, 0, wide)).contiguous().to(device),
        real=coupling,
        horizon=horizon,
    )


def pack_steps(
    packed: PackedImageCoupling, steps: int, programs: int, device: str | torch.device
) -> CoupledSteps:
    """What `steps` steps need on `device`, for `programs` programs."""
    channels, real = packed.local.shape[1], packed.real
    local, spread = pull_multipliers(real, packed.horizon / steps)
    gather = gather_multipliers(real)
    more = channels - real.channels
    local = F.pad(local[: real.channels], (0, more))
    gather = F.pad(gather, (0, packed.rank - len(gather)))
    spread = F.pad(spread.view(-1, real.channels), (0, more))
    fits = all(int(x.abs().max()) < 2**31 for x in (local, gather, spread))
    kind = torch.int32 if fits else torch.int64
    shape = (programs, len(packed.gather), 4, COUPLED_ICONS, channels)
    return CoupledSteps(
        local=local.to(device, kind),
        gather=gather.to(device, kind),
        spread=spread.to(device, kind),
        own=torch.empty(shape, dtype=torch.int32, device=device),
    )


@triton.jit
def _waves_of(source, i, cell, keep, CHANNELS: tl.constexpr):
    """Sines and cosines of one cell of some icons, int8 `[icons, CHANNELS]` each."""
    row = source + (i.to(tl.int64) * 16 + cell)[:, None] * (2 * CHANNELS) + tl.arange(0, CHANNELS)[None, :]
    return tl.load(row, keep[:, None], 0), tl.load(row + CHANNELS, keep[:, None], 0)


@triton.jit
def _transposed(weights, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Of weights `[OUTPUTS, INPUTS]`, int8 `[INPUTS, OUTPUTS]`."""
    return tl.load(weights + tl.arange(0, OUTPUTS)[None, :] * INPUTS + tl.arange(0, INPUTS)[:, None])


@triton.jit
def _put(target, i, cell, keep, table, theta, CHANNELS: tl.constexpr):
    """Sines and cosines of phases `[icons, CHANNELS]` where the next step reads them."""
    s, c = sin_cos(table, theta)
    row = target + (i.to(tl.int64) * 16 + cell)[:, None] * (2 * CHANNELS) + tl.arange(0, CHANNELS)[None, :]
    tl.store(row, s.to(tl.int8), keep[:, None])  # [icons, CHANNELS] int8
    tl.store(row + CHANNELS, c.to(tl.int8), keep[:, None])


@triton.jit
def _felt(
    source, local, i, cell, keep, near_s, near_c,
    block: tl.constexpr, down: tl.constexpr, right: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of a cell's sines and cosines, and what the cell `down` and `right` of it adds through `block` of the weights."""
    y, x = cell // 4 + down, cell % 4 + right
    there = keep & (y >= 0) & (y < 4) & (x >= 0) & (x < 4)
    s, c = _waves_of(source, i, 4 * y + x, there, CHANNELS)
    weights = _transposed(local + block * (CHANNELS * CHANNELS), CHANNELS, CHANNELS)
    near_s = tl.dot(s, weights, near_s, out_dtype=tl.int32)
    near_c = tl.dot(c, weights, near_c, out_dtype=tl.int32)
    return near_s, near_c


@triton.jit
def _pull_of(near, far, by_near, by_far):
    """int32 sums near and far, times their numbers, together over 2**24, rounded: int32."""
    total = (
        near.to(tl.int64) * by_near.to(tl.int64)[None, :] + far.to(tl.int64) * by_far.to(tl.int64)[None, :]
    )
    return ((total + _HALF) >> _BITS).to(tl.int32)


@triton.jit
def relax_coupled(
    counters, icons, hidden, drive, numbers, place, table, waves, own,
    local, gather, spread, by_local, by_gather, by_spread, slots, plain_steps, steps,
    SCALED: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr, ICONS: tl.constexpr,
):  # fmt: skip
    """Of some icons, the phases of all cells. `waves` is two buffers; the last sines and cosines are in the first."""
    program = tl.program_id(0)
    halves = tl.load(counters)
    count = halves + tl.load(counters + 1)
    r, out, inputs = tl.arange(0, ICONS), tl.arange(0, CHANNELS), tl.arange(0, HIDDEN)
    mine = own + program.to(tl.int64) * (16 * 4 * ICONS * CHANNELS) + r[:, None] * CHANNELS + out[None, :]
    part: tl.constexpr = ICONS * CHANNELS
    span = slots.to(tl.int64) * (16 * 2 * CHANNELS)
    for block in range(program, tl.cdiv(count, ICONS), tl.num_programs(0)):
        i = block * ICONS + r
        keep = i < count
        kind = (i >= halves).to(tl.int32)
        slot = tl.load(icons + tl.where(kind == 0, i, slots + i - halves), keep, 0)  # [icons]
        x = tl.load(hidden + slot.to(tl.int64)[:, None] * HIDDEN + inputs[None, :])  # [icons, HIDDEN] int8
        for cell in range(16):
            for k in tl.static_range(3):
                weights = drive_weights(drive, cell, k, HIDDEN, CHANNELS)
                driven = drive_of(
                    x, weights, numbers, place, cell, k, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS
                )
                tl.store(mine + (4 * cell + k) * part, driven)  # [icons, CHANNELS]
            theta = tl.zeros([ICONS, CHANNELS], tl.int32)
            tl.store(mine + (4 * cell + 3) * part, theta)  # [icons, CHANNELS]
            _put(waves + (steps % 2) * span, i, cell, keep, table, theta, CHANNELS)
        tl.debug_barrier()
        for step in range(steps):
            source, target = waves + ((steps - step) % 2) * span, waves + ((steps - step - 1) % 2) * span
            z_of_sines = tl.zeros([ICONS, RANK], tl.int32)
            z_of_cosines = tl.zeros([ICONS, RANK], tl.int32)
            for cell in range(16):
                s, c = _waves_of(source, i, cell, keep, CHANNELS)
                weights = _transposed(gather + cell * (RANK * CHANNELS), RANK, CHANNELS)  # [CHANNELS, RANK]
                z_of_sines = tl.dot(s, weights, z_of_sines, out_dtype=tl.int32)
                z_of_cosines = tl.dot(c, weights, z_of_cosines, out_dtype=tl.int32)
            by = tl.load(by_gather + tl.arange(0, RANK))
            z = tl.minimum(tl.maximum(scaled(z_of_sines, by), -_AMPLITUDE), _AMPLITUDE).to(tl.int8)
            z_beside = tl.minimum(tl.maximum(scaled(z_of_cosines, by), -_AMPLITUDE), _AMPLITUDE).to(tl.int8)
            for cell in range(16):
                near_s = tl.zeros([ICONS, CHANNELS], tl.int32)
                near_c = tl.zeros([ICONS, CHANNELS], tl.int32)
                near_s, near_c = _felt(source, local, i, cell, keep, near_s, near_c, 0, 0, 0, CHANNELS)
                near_s, near_c = _felt(source, local, i, cell, keep, near_s, near_c, 1, 0, -1, CHANNELS)
                near_s, near_c = _felt(source, local, i, cell, keep, near_s, near_c, 2, 0, 1, CHANNELS)
                near_s, near_c = _felt(source, local, i, cell, keep, near_s, near_c, 3, -1, 0, CHANNELS)
                near_s, near_c = _felt(source, local, i, cell, keep, near_s, near_c, 4, 1, 0, CHANNELS)
                weights = _transposed(spread + cell * (CHANNELS * RANK), CHANNELS, RANK)  # [RANK, CHANNELS]
                far_s = tl.dot(z, weights, out_dtype=tl.int32)
                far_c = tl.dot(z_beside, weights, out_dtype=tl.int32)
                by_near, by_far = tl.load(by_local + out), tl.load(by_spread + cell * CHANNELS + out)
                at = mine + 4 * cell * part
                u = _pull_of(near_s, far_s, by_near, by_far) + tl.load(at)  # [icons, CHANNELS]
                w = _pull_of(near_c, far_c, by_near, by_far) + tl.load(at + part)
                theta = tl.load(at + 3 * part)
                s, c = sin_cos(table, theta)
                # whole turns fall away where the table is read
                theta += tl.load(at + 2 * part) + ((c * u - s * w + _PULL_HALF) >> _PULL_BITS)
                tl.store(at + 3 * part, theta)
                _put(target, i, cell, keep, table, theta, CHANNELS)
            tl.debug_barrier()  # what each thread wrote, all read in the next step
