"""The oscillator core in integers: phases relax under coupling and drive, the same bits everywhere.

One step, for oscillator i of an image (floor division by shifts, S and C are int8 sine and cosine):

    u_i = sum_j K_ij S_j          w_i = sum_j K_ij C_j                      exact, int32
    p_i = (u_i M_i + 2**23 >> 24) + A_i      q_i = (w_i M_i + 2**23 >> 24) + B_i
    theta_i <- theta_i + omega_i + (C_i p_i - S_i q_i + 2**10 >> 11)        modulo 65536

which is an Euler step of  d theta_i/dt = omega_i + sum_j k_ij sin(theta_j - theta_i) + a_i cos theta_i - b_i sin theta_i
(Kuramoto 1975, with a complex drive). K is int8, k_ij = s_i K_ij; M, A, B and omega hold everything real: scales,
the step length and phase units (`quantize_coupling`, `quantize_drive`). No sum is rounded before it is complete, so the
result does not depend on batch size, order, threads or device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos

#: Fraction bits of the row multipliers M.
MULTIPLIER_BITS = 24

#: Fraction bits of C p - S q, in phase units.
PULL_BITS = 11

#: Phase units per radian.
UNITS = TURN / (2 * math.pi)

#: |C p - S q| stays below 2**31 when |p| and |q| stay below this.
PULL_LIMIT = 2**23


@dataclass(frozen=True)
class Coupling:
    """`weights` int8 `[n, n]`, row i is what moves oscillator i; `row_scale` float64 `[n]`, k = row_scale * weights."""

    weights: Tensor
    row_scale: Tensor

    @property
    def n(self) -> int:
        return self.weights.shape[0]


@dataclass(frozen=True)
class Drive:
    """What a prompt does to its image's oscillators, per step: A, B in pull units and omega in phase units, int32 `[batch, n]`."""

    a: Tensor
    b: Tensor
    omega: Tensor


def quantize_coupling(coupling: Tensor) -> Coupling:
    """int8 rows with a scale each, from float `[n, n]`; a row's largest weight becomes 127."""
    coupling = coupling.double()
    scale = coupling.abs().amax(1).clamp_min(1e-12) / AMPLITUDE
    return Coupling(torch.round(coupling / scale[:, None]).to(torch.int8), scale)


def row_multipliers(row_scale: Tensor, dt: float) -> Tensor:
    """M for a step of `dt`, int64 `[n]`: from sums of K times int8 sines to pull units."""
    unit = dt * UNITS * 2**PULL_BITS / AMPLITUDE**2
    return torch.round(row_scale.double() * unit * 2**MULTIPLIER_BITS).to(torch.int64)


def quantize_drive(drive: Tensor, dt: float) -> Drive:
    """Integers for a step of `dt` from float64 `[batch, 3, n]` (a, b, omega in radians per unit of time)."""
    pull = torch.round(drive[:, :2] * (dt * UNITS * 2**PULL_BITS / AMPLITUDE))
    pull = pull.clamp(-PULL_LIMIT, PULL_LIMIT).to(torch.int32)
    omega = torch.round(drive[:, 2] * (dt * UNITS)).to(torch.int32)
    return Drive(pull[:, 0], pull[:, 1], omega)


def relax_reference(phases: Tensor, weights: Tensor, multipliers: Tensor, drive: Drive, steps: int) -> Tensor:
    """Run `steps` steps, as plainly as the equation is written.

    Args:
        phases: int32 `[batch, n]` in [0, 65536).
        weights: int8 `[n, n]`.
        multipliers: int64 `[n]`.
        drive: of `[batch, n]`.
        steps: at least 0.

    Returns:
        Final phases, int32 `[batch, n]`.
    """
    theta = phases.to(torch.int64)
    k = weights.to(torch.int64)
    half = 1 << (MULTIPLIER_BITS - 1)
    for _ in range(steps):
        s, c = (x.to(torch.int64) for x in sin_cos(theta))
        u = (k[None] * s[:, None, :]).sum(-1)  # [batch, n]
        w = (k[None] * c[:, None, :]).sum(-1)
        p = ((u * multipliers + half) >> MULTIPLIER_BITS) + drive.a
        q = ((w * multipliers + half) >> MULTIPLIER_BITS) + drive.b
        pull = (c * p - s * q + (1 << (PULL_BITS - 1))) >> PULL_BITS
        theta = (theta + drive.omega + pull) % TURN
    return theta.to(torch.int32)


def relax(phases: Tensor, weights: Tensor, multipliers: Tensor, drive: Drive, steps: int) -> Tensor:
    """`relax_reference`, fast: both sums in one int8 matrix product. Same arguments, same bits."""
    batch = phases.shape[0]
    transposed = weights.t().contiguous()  # [n, n] int8, for [2 * batch, n] @ [n, n]
    half = 1 << (MULTIPLIER_BITS - 1)
    half_pull = 1 << (PULL_BITS - 1)
    ab = torch.cat([drive.a, drive.b])  # [2 * batch, n]
    theta = phases
    for _ in range(steps):
        s, c = sin_cos(theta)  # [batch, n] int8
        sums = _int8_product(torch.cat([s, c]), transposed)  # [2 * batch, n] int32
        pulls = sums.to(torch.int64).mul_(multipliers).add_(half).bitwise_right_shift_(MULTIPLIER_BITS)
        p, q = pulls.to(torch.int32).add_(ab).split(batch)
        pull = (c.to(torch.int32) * p).sub_(s.to(torch.int32) * q).add_(half_pull)
        theta = (theta + drive.omega).add_(pull.bitwise_right_shift_(PULL_BITS)).bitwise_and_(TURN - 1)
    return theta


def _int8_product(left: Tensor, right: Tensor) -> Tensor:
    """int8 `[m, k]` @ int8 `[k, n]` -> int32 `[m, n]`, exact."""
    m = left.shape[0]
    if left.is_cuda and (m <= 16 or m % 8):  # what cuBLAS takes
        left = F.pad(left, (0, 0, 0, max(24, -(-m // 8) * 8) - m))
    return torch._int_mm(left, right)[:m]
