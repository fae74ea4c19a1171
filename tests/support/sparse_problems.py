"""Small problems of sparsely coupled oscillators, some of whose oscillators rest."""

from __future__ import annotations

import numpy as np
import torch

from millijoule.kernels.oscillator import UNITS, Coupling, Drive, pull_unit, quantize_coupling
from millijoule.kernels.phase import TURN, random_phases

DT = 0.1


def problem(grid, channels, rank, batch, seed, *, gain=1.0, pull=4.0):
    """Float weights (L, V, U), a float drive `[batch, 3, n]` (a, b, omega in radians per unit of time), and start phases."""
    g = torch.Generator().manual_seed(seed)
    n = grid * grid * channels

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = (
        normal(channels, 5 * channels) * gain * (5 * channels) ** -0.5,
        normal(n, rank) * n**-0.5,
        normal(n, rank) * gain * rank**-0.5,
    )
    seeds = np.arange(seed, seed + batch, dtype=np.uint64)
    phases = random_phases(seeds, (n + 3) // 4 * 4)[:, :n].contiguous()
    return weights, normal(batch, 3, n) * pull, phases


def integers(drive):
    units = torch.tensor([pull_unit(DT), pull_unit(DT), DT * UNITS], dtype=torch.float64)
    a, b, omega = (torch.round(drive * units[:, None]).to(torch.int64) & 0xFFFFFFFF).unbind(1)
    return Drive(*((x - ((x >> 31) << 32)).to(torch.int32) for x in (a, b, omega)), DT)


def quantized(
    grid, channels, rank, batch, seed, *, gain, pull, quiet
) -> tuple[Coupling, Drive, torch.Tensor]:
    """`problem` in integers. With `quiet` the coupling is so weak that it moves nothing, and that share of the oscillators has no
    drive either; z change all the same. Without, every third image is in step and undriven: unless z are rounded too coarsely, its
    coupling keeps it so, and it rests between others that do not."""
    weights, drive, phases = problem(grid, channels, rank, batch, seed, gain=gain, pull=pull)
    coupling = quantize_coupling(*weights)
    if quiet:
        coupling = Coupling(
            coupling.local,
            coupling.local_scale * 1e-12,
            coupling.gather,
            coupling.gather_scale,
            coupling.spread,
            coupling.spread_scale * 1e-12,
        )
        g = torch.Generator().manual_seed(seed)
        drive = drive * (torch.rand(batch, 1, drive.shape[2], generator=g) >= quiet)
    else:
        drive[::3] = 0
        phases[::3] = 1234
    return coupling, integers(drive), phases


def settled(batch):
    """Oscillators that fall to the angle of their drive and rest there: of each image they start from another distance."""
    weights, _, _ = problem(3, 8, 4, batch, seed=2, gain=0.001)
    n = 72
    drive = torch.zeros(batch, 3, n, dtype=torch.float64)
    drive[:, 1] = -6  # towards half a turn, where what is left of a step rounds to nothing
    distance = 12000 * torch.arange(1, batch + 1) ** 2 // batch**2
    phases = (TURN // 2 + distance[:, None] + torch.zeros(n, dtype=torch.int64)).to(torch.int32)
    return quantize_coupling(*weights), integers(drive), phases
