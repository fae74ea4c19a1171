"""The integer core: the fast form is the reference, bit for bit, and the reference is the equation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.kernels.oscillator import (
    Drive,
    quantize_coupling,
    quantize_drive,
    relax,
    relax_reference,
    row_multipliers,
)
from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos, start_phases


def problem(n: int, batch: int, seed: int, *, gain: float = 2.0, pull: float = 4.0):
    g = torch.Generator().manual_seed(seed)
    coupling = torch.randn(n, n, generator=g, dtype=torch.float64) * gain * n**-0.5
    drive = torch.randn(batch, 3, n, generator=g, dtype=torch.float64) * pull
    phases = start_phases(np.arange(seed, seed + batch, dtype=np.uint64), n)
    return coupling, drive, phases


@given(
    n=st.sampled_from([8, 32, 64]),
    batch=st.integers(1, 9),
    steps=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    gain=st.floats(0.01, 30),
    pull=st.floats(0, 300),
)
@settings(max_examples=60, deadline=None)
def test_fast_equals_reference(n, batch, steps, seed, gain, pull):
    coupling, drive, phases = problem(n, batch, seed, gain=gain, pull=pull)
    quantized = quantize_coupling(coupling)
    multipliers = row_multipliers(quantized.row_scale, 0.1)
    arguments = (quantized.weights, multipliers, quantize_drive(drive, 0.1), steps)
    assert torch.equal(relax(phases, *arguments), relax_reference(phases, *arguments))


def test_the_largest_sums_do_not_overflow():
    """Every weight and every sine at its extreme, at a size where int32 sums are largest."""
    n = 1024
    weights = torch.full((n, n), 127, dtype=torch.int8)
    drive = Drive(*(torch.zeros(2, n, dtype=torch.int32) for _ in range(3)))
    phases = torch.full((2, n), TURN // 4, dtype=torch.int32)
    multipliers = row_multipliers(torch.full((n,), 1e-3), 0.1)
    arguments = (weights, multipliers, drive, 3)
    assert torch.equal(relax(phases, *arguments), relax_reference(phases, *arguments))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_phases_do_not_depend_on_the_batch(batch):
    coupling, drive, phases = problem(256, 64, seed=3)
    quantized = quantize_coupling(coupling)
    multipliers = row_multipliers(quantized.row_scale, 0.1)
    whole = relax(phases, quantized.weights, multipliers, quantize_drive(drive, 0.1), 10)
    parts = [
        relax(
            phases[i : i + batch],
            quantized.weights,
            multipliers,
            quantize_drive(drive[i : i + batch], 0.1),
            10,
        )
        for i in range(0, 64, batch)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_it_integrates_the_equation():
    """Against float64 Euler steps of the Kuramoto equation: within what the tables round."""
    n, steps, dt = 256, 10, 0.1
    coupling, drive, phases = problem(n, 16, seed=1, gain=1.0, pull=2.0)
    quantized = quantize_coupling(coupling)
    out = relax(
        phases, quantized.weights, row_multipliers(quantized.row_scale, dt), quantize_drive(drive, dt), steps
    )
    theta = phases.double() * 2 * torch.pi / TURN
    for _ in range(steps):
        s, c = torch.sin(theta), torch.cos(theta)
        a, b, omega = drive.unbind(1)
        theta = theta + dt * (omega + c * (s @ coupling.T + a) - s * (c @ coupling.T + b))
    error = torch.remainder(out.double() * 2 * torch.pi / TURN - theta + torch.pi, 2 * torch.pi) - torch.pi
    assert error.square().mean().sqrt() < 0.02


def test_tables_are_sine_and_cosine():
    phases = torch.arange(0, TURN, 7, dtype=torch.int32)
    s, c = sin_cos(phases)
    angle = phases.double() * 2 * torch.pi / TURN
    assert (s.double() / AMPLITUDE - torch.sin(angle)).abs().max() < 0.008
    assert (c.double() / AMPLITUDE - torch.cos(angle)).abs().max() < 0.008
    assert s.dtype == c.dtype == torch.int8


def test_noise_is_splitmix64_of_the_seed():
    """First output of the published generator for seed 1234567 is 6457827717110365317."""
    phases = start_phases(np.array([1234567], dtype=np.uint64), 8)[0]
    first = sum(int(p) << (16 * k) for k, p in enumerate(phases[:4]))
    second = sum(int(p) << (16 * k) for k, p in enumerate(phases[4:]))
    assert (first, second) == (6457827717110365317, 3203168211198807973)


def test_noise_is_uniform():
    phases = start_phases(np.arange(200, dtype=np.uint64), 512)
    counts = torch.bincount((phases.flatten() >> 12).long(), minlength=16).double()
    expected = phases.numel() / 16
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 45  # chi-squared, 15 degrees of freedom, p about 1e-4
