"""Dense coupling in integers: every form gives the bits of the plain equations, and these are near the real ones."""

import math

import numpy as np
import pytest
import torch

from millijoule.kernels import native_library
from millijoule.kernels.dense_coupling import (
    NativeCoupling,
    quantize_dense,
    relax,
    relax_reference,
    step_multipliers,
)
from millijoule.kernels.phase import TURN, random_phases


def made_up(n, m, classes=3, gain=1.0, seed=0):
    """K, omega, D, C and omega' as strong as Un-0 draws them at the start."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=random, dtype=torch.float64) * std

    coupling = normal(n, n, std=gain * n**-0.5).fill_diagonal_(0)
    between = normal(m, m, std=m**-0.5).fill_diagonal_(0)
    return coupling, normal(n), normal(classes, n, m, std=m**-0.5), between, normal(m)


def start(batch, n, seed=0):
    phases = random_phases(np.arange(seed, seed + batch, dtype=np.uint64), n + -n % 4)[:, :n]
    return (phases - TURN // 2).contiguous()


def float64_phases(phases, weights, classes, steps, horizon):
    """The equations with real numbers, in radians."""
    coupling, frequency, drive, between, driver_frequency = weights
    n, dt = len(frequency), horizon / steps
    theta, phi = (phases.double() * (2 * math.pi / TURN)).split([n, phases.shape[1] - n], 1)
    drives = torch.stack([drive[c] if c >= 0 else torch.zeros_like(drive[0]) for c in classes.tolist()])
    for _ in range(steps):
        others = torch.sin(theta[:, None, :] - theta[:, :, None])  # [batch, i, j]
        pull = (coupling * others).sum(2) + (drives * torch.sin(phi[:, None, :] - theta[:, :, None])).sum(2)
        driver_pull = (between * torch.sin(phi[:, None, :] - phi[:, :, None])).sum(2)
        theta, phi = theta + dt * (frequency + pull), phi + dt * (driver_frequency + driver_pull)
    return theta


@pytest.mark.parametrize("fine_every", [0, 1, 3])
@pytest.mark.parametrize(("n", "m", "steps"), [(64, 1, 10), (52, 8, 7), (130, 3, 1)])
def test_the_fast_form_gives_the_bits_of_the_plain_one(n, m, steps, fine_every):
    coupling = quantize_dense(*made_up(n, m), fine_every=fine_every)
    classes = torch.tensor([0, 2, -1, 1, 2])
    phases = start(5, n + m)
    expected = relax_reference(phases, coupling, classes, steps, 1.5)
    assert torch.equal(relax(phases, coupling, classes, steps, 1.5), expected)
    assert not torch.equal(expected, phases[:, :n])


@pytest.mark.parametrize("fine_every", [0, 3])
@pytest.mark.parametrize(("n", "m", "images"), [(64, 1, 1), (52, 8, 5), (130, 3, 29)])
def test_compiled_forms_give_the_bits_of_the_plain_equations(n, m, images, fine_every):
    if not native_library.forms_here():
        pytest.skip("the compiled kernels are missing")
    coupling = quantize_dense(*made_up(n, m), fine_every=fine_every)
    classes = torch.arange(images) % 4 - 1
    phases = start(images, n + m)
    expected = relax_reference(phases, coupling, classes, 4, 1.0)
    for form in native_library.forms_here():
        with native_library.only(form):
            compiled = NativeCoupling(coupling)
        for threads in (1, 3):
            found = compiled(phases, classes, 4, 1.0, threads=threads)
            assert torch.equal(found, expected), (form, threads)


def test_extreme_weights_give_the_same_bits_too():
    if not native_library.forms_here():
        pytest.skip("the compiled kernels are missing")
    weights = made_up(128, 2)
    weights[0].copy_(0.04 * torch.sign(weights[0]))  # every weight becomes 127 or -127
    coupling = quantize_dense(*weights, fine_every=1)
    assert set(coupling.coarse.unique().tolist()) == {-127, 0, 127}
    phases, classes = (
        torch.full((3, 130), 16384, dtype=torch.int32),
        torch.tensor([0, 1, 2]),
    )  # all sines are 1
    expected = relax_reference(phases, coupling, classes, 3, 0.1)
    for form in native_library.forms_here():
        with native_library.only(form):
            assert torch.equal(NativeCoupling(coupling)(phases, classes, 3, 0.1), expected), form


def test_batches_that_are_not_of_the_model_are_refused():
    if not native_library.forms_here():
        pytest.skip("the compiled kernels are missing")
    compiled = NativeCoupling(quantize_dense(*made_up(64, 2)))
    for phases, classes in (
        (start(2, 65), [0, 1]),
        (start(2, 66), [0]),
        (start(2, 66), [0, 3]),
        (start(1, 66), [-2]),
    ):
        with pytest.raises(ValueError, match=r"classes|phases"):
            compiled(phases, torch.tensor(classes), 3, 1.0)


@pytest.mark.parametrize(("fine_every", "within"), [(0, 0.012), (5, 0.004), (1, 0.003)])
def test_phases_are_near_those_of_real_numbers(fine_every, within):
    weights, classes, phases = made_up(256, 8), torch.tensor([0, 1, 2, -1]), start(4, 264)
    expected = float64_phases(phases, weights, classes, 10, 1.0)
    found = relax(phases, quantize_dense(*weights, fine_every=fine_every), classes, 10, 1.0)
    error = found.double() * (2 * math.pi / TURN) - expected
    assert error.pow(2).mean().sqrt() < within
    assert (expected - phases[:, :256] * (2 * math.pi / TURN)).abs().mean() > 0.5  # they did move


def test_an_image_does_not_depend_on_its_batch():
    coupling = quantize_dense(*made_up(64, 2), fine_every=2)
    classes, phases = torch.tensor([0, 1, 2, 0, 1]), start(5, 66)
    whole = relax(phases, coupling, classes, 5, 1.0)
    alone = [relax(phases[i : i + 1], coupling, classes[i : i + 1], 5, 1.0) for i in range(5)]
    assert torch.equal(torch.cat(alone), whole)


def test_turns_are_kept():
    weights = made_up(16, 1)
    weights[1].fill_(2 * math.pi * 40)
    found = relax(start(2, 17), quantize_dense(*weights), torch.tensor([0, 1]), 50, 1.0)
    assert (found > 38 * TURN).all()


@pytest.mark.parametrize(
    ("gain", "frequency", "words"), [(1e5, 1.0, "int32"), (1.0, 1e6, "turns"), (0.0, 5e4, "a step may pull")]
)
def test_what_int32_cannot_hold_is_refused(gain, frequency, words):
    weights = made_up(64, 1, gain=gain)
    weights[1].fill_(frequency)
    with pytest.raises(ValueError, match=words):
        step_multipliers(quantize_dense(*weights), 1, 1.0)
