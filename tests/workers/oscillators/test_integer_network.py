"""Integers against the network that was trained, and against a plain reading of the equations."""

import torch

from millijoule.kernels import int8_product
from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.integer_network import LOGIT_LIMIT, LOGIT_UNIT, SHARES
from millijoule.workers.scenes.scenes import SIZES


def every_icon(nouns):
    noun = torch.arange(nouns).repeat_interleave(len(SIZES))
    return noun, torch.arange(len(SIZES)).repeat(nouns)


def all_cells(icons, side):
    return torch.arange(icons).repeat_interleave(side * side), torch.arange(side * side).repeat(icons)


def drawn(painter, whole):
    noun, size = every_icon(painter.network.config.nouns)
    phases = painter.network.phases(noun, size + VARIANTS // 2 * whole)
    return painter.network.shares(phases, whole, *all_cells(len(noun), SIDES[whole]))


def test_shares_are_those_of_the_rounded_float_network(network, painter):
    for whole in (False, True):
        noun, size = every_icon(network.config.nouns)
        with torch.no_grad():
            expected = 255 * torch.sigmoid(network(noun, size, whole, rounded=True)).reshape(-1, 64)
        assert expected.std() > 20  # there is something to be wrong about
        found = drawn(painter, whole).float()
        assert (found - expected).abs().mean() < 5  # random weights are steep: 6 of a logit between cells
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.99


def test_a_sum_is_multiplied_rounded_and_cut_as_said(painter):
    layer = painter.network.near
    x = torch.randint(-127, 128, (50, layer.weights.shape[1]), dtype=torch.int8)
    sums = x.long() @ layer.weights.long().t() + layer.bias
    expected = [
        [max(0, min(127, (s * m + 2**23) >> 24)) for s, m in zip(row, layer.multiplier.tolist(), strict=True)]
        for row in sums.tolist()
    ]
    assert layer.activations(x).tolist() == expected
    assert (layer.activations(x) > 0).any()


def test_the_same_bits_in_both_forms_of_products(painter):
    for whole in (False, True):
        with int8_product.only("float32"):
            floats = drawn(painter, whole)
        with int8_product.only("int8"):
            assert torch.equal(drawn(painter, whole), floats)


def test_a_cell_does_not_depend_on_which_others_are_drawn(painter):
    network = painter.network
    noun, size = every_icon(network.config.nouns)
    phases = network.phases(noun, size + VARIANTS // 2)
    icon, cell = all_cells(len(noun), SIDES[True])
    together = network.shares(phases, True, icon, cell)
    some = torch.randperm(len(icon))[:100]
    assert torch.equal(network.shares(phases, True, icon[some], cell[some]), together[some])
    alone = network.shares(
        network.phases(noun[5:6], size[5:6] + VARIANTS // 2), True, icon[:64] * 0, cell[:64]
    )
    assert torch.equal(alone, together[5 * 64 : 6 * 64])


def test_more_and_shorter_steps_end_near_the_same_phases(painter):
    noun, size = every_icon(painter.network.config.nouns)
    few, many = (painter.network.phases(noun, size, steps) for steps in (None, 40))
    apart = ((few - many + 32768) % 65536 - 32768).abs().float()
    assert 0 < apart.mean() < 1500  # of 65,536


def test_the_table_of_shares_is_the_logistic_function():
    steps = torch.arange(-LOGIT_LIMIT, LOGIT_LIMIT).double()
    expected = 255 / (1 + torch.exp(-steps / LOGIT_UNIT))
    assert (SHARES.double() - expected).abs().max() <= 0.5 + 1e-9
    assert SHARES[0] == 0
    assert SHARES[-1] == 255
