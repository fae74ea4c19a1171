"""The integer core: the fast form is the reference, bit for bit, and the reference is the equation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sparse_problems import DT, problem

from millijoule.kernels.int8_product import FORMS, only
from millijoule.kernels.oscillator import (
    STENCIL,
    UNITS,
    Coupling,
    Drive,
    dense_local,
    pull_unit,
    quantize_coupling,
    relax,
    relax_pytorch,
    relax_reference,
)
from millijoule.kernels.phase import AMPLITUDE, TURN, random_phases, sin_cos


def quantized(weights, drive):
    units = torch.tensor([pull_unit(DT), pull_unit(DT), DT * UNITS], dtype=torch.float64)
    a, b, omega = torch.round(drive * units[:, None]).to(torch.int32).unbind(1)
    return quantize_coupling(*weights), Drive(a, b, omega, DT)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@given(
    grid=st.integers(1, 5),
    channels=st.sampled_from([4, 8, 12]),
    rank=st.integers(1, 9),
    batch=st.integers(1, 6),
    steps=st.integers(0, 12),
    seed=st.integers(0, 2**31),
    gain=st.floats(0.01, 30),
    pull=st.floats(0, 3000),  # int32 wraps
)
@settings(max_examples=60, deadline=None)
def test_fast_equals_reference(form, grid, channels, rank, batch, steps, seed, gain, pull):
    weights, drive, phases = problem(grid, channels, rank, batch, seed, gain=gain, pull=pull)
    coupling, drive = quantized(weights, drive)
    with only(form):
        fast = relax_pytorch(phases, coupling, drive, steps)
    assert torch.equal(fast, relax_reference(phases, coupling, drive, steps))


@pytest.mark.parametrize("form", FORMS)
def test_the_largest_sums_do_not_overflow(form):
    """Every weight and sine at its extreme, at a size beyond the shipped model's."""
    channels, grid, rank = 64, 8, 64
    n = grid * grid * channels

    def full(*shape):
        return torch.full(shape, 127, dtype=torch.int8)

    def scale(*shape):
        return torch.full(shape, 1e-3, dtype=torch.float64)

    coupling = Coupling(
        full(channels, 5 * channels), scale(channels), full(n, rank), scale(rank), full(n, rank), scale(n)
    )
    none = torch.zeros(2, n, dtype=torch.int32)
    drive = Drive(none, none, none, DT)
    phases = torch.full((2, n), TURN // 4, dtype=torch.int32)
    with only(form):
        fast = relax_pytorch(phases, coupling, drive, 3)
    assert torch.equal(fast, relax_reference(phases, coupling, drive, 3))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_phases_do_not_depend_on_the_batch(batch):
    weights, drive, phases = problem(4, 16, 8, 64, seed=3)
    coupling, drive = quantized(weights, drive)
    whole = relax(phases, coupling, drive, 10)
    parts = [
        relax(
            phases[i : i + batch],
            coupling,
            Drive(*(x[i : i + batch] for x in (drive.a, drive.b, drive.omega)), DT),
            10,
        )
        for i in range(0, 64, batch)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_it_integrates_the_equation():
    """Against float64 Euler steps of the Kuramoto equation: within what tables and int8 weights round."""
    steps = 10
    (local, gather, spread), drive, phases = problem(4, 16, 8, 16, seed=1, pull=2.0)
    coupling, integers = quantized((local, gather, spread), drive)
    out = relax(phases, coupling, integers, steps)
    matrix = dense_local(local, 4) + spread @ gather.T
    theta = phases.double() * 2 * torch.pi / TURN
    for _ in range(steps):
        s, c = torch.sin(theta), torch.cos(theta)
        a, b, omega = drive.unbind(1)
        from_sin, from_cos = (x @ matrix.T for x in (s, c))
        theta = theta + DT * (omega + c * (from_sin + a) - s * (from_cos + b))
    error = torch.remainder(out.double() * 2 * torch.pi / TURN - theta + torch.pi, 2 * torch.pi) - torch.pi
    assert error.square().mean().sqrt() < 0.02


def test_cells_feel_their_neighbours_alone():
    """A coupling of ones per stencil direction moves exactly the cells that direction names."""
    for k, (down, right) in enumerate(STENCIL):
        local = torch.zeros(4, 20, dtype=torch.float64)
        local[:, 4 * k : 4 * k + 4] = 1
        dense = dense_local(local, 3).reshape(3, 3, 4, 3, 3, 4)[:, :, 0, :, :, 0]
        for y in range(3):
            for x in range(3):
                expected = torch.zeros(3, 3, dtype=torch.float64)
                if 0 <= y + down < 3 and 0 <= x + right < 3:
                    expected[y + down, x + right] = 1
                assert torch.equal(dense[y, x], expected)


def test_tables_are_sine_and_cosine():
    phases = torch.arange(0, TURN, 7, dtype=torch.int32)
    s, c = sin_cos(phases)
    angle = phases.double() * 2 * torch.pi / TURN
    assert (s.double() / AMPLITUDE - torch.sin(angle)).abs().max() < 0.008
    assert (c.double() / AMPLITUDE - torch.cos(angle)).abs().max() < 0.008
    assert s.dtype == c.dtype == torch.int8


def test_noise_is_splitmix64_of_the_seed():
    """First output of the published generator for seed 1234567 is 6457827717110365317."""
    phases = random_phases(np.array([1234567], dtype=np.uint64), 8)[0]
    first = sum(int(p) << (16 * k) for k, p in enumerate(phases[:4]))
    second = sum(int(p) << (16 * k) for k, p in enumerate(phases[4:]))
    assert (first, second) == (6457827717110365317, 3203168211198807973)


def test_noise_is_uniform():
    phases = random_phases(np.arange(200, dtype=np.uint64), 512)
    counts = torch.bincount((phases.flatten() >> 12).long(), minlength=16).double()
    expected = phases.numel() / 16
    assert (
        (counts - expected) ** 2 / expected
    ).sum() < 45  # chi-squared, 15 degrees of freedom, p about 1e-4
