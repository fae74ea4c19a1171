"""Phases of the GPU's kernels, interpreted, are those of the plain equations in integers."""

import numpy as np
import pytest
import torch
from support.dense_cases import relaxed_by_kernels, relaxed_on_the_chip
from support.interpreted import interpreted

from millijoule.kernels.dense_coupling import StepsTooLong, quantize_dense, relax_reference
from millijoule.kernels.gpu.dense_coupling import DenseKernel, may_stay
from millijoule.kernels.phase import TURN, random_phases


def made_up(n, m, classes=3, seed=0, gain=1.5):
    """Random weights, as strong as a trained network's: K, omega, D, C and omega'."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=random, dtype=torch.float64) * std

    return (
        normal(n, n, std=gain * n**-0.5).fill_diagonal_(0),
        normal(n),
        normal(classes, n, m, std=m**-0.5),
        normal(m, m, std=m**-0.5),
        normal(m),
    )


def start(batch, n):
    """Some turns away from 0, in both directions."""
    phases = random_phases(np.arange(batch, dtype=np.uint64) + np.uint64(2**63), n + -n % 4)[:, :n]
    return (phases + TURN * torch.arange(-2, batch - 2)[:, None]).to(torch.int32)


@pytest.mark.parametrize("fine_every", [0, 3])
def test_phases_are_those_of_the_plain_equations(fine_every):
    """Of one image and of more, with classes and without, n not a multiple of anything; nothing of a call is left in the next."""
    n, m = 130, 3
    coupling = quantize_dense(*made_up(n, m), fine_every=fine_every)
    calls = [
        (start(batch, n + m), torch.arange(batch) % 4 - 1, steps, horizon)
        for batch, steps, horizon in ((5, 4, 1.0), (1, 4, 1.0), (3, 2, 0.5))
    ]
    for call, found in zip(calls, interpreted(relaxed_by_kernels, coupling, calls), strict=True):
        assert torch.equal(found, relax_reference(*call[:1], coupling, *call[1:]))
        assert not torch.equal(found, call[0][:, :n])


def test_a_batch_of_more_than_one_block():
    n, m, batch = 256, 1, 19
    coupling = quantize_dense(*made_up(n, m))
    call = (start(batch, n + m), torch.arange(batch) % 4 - 1, 2, 1.0)
    (found,) = interpreted(relaxed_by_kernels, coupling, [call])
    assert torch.equal(found, relax_reference(call[0], coupling, *call[1:]))


def test_extreme_weights_and_strong_drivers():
    weights = list(made_up(128, 8))
    weights[0] = 0.04 * torch.sign(weights[0])  # every weight becomes 127 or -127
    weights[2], weights[3] = 30 * weights[2], 20 * weights[3]
    coupling = quantize_dense(*weights, fine_every=1)
    phases = torch.full((3, 136), TURN // 4, dtype=torch.int32)  # all sines are 1
    call = (phases, torch.tensor([0, 1, 2]), 3, 0.1)
    (found,) = interpreted(relaxed_by_kernels, coupling, [call])
    assert torch.equal(found, relax_reference(phases, coupling, *call[1:]))


@pytest.mark.parametrize(
    ("tile", "together"), [((128, 1, 8), 4), ((32, 2, 4), 1)], ids=["one block", "several, step by step"]
)
def test_k_on_the_chip_changes_nothing(tile, together):
    """All of it but the wait of blocks for each other, which nothing but a GPU can run."""
    n, m = 128, 3
    coupling = quantize_dense(*made_up(n, m))
    call = (start(20, n + m), torch.arange(20) % 4 - 1, 4, 1.0)  # more than run at once, in groups of eight
    found = interpreted(relaxed_on_the_chip, coupling, call, tile, together)
    assert torch.equal(found, relax_reference(call[0], coupling, *call[1:]))


def test_batches_that_are_not_of_the_model_are_refused():
    coupling = quantize_dense(*made_up(64, 2))
    for phases, classes in (
        (start(2, 65), [0, 1]),
        (start(2, 66), [0]),
        (start(2, 66), [0, 3]),
        (start(1, 66), [-2]),
    ):
        with pytest.raises(ValueError, match=r"classes|phases"):
            interpreted(relaxed_by_kernels, coupling, [(phases, torch.tensor(classes), 3, 1.0)])
    with pytest.raises(StepsTooLong):
        interpreted(relaxed_by_kernels, coupling, [(start(1, 66), torch.tensor([0]), 1, 1e9)])
    (found,) = interpreted(relaxed_by_kernels, coupling, [(start(0, 66), torch.tensor([]).long(), 3, 1.0)])
    assert found.shape == (0, 64)


def test_couplings_that_it_does_not_take():
    with pytest.raises(ValueError, match="65 drivers"):
        DenseKernel(quantize_dense(*made_up(64, 65)), "cuda")
    small = quantize_dense(*made_up(64, 2))
    assert not may_stay(small)
    with pytest.raises(ValueError, match="stay on the chip"):
        DenseKernel(small, "cuda", resident=True)
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs"):  # of a process that compiles kernels
        DenseKernel(small, "cpu")
