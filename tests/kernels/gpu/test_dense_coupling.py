"""Phases of the GPU's kernels, interpreted, are those of the plain equations in integers."""

import numpy as np
import pytest
import torch
from support.dense_cases import relaxed_by_kernels, relaxed_on_the_chip
from support.interpreted import interpreted

from millijoule.kernels.dense_coupling import StepsTooLong, quantize_dense, relax_reference
from millijoule.kernels.gpu.dense_coupling import DenseKernel, may_stay
from millijoule.kernels.gpu.dense_weights import filled_blocks, pack_weights
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


def without_blocks(weights, *empty):
    """K without some blocks, (row, column) each: of 64 targets by 128 sources."""
    k = weights[0].clone()
    for row, column in empty:
        k[64 * row : 64 * (row + 1), 128 * column : 128 * (column + 1)] = 0
    return (k, *weights[1:])


#: Of 200 oscillators, padded to 256: the last row of blocks has nothing in it, the third nothing in its first.
EMPTY = ((2, 0), (3, 0), (3, 1))


@pytest.mark.parametrize("fine_every", [0, 2])
def test_blocks_that_are_zero_are_neither_stored_nor_missed(fine_every):
    n, m = 200, 2
    coupling = quantize_dense(*without_blocks(made_up(n, m), *EMPTY), fine_every=fine_every)
    packed = pack_weights(coupling.coarse, "cpu", sparse=True)
    assert packed.values.shape == (5, 64, 128)
    assert packed.starts.tolist() == [0, 2, 4, 5, 5]
    assert packed.columns.tolist() == [0, 1, 0, 1, 1]
    call = (start(3, n + m), torch.arange(3) - 1, 3, 1.0)
    found = interpreted(relaxed_by_kernels, coupling, [call])
    assert torch.equal(found[0], relax_reference(call[0], coupling, *call[1:]))
    assert not torch.equal(found[0], relax_reference(call[0], quantize_dense(*made_up(n, m)), *call[1:]))


def test_the_block_sparse_form_may_be_asked_for():
    """Of a K that has something everywhere, and of one that has nothing."""
    for weights in (
        made_up(130, 2),
        without_blocks(made_up(130, 2), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)),
    ):
        coupling = quantize_dense(*weights)
        call = (start(1, 132), torch.tensor([1]), 2, 1.0)
        (found,) = interpreted(relaxed_by_kernels, coupling, [call], sparse=True)
        assert torch.equal(found, relax_reference(call[0], coupling, *call[1:]))


def test_blocks_on_the_chip_change_nothing():
    """Rows with two blocks, one and none, step by step: nothing but a GPU can run blocks that wait for each other."""
    n, m = 256, 2
    coupling = quantize_dense(*without_blocks(made_up(n, m), *EMPTY))
    call = (start(9, n + m), torch.arange(9) % 4 - 1, 3, 1.0)
    found = interpreted(relaxed_on_the_chip, coupling, call, (2, 4), 1)
    assert torch.equal(found, relax_reference(call[0], coupling, *call[1:]))


def test_which_k_is_block_sparse_and_which_stays_on_the_chip():
    """Said of blocks of 64 targets by 128 sources that have any weight in them."""
    assert filled_blocks(torch.eye(256, dtype=torch.int8)) == (0.5, 1)
    assert filled_blocks(torch.ones(100, 100, dtype=torch.int8)) == (1.0, 1)
    assert filled_blocks(torch.zeros(256, 256, dtype=torch.int8)) == (0.0, 0)

    def banded(n, blocks):
        k = torch.zeros(n, n)
        k[:, : 128 * blocks] = 1.0
        return quantize_dense(k, *(torch.zeros(s) for s in ((n,), (1, n, 1), (1, 1), (1,))))

    assert may_stay(banded(4096, 16))
    assert not may_stay(banded(4096, 17))
    assert not may_stay(banded(2048 + 128, 1))


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
