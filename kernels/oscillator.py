"""The oscillator core in integers: phases on a grid relax under sparse coupling and drive, the same bits everywhere.

n = cells * C oscillators stand on a square grid of cells, C in each; oscillator = cell * C + channel. The coupling is
block-sparse plus low-rank: every cell feels itself and its four neighbours through five C x C blocks, the same for all
cells, and everything feels everything through rank r. One step, for oscillator i of an image (all shifts are floor
divisions with rounding, S and C int8 sine and cosine):

    z_k = clamp(sum_j V_jk S_j * Mz_k / 2**24)                                   int8, sums exact in int32
    u_i = (sum_near L_ij S_j * Ml_i + sum_k U_ik z_k * Mu_i) / 2**24 + A_i       and w_i alike from C_j, with B_i
    theta_i <- theta_i + omega_i + (C_i u_i - S_i w_i) / 2**11                   modulo 65536

which is an Euler step of  d theta_i/dt = omega_i + sum_j k_ij sin(theta_j - theta_i) + a_i cos theta_i - b_i sin theta_i
(Kuramoto 1975, with a complex drive) for k = L + U V^T. The multipliers hold everything real: scales, the step length,
phase units. No sum is rounded before it is complete, so the result does not depend on batch size, order,
threads or device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.int8_product import Int8Matrix
from millijoule.kernels.native_library import usual_form
from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos
from millijoule.kernels.sparse_coupling import WORTH_SENDING, Multipliers, Relaxed, SparseKernel, takes

#: Fraction bits of the multipliers.
MULTIPLIER_BITS = 24

#: Fraction bits of C u - S w, in phase units.
PULL_BITS = 11

#: Phase units per radian.
UNITS = TURN / (2 * math.pi)

#: The value of z that int8's 127 stands for; larger ones saturate.
MAX_Z = 8.0

#: Neighbours by row and column, in the order of the blocks: itself, left, right, up, down.
STENCIL = ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))


@dataclass(frozen=True)
class Coupling:
    """int8 weights and their real scales (float64).

    `local` `[C, 5 C]`: row = target channel, columns = stencil-major source channels; scale by row.
    `gather` V `[n, r]`, scale by column. `spread` U `[n, r]`, scale by row.
    """

    local: Tensor
    local_scale: Tensor
    gather: Tensor
    gather_scale: Tensor
    spread: Tensor
    spread_scale: Tensor

    @property
    def n(self) -> int:
        return self.gather.shape[0]

    @property
    def channels(self) -> int:
        return self.local.shape[0]

    @property
    def grid(self) -> int:
        return math.isqrt(self.n // self.channels)

    @cached_property
    def products(self) -> tuple[Int8Matrix, Int8Matrix, Int8Matrix]:
        """L^T `[5 C, C]`, V `[n, r]` and U^T `[r, n]`, to multiply by."""
        return Int8Matrix(self.local.t()), Int8Matrix(self.gather), Int8Matrix(self.spread.t())

    @cached_property
    def kernel(self) -> SparseKernel | None:
        """The compiled form's own copy, to be asked for only where there is compiled code; None: a weight is not for it."""
        weights = self.local, self.gather, self.spread
        assert self.products  # whose sums fit int32, or they are refused
        return SparseKernel(*weights) if takes(*weights) else None

    def to(self, device: str) -> Coupling:
        return Coupling(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Drive:
    """What a prompt does to its oscillators in a step of `dt`: `a`, `b` int32 `[batch, n]` in pull units (`pull_unit`), `omega`
    int32 `[batch, n]` in phase units. However large they are, int32 may wrap: 2**32 / 2**11 is a whole number of turns."""

    a: Tensor
    b: Tensor
    omega: Tensor
    dt: float


def quantize_rows(weights: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and a float64 scale for each row; a row's largest weight becomes 127."""
    weights = weights.double()
    scale = weights.abs().amax(1).clamp_min(1e-12) / AMPLITUDE
    return torch.round(weights / scale[:, None]).to(torch.int8), scale


def quantize_coupling(local: Tensor, gather: Tensor, spread: Tensor) -> Coupling:
    """From float L `[C, 5 C]`, V `[n, r]` and U `[n, r]`."""
    columns, gather_scale = quantize_rows(gather.t())
    return Coupling(*quantize_rows(local), columns.t().contiguous(), gather_scale, *quantize_rows(spread))


def pull_unit(dt: float) -> float:
    """Pull units, in a step of `dt`, of one radian per unit of time."""
    return dt * UNITS * 2**PULL_BITS / AMPLITUDE


def gather_multipliers(coupling: Coupling) -> Tensor:
    """Mz, int64 `[r]`: from sums of V times sines to int8 z."""
    return _fixed_point(coupling.gather_scale / MAX_Z)


def pull_multipliers(coupling: Coupling, dt: float) -> tuple[Tensor, Tensor]:
    """Ml and Mu, int64 `[n]`: from sums of L times sines, and of U times z, to pull units of a step of `dt`."""
    cells = coupling.n // coupling.channels
    local = coupling.local_scale.repeat(cells) * (pull_unit(dt) / AMPLITUDE)
    return _fixed_point(local), _fixed_point(coupling.spread_scale * (pull_unit(dt) * MAX_Z / AMPLITUDE))


def _fixed_point(real: Tensor) -> Tensor:
    return torch.round(real * 2**MULTIPLIER_BITS).to(torch.int64)


def relax_reference(phases: Tensor, coupling: Coupling, drive: Drive, steps: int) -> Tensor:
    """Phases int32 `[batch, n]` in [0, 65536) after `steps` steps, as plainly as the equations are written, with the local
    coupling as a full matrix."""
    theta = phases.to(torch.int64)
    local = dense_local(coupling.local.to(torch.int64), coupling.grid)
    gather, spread = coupling.gather.to(torch.int64), coupling.spread.to(torch.int64)
    z_multipliers = gather_multipliers(coupling)
    local_multipliers, spread_multipliers = pull_multipliers(coupling, drive.dt)
    half = 1 << (MULTIPLIER_BITS - 1)
    for _ in range(steps):
        s, c = (x.to(torch.int64) for x in sin_cos(theta))
        pulls = []
        for wave, bias in ((s, drive.a), (c, drive.b)):
            z = ((wave @ gather) * z_multipliers + half) >> MULTIPLIER_BITS
            z = z.clamp(-AMPLITUDE, AMPLITUDE)
            total = (wave @ local.t()) * local_multipliers + (z @ spread.t()) * spread_multipliers
            pulls.append(((total + half) >> MULTIPLIER_BITS) + bias)
        step = (c * pulls[0] - s * pulls[1] + (1 << (PULL_BITS - 1))) >> PULL_BITS
        theta = (theta + drive.omega + step) % TURN
    return theta.to(torch.int32)


def dense_local(local: Tensor, grid: int) -> Tensor:
    """The block-sparse part as a full matrix `[n, n]`, from `[C, 5 C]`."""
    channels = local.shape[0]
    dense = local.new_zeros(grid, grid, channels, grid, grid, channels)
    for k, (down, right) in enumerate(STENCIL):
        block = local[:, k * channels : (k + 1) * channels]
        for y in range(grid):
            for x in range(grid):
                if 0 <= y + down < grid and 0 <= x + right < grid:
                    dense[y, x, :, y + down, x + right] = block
    n = grid * grid * channels
    return dense.reshape(n, n)


def relax(phases: Tensor, coupling: Coupling, drive: Drive, steps: int) -> Tensor:
    """`relax_reference`, fast. Same arguments, same bits.

    On a CPU compiled code does it where there is some, with all sums made anew in every step; elsewhere PyTorch.
    """
    if (form := _compiled_form(phases)) is not None and (kernel := coupling.kernel) is not None:
        drives = drive.a, drive.b, drive.omega
        return kernel.relax(phases, drives, multipliers_of(coupling, drive.dt), steps, form).phases
    return relax_pytorch(phases, coupling, drive, steps)


def relax_by_events(
    phases: Tensor,
    coupling: Coupling,
    drive: Drive,
    steps: int,
    *,
    up_to: float | None = None,
    leave: bool = True,
) -> Relaxed:
    """`relax` with sums that are kept from step to step and updated by what changed, images at rest left out, and both counted.

    The same bits. It is faster than `relax` only where almost all oscillators rest: docs/generator.md says from which share on.

    Args:
        phases, coupling, drive, steps: as for `relax`.
        up_to: in steps in which a larger share of the oscillators, or of z, changed, sums are made anew; None: the share up to which
            differences were measured to take less time, by form.
        leave: whether images at rest leave.
    """
    if (form := _compiled_form(phases)) is not None and (kernel := coupling.kernel) is not None:
        drives = drive.a, drive.b, drive.omega
        multipliers = multipliers_of(coupling, drive.dt)
        up_to = WORTH_SENDING[form] if up_to is None else up_to
        return kernel.relax(phases, drives, multipliers, steps, form, up_to=up_to, leave=leave)
    return _counted(phases, coupling, drive, steps, leave)


def multipliers_of(coupling: Coupling, dt: float) -> Multipliers:
    """Of a step of `dt`, as the compiled form takes them."""
    local, spread = pull_multipliers(coupling, dt)
    return Multipliers(local[: coupling.channels], gather_multipliers(coupling), spread)


def relax_pytorch(phases: Tensor, coupling: Coupling, drive: Drive, steps: int) -> Tensor:
    """`relax` in PyTorch: the sums are int8 matrix products."""
    batch, n = phases.shape
    grid, channels = coupling.grid, coupling.channels
    local, _, spread = coupling.products
    z_multipliers = gather_multipliers(coupling)
    half, half_pull = 1 << (MULTIPLIER_BITS - 1), 1 << (PULL_BITS - 1)
    local_multipliers, spread_multipliers = pull_multipliers(coupling, drive.dt)
    bias = torch.cat([drive.a, drive.b])  # [2 batch, n]
    theta = phases
    for _ in range(steps):
        s, c = sin_cos(theta)  # [batch, n] int8
        source = torch.cat([s, c])
        near = local.product(neighbours(source, grid, channels)).view(2 * batch, n)
        far = spread.product(_gathered(source, coupling, z_multipliers))
        total = (near * local_multipliers).add_(far * spread_multipliers).add_(half)
        u, w = total.bitwise_right_shift_(MULTIPLIER_BITS).to(torch.int32).add_(bias).tensor_split(2)
        pull = (c.to(torch.int32) * u).sub_(s.to(torch.int32) * w).add_(half_pull)
        theta = (theta + drive.omega).add_(pull.bitwise_right_shift_(PULL_BITS)).bitwise_and_(TURN - 1)
    return theta


def _gathered(source: Tensor, coupling: Coupling, multipliers: Tensor) -> Tensor:
    """z of sines and cosines, int8 `[2 batch, r]`."""
    z = (
        coupling.products[1]
        .product(source)
        .to(torch.int64)
        .mul_(multipliers)
        .add_(1 << (MULTIPLIER_BITS - 1))
    )
    return z.bitwise_right_shift_(MULTIPLIER_BITS).clamp_(-AMPLITUDE, AMPLITUDE).to(torch.int8)


def _counted(phases: Tensor, coupling: Coupling, drive: Drive, steps: int, leave: bool) -> Relaxed:
    """`relax_by_events` in PyTorch, where nothing is gained by them: step by step, and compared."""
    batch, n = phases.shape
    sent, spread, left = [], [], []
    waves = z = torch.empty(0)
    resting = torch.zeros(batch, dtype=torch.bool, device=phases.device)
    for step in range(steps):
        waves_now = torch.cat(sin_cos(phases))
        z_now = _gathered(waves_now, coupling, gather_multipliers(coupling))
        sent.append(_changed(waves, waves_now) if step else batch * n)
        spread.append(_changed(z, z_now) if step else batch * coupling.gather.shape[1])
        waves, z = waves_now, z_now
        after = relax_pytorch(phases, coupling, drive, 1)
        at_rest = (after == phases).all(1)
        left.append(int((at_rest & ~resting).sum()) if leave else 0)
        phases, resting = after, at_rest
    return Relaxed(phases, tuple(sent), tuple(spread), tuple(left))


def _changed(before: Tensor, now: Tensor) -> int:
    """In sines or cosines, which are the halves of both."""
    return int((before != now).view(2, -1, now.shape[1]).any(0).sum())


def _compiled_form(phases: Tensor) -> int | None:
    """The form in which compiled code relaxes such phases here; None: PyTorch does it."""
    return usual_form() if phases.device.type == "cpu" and not torch.compiler.is_compiling() else None


def neighbours(source: Tensor, grid: int, channels: int) -> Tensor:
    """What each cell feels, `[rows * cells, 5 C]` stencil-major, from `[rows, n]`; zeros beyond the edge."""
    rows = source.shape[0]
    padded = F.pad(source.view(rows, grid, grid, channels), (0, 0, 1, 1, 1, 1))
    views = [padded[:, 1 + y : 1 + y + grid, 1 + x : 1 + x + grid] for y, x in STENCIL]
    return torch.cat(views, -1).view(rows * grid * grid, len(STENCIL) * channels)
