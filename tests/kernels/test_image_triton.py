"""Images of the GPU's kernels, interpreted, are those of the network's plain integers, pixel by pixel."""

import numpy as np
import pytest
import torch
from support.image_cases import drawn_by_kernels, extreme_painter, model_of, tokens_of, tokens_with
from support.interpreted import interpreted
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.workers.generators.registry import load_generator
from millijoule.workers.oscillators.draw import Drawing


def seeds_of(count):
    """Of all magnitudes: the noise is made of all 64 bits."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


@pytest.fixture(scope="module")
def painter():
    return painter_of(tiny_oscillators())


def assert_drawn_alike(painter, calls, **options):
    for call, found in zip(calls, interpreted(drawn_by_kernels, painter, calls, **options), strict=True):
        tokens, seeds, steps = call
        expected = Drawing(painter).draw(tokens, seeds, steps)
        assert expected.std() > 5  # there is something to compare
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("resident", [True, False], ids=["weights kept", "weights read again"])
def test_pixels_are_those_of_the_plain_network(painter, resident):
    """Batches of one, three and seventeen; one kernel draws them in turn, and nothing of one is left in the next."""
    calls = [(tokens_of(n, NOUNS, seed=n), seeds_of(n), None) for n in (17, 3, 1)]
    again = (tokens_of(17, NOUNS, seed=99), seeds_of(17), None)
    assert_drawn_alike(painter, [*calls, again], resident=resident)


@pytest.mark.parametrize("steps", [4, 23])
def test_other_steps_rescale_the_drives(painter, steps):
    assert_drawn_alike(painter, [(tokens_of(3, NOUNS), seeds_of(3), steps)])


@pytest.mark.parametrize("icons", [1, 2, 4])
def test_scenes_of_one_two_and_four_icons(painter, icons):
    noun = 1 + icons  # of the first nouns that the network knows
    tokens = tokens_with(icons)
    tokens[:, :-1:4] = np.where(tokens[:, :-1:4] > 0, noun, 0)
    assert (tokens[0, :-1:4] > 0).sum() == icons
    assert_drawn_alike(painter, [(tokens, seeds_of(1), None)])


@pytest.mark.parametrize("seed", [0, 1])
def test_numbers_of_all_magnitudes_wrap_and_round_alike(seed):
    painter = extreme_painter(seed)
    tokens = tokens_of(4, 5)
    assert_drawn_alike(painter, [(tokens, seeds_of(4), None), (tokens, seeds_of(4), 9)], blocks=5)


def test_the_shipped_model():
    painter = load_generator("default").drawing.painter
    assert_drawn_alike(painter, [(tokens_of(2, 1040), seeds_of(2), None)], blocks=1)


def test_an_icon_of_tokens_that_are_none_is_left_out(painter):
    """Whatever stands there, nothing beyond a table is read, and neighbours in the batch stay as they are."""
    tokens, seeds = tokens_of(4, NOUNS), seeds_of(4)
    plain = Drawing(painter).draw(tokens, seeds)
    for column, value in ((0, NOUNS + 1), (0, -(2**62)), (1, 11), (2, 4), (3, 10), (3, 2**40)):
        bad, left_out = tokens.copy(), tokens.copy()
        bad[1, column] = value
        left_out[1, :4] = 0
        (found,) = interpreted(drawn_by_kernels, painter, [(bad, seeds, None)])
        assert np.array_equal(found[1], Drawing(painter).draw(left_out, seeds)[1])
        assert np.array_equal(found[[0, 2, 3]], plain[[0, 2, 3]])


def test_windows_that_overlap_spoil_no_other_image(painter):
    tokens, seeds = tokens_of(3, NOUNS), seeds_of(3)
    plain = Drawing(painter).draw(tokens, seeds)
    tokens[1, :-1] = [1, 1, 3, 1] * 4
    (found,) = interpreted(drawn_by_kernels, painter, [(tokens, seeds, None)])
    assert np.array_equal(found[[0, 2]], plain[[0, 2]])


def test_no_images():
    painter = extreme_painter(0)
    (found,) = interpreted(
        drawn_by_kernels, painter, [(np.zeros((0, 17), np.int64), np.zeros(0, np.uint64), None)]
    )
    assert found.shape == (0, 64, 64, 3)


def test_what_does_not_fit_is_not_taken(painter):
    from millijoule.kernels.image_triton import ImageKernel

    model = model_of(painter)
    assert model.fits()
    wide = torch.zeros(6, 129, dtype=torch.int32)
    from dataclasses import replace

    too_large = replace(model, sizes=wide)
    assert not too_large.fits()
    with pytest.raises(ValueError, match="sizes"):
        ImageKernel(too_large, "cuda")
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs"):  # of a process that compiles kernels
        ImageKernel(model, "cpu")
