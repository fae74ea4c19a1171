"""Images of the GPU's decoder, interpreted, are those of the plain integers, bit for bit."""

from dataclasses import replace

import pytest
import torch
from support.decoder_cases import decoded_by_kernel, in_steps, made_up_convolutions, made_up_features
from support.interpreted import interpreted

from millijoule.kernels.gpu.upsampling_decoder import TOO_LARGE, DecoderKernel, misfit
from millijoule.kernels.upsampling_decoder import (
    IntegerDecoder,
    calibrated_ranges,
    decode,
    quantize_decoder,
)


def made_up(channels, blocks):
    convolutions = made_up_convolutions(channels, blocks)
    x = in_steps(made_up_features(4, channels, seed=3))
    return quantize_decoder(convolutions, calibrated_ranges(convolutions, x))


@pytest.mark.parametrize(
    ("channels", "blocks", "tiles"),
    [
        (6, 1, {}),
        (80, 2, {}),
        (40, 1, {"PIXELS": 32, "OUTPUTS": 16}),
    ],
    ids=["few channels", "more than one tile of outputs", "small tiles"],
)
def test_images_are_those_of_the_plain_integers(channels, blocks, tiles):
    """Whose number fills no tile; nothing of a call is left in the next."""
    decoder = made_up(channels, blocks)
    batches = [in_steps(made_up_features(images, channels, seed=images)) for images in (3, 1)]
    for x, found in zip(batches, interpreted(decoded_by_kernel, decoder, batches, **tiles), strict=True):
        assert torch.equal(found, decode(x, decoder))
        assert found.float().std() > 5


def test_activations_beyond_their_range_saturate_alike():
    decoder = quantize_decoder(made_up_convolutions(32, 1), [0.3, 0.3])
    x = in_steps(made_up_features(2, 32))
    (found,) = interpreted(decoded_by_kernel, decoder, [x])
    assert torch.equal(found, decode(x, decoder))


def largest(decoder, *values):
    """The same with these weights in the first row of the first layer."""
    weights = decoder.layers[0].weights.clone()
    weights[0, 0] //= 2
    for i, value in enumerate(values):
        weights[0, 0, 0, 0, i] = value
    return IntegerDecoder((replace(decoder.layers[0], weights=weights), *decoder.layers[1:]))


@pytest.mark.parametrize("weight", [32767, -32768, TOO_LARGE, TOO_LARGE - 1, -TOO_LARGE])
def test_the_largest_weights_of_either_sign(weight):
    decoder = largest(made_up(6, 1), weight)
    assert misfit(decoder) is None
    x = torch.full((1, 6, 4, 4), 2047, dtype=torch.int16)
    x[:, :, ::2] = -2047
    (found,) = interpreted(decoded_by_kernel, decoder, [x])
    assert torch.equal(found, decode(x, decoder))


def test_what_it_does_not_take():
    decoder = made_up(6, 1)
    both = largest(decoder, 32767, -32767)
    assert "of both signs" in misfit(both)
    with pytest.raises(ValueError, match="of both signs"):
        DecoderKernel(both, "cuda")
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs"):  # of a process that compiles kernels
        DecoderKernel(decoder, "cpu")
    with pytest.raises(ValueError, match="6 channels"):
        interpreted(decoded_by_kernel, decoder, [in_steps(made_up_features(1, 7))])
    (found,) = interpreted(decoded_by_kernel, decoder, [torch.zeros(0, 6, 4, 4, dtype=torch.int16)])
    assert found.shape == (0, 8, 8, 3)
