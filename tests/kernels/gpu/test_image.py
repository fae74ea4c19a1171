"""Images of the GPU's kernels, interpreted, are those of the network's plain integers, pixel by pixel."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.image_cases import drawn_by_kernels, drawn_on_device, extreme_painter, tokens_of, tokens_with
from support.interpreted import interpreted
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.kernels.gpu.image import ImageKernel, misfit
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.model_file import load_model


def seeds_of(count):
    """Of all magnitudes: the noise is made of all 64 bits."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@pytest.fixture(scope="module")
def painter():
    return painter_of(tiny_oscillators())


def reference(painter):
    return Drawing(painter, engine=EagerEngine())


def assert_drawn_alike(painter, calls, **options):
    for call, found in zip(calls, interpreted(drawn_by_kernels, painter, calls, **options), strict=True):
        tokens, seeds, steps = call
        expected = reference(painter).draw(tokens, seeds, steps)
        assert expected.std() > 5  # there is something to compare
        assert np.array_equal(found, expected)


def test_pixels_are_those_of_the_plain_network(painter):
    """Batches of one, three and seventeen; one kernel draws them in turn, and nothing of one is left in the next."""
    calls = [(tokens_of(n, NOUNS, seed=n), seeds_of(n), None) for n in (17, 3, 1)]
    assert_drawn_alike(painter, [*calls, (tokens_of(3, NOUNS, seed=99), seeds_of(3), None)])


def test_other_steps_rescale_the_drives(painter):
    """Fewer and longer, more and shorter; weights are read again for every tile here."""
    calls = [(tokens_of(3, NOUNS), seeds_of(3), steps) for steps in (4, 23)]
    assert_drawn_alike(painter, calls, resident=False)


def test_scenes_of_one_two_and_four_icons(painter):
    rows = [tokens_with(icons, noun=1 + icons) for icons in (1, 2, 4)]
    assert [(row[0, :-1:4] > 0).sum() for row in rows] == [1, 2, 4]
    assert_drawn_alike(painter, [(np.concatenate(rows), seeds_of(3), None)])


@pytest.mark.parametrize("resident", [True, False], ids=["weights kept", "weights read again"])
def test_numbers_of_all_magnitudes_wrap_and_round_alike(resident):
    painter = extreme_painter(int(resident))
    calls = [(tokens_of(4, 6), seeds_of(4), steps) for steps in (None, 9)]
    assert_drawn_alike(painter, calls, resident=resident, blocks=5)


def test_the_shipped_model():
    painter, _ = load_model(PACKAGED["default"])
    assert_drawn_alike(painter, [(tokens_of(2, 1040), seeds_of(2), None)], blocks=1)


def assert_coupling_matters(painter, calls):
    """To what is drawn, or nothing would be tried."""
    alone = replace(painter, network=painter.network.without_coupling())
    for call in calls:
        assert not np.array_equal(reference(alone).draw(*call), reference(painter).draw(*call))


def test_coupled_oscillators():
    """In steps of another length than their model's; of more icons than a block takes."""
    painter = painter_of(tiny_oscillators("trained"))
    calls = [(np.concatenate([tokens_with(4, noun=2)] * 5), seeds_of(5), 5)]
    assert_coupling_matters(painter, calls)
    assert_drawn_alike(painter, calls, blocks=1)


def test_coupling_of_all_magnitudes_wraps_and_rounds_alike():
    """Its multipliers are more than int32 holds."""
    painter = extreme_painter(1, coupled=True)
    calls = [(tokens_of(2, 6), seeds_of(2), 4)]
    assert_coupling_matters(painter, calls)
    assert_drawn_alike(painter, calls, blocks=1)


def test_the_shipped_coupled_model():
    painter, _ = load_model(PACKAGED["coupled"])
    calls = [(tokens_of(1, 1040), seeds_of(1), None)]
    assert_coupling_matters(painter, calls)
    assert_drawn_alike(painter, calls, blocks=1)


def test_an_icon_of_tokens_that_are_none_is_left_out(painter):
    """Whatever stands there, nothing beyond a table is read, and neighbours in the batch stay as they are."""
    wrong = [(0, NOUNS + 1), (0, -(2**62)), (1, 11), (2, 4), (3, 10), (3, 2**40)]
    tokens, seeds = tokens_of(2 * len(wrong), NOUNS), seeds_of(2 * len(wrong))
    left_out = tokens.copy()
    for i, (column, value) in enumerate(wrong):
        tokens[2 * i, column] = value
        left_out[2 * i, :4] = 0
    found = interpreted(drawn_on_device, painter, tokens, seeds)
    assert np.array_equal(found, reference(painter).draw(left_out, seeds))


def test_windows_that_overlap_spoil_no_other_image(painter):
    tokens, seeds = tokens_of(3, NOUNS), seeds_of(3)
    plain = reference(painter).draw(tokens, seeds)
    tokens[1, :-1] = [1, 1, 3, 1] * 4
    found = interpreted(drawn_on_device, painter, tokens, seeds)
    assert np.array_equal(found[[0, 2]], plain[[0, 2]])


def test_no_images(painter):
    (found,) = interpreted(
        drawn_by_kernels, painter, [(np.zeros((0, 17), np.int64), np.zeros(0, np.uint64), None)]
    )
    assert found.shape == (0, 64, 64, 3)


def test_tokens_and_seeds_of_another_form_are_refused(painter):
    tokens, seeds = tokens_of(2, NOUNS), seeds_of(2)
    for column, value in ((0, NOUNS + 1), (1, 11), (2, 4), (3, 0), (16, 5), (16, -1)):
        bad = tokens.copy()
        bad[1, column] = value
        with pytest.raises(ValueError, match="no words for"):
            interpreted(drawn_by_kernels, painter, [(bad, seeds, None)])
    for call in ((tokens[:, :-1], seeds, None), (tokens, seeds[:1], None), (tokens, seeds, -1)):
        with pytest.raises(ValueError, match="tokens"):
            interpreted(drawn_by_kernels, painter, [call])


def test_a_model_that_does_not_fit_is_named_and_refused(painter):
    weights = painter.kernel_weights()
    assert misfit(weights) is None
    coupled = painter_of(tiny_oscillators("trained")).kernel_weights()
    assert misfit(coupled) is None
    wide = replace(coupled.coupling, gather=torch.zeros(128, 65, dtype=torch.int8))
    assert misfit(replace(coupled, coupling=wide)) == "rank 65 is more than 64"
    too_large = replace(weights, codes=torch.zeros(7, 129, dtype=torch.int8))
    assert misfit(too_large) == "code 129 is more than 128"
    share = (*weights.layers["share"][:2], torch.full((64,), 2**31))
    assert "int32" in misfit(replace(weights, layers={**weights.layers, "share": share}))
    with pytest.raises(ValueError, match="code 129"):
        ImageKernel(too_large, "cuda")
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs"):  # of a process that compiles kernels
        ImageKernel(weights, "cpu")
