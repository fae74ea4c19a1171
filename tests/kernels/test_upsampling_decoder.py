"""The integer decoder: folded kernels are the unfolded ones, every form has the same bits, and pixels are near those of floats."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.decoder_cases import in_steps
from support.decoder_cases import made_up_convolutions as made_up
from support.decoder_cases import made_up_features as features

from millijoule.kernels import native_library
from millijoule.kernels.upsampling_decoder import (
    NativeDecoder,
    calibrated_ranges,
    decode,
    folded,
    quantize_decoder,
)


def float_images(x, convolutions):
    x = x.double()
    for number, (weights, bias) in enumerate(convolutions[:-1]):
        if number % 2 == 0:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = F.conv2d(x, weights.double(), bias.double(), padding=1)
        x = torch.where(x > 0, x, 0.2 * x)
    x = F.conv2d(x, *(part.double() for part in convolutions[-1]), padding=1)
    return ((torch.tanh(x).permute(0, 2, 3, 1) + 1) * 127.5).numpy()


def plain_images(x, decoder):
    """The equation in numpy: int64 sums place by place, then float32 by float32."""
    x = x.numpy().astype(np.int64)
    for layer in decoder.layers:
        weights, (height, width) = layer.weights.numpy().astype(np.int64), x.shape[2:]
        twice = 2 if len(weights) == 4 else 1
        last = layer is decoder.layers[-1]
        rows = 3 if last else weights.shape[1]
        v = np.zeros((len(x), rows, height * twice, width * twice), np.float32)
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        for parity, kernel in enumerate(weights):
            if last:  # the first column's rows are the plain kernel
                kernel = kernel[:3, :, :3]
            down, right = parity // 2, parity % 2
            bias, scale = layer.bias[parity].numpy(), layer.multiplier[parity].numpy()
            for i in range(height):
                for j in range(width):
                    at = padded[:, :, i + down :, j + right :][:, :, : kernel.shape[1], : kernel.shape[2]]
                    sums = np.einsum("bcyx,oyxc->bo", at, kernel) + bias[:rows]
                    assert np.abs(sums).max() < 2**31
                    scaled = sums.astype(np.int32).astype(np.float32) * scale[:rows]
                    v[:, :, i * twice + down * (twice - 1), j * twice + right * (twice - 1)] = scaled
        if last:
            steps = np.rint(np.clip(v, -4096, 4096)) / 1024
            return np.round((np.tanh(steps) + 1) * 127.5).transpose(0, 2, 3, 1)
        x = np.rint(np.clip(np.maximum(v, v * np.float32(0.2)), -2047, 2047)).astype(np.int64)
    raise AssertionError("no last layer")


def test_a_folded_kernel_is_an_upsampling_and_the_kernel():
    weights, x = torch.randn(5, 3, 3, 3).double(), torch.randn(2, 3, 4, 6).double()
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weights, padding=1)
    for parity, kernel in enumerate(folded(weights)):
        down, right = divmod(parity, 2)
        found = F.conv2d(F.pad(x, (1 - right, right, 1 - down, down)), kernel)
        assert torch.allclose(found, expected[:, :, down::2, right::2])


@pytest.mark.parametrize(("channels", "blocks"), [(6, 1), (33, 2)])
def test_the_fast_form_is_the_plain_equation(channels, blocks):
    convolutions, x = made_up(channels, blocks), in_steps(features(2, channels))
    decoder = quantize_decoder(convolutions, calibrated_ranges(convolutions, x))
    assert np.array_equal(decode(x, decoder).numpy(), plain_images(x, decoder))


@pytest.mark.parametrize(("channels", "blocks", "images"), [(6, 1, 1), (67, 3, 5), (128, 2, 19)])
def test_compiled_forms_have_the_same_bits(channels, blocks, images):
    if not native_library.forms_here():
        pytest.skip("the compiled kernels are missing")
    convolutions, x = made_up(channels, blocks), in_steps(features(images, channels))
    decoder = quantize_decoder(convolutions, calibrated_ranges(convolutions, x[:4]))
    expected = decode(x, decoder)
    for form in native_library.forms_here():
        with native_library.only(form):
            compiled = NativeDecoder(decoder)
        assert torch.equal(compiled(x), expected), form
        assert torch.equal(compiled(x, threads=3), expected), form


def test_pixels_are_within_two_levels_of_float64():
    convolutions, x = made_up(128, 3), features(8, 128)
    decoder = quantize_decoder(convolutions, calibrated_ranges(convolutions, in_steps(x[:4])))
    expected = float_images(x, convolutions)
    error = np.abs(decode(in_steps(x), decoder).numpy() - expected)
    assert (error <= 2).mean() > 0.999
    assert error.mean() < 0.3  # rounding alone makes a quarter
    assert expected.std() > 30


def test_activations_beyond_their_range_saturate_alike():
    convolutions, x = made_up(32, 1), in_steps(features(3, 32))
    decoder = quantize_decoder(convolutions, [0.3, 0.3])
    expected = decode(x, decoder)
    assert np.array_equal(expected.numpy(), plain_images(x, decoder))
    for form in native_library.forms_here():
        with native_library.only(form):
            assert torch.equal(NativeDecoder(decoder)(x), expected), form


@pytest.mark.parametrize(
    ("change", "ranges", "words"),
    [
        (None, [1.0], "1 activation ranges for 3 layers"),
        (None, [1.0, math.nan], "nan"),
        (None, [-1.0, 1.0], "-1.0"),
        ("bias", [1.0, 1.0], "a bias of"),
        ("scale", [1e-29, 1.0], "does not fit float32"),
    ],
)
def test_what_integers_cannot_hold_is_refused(change, ranges, words):
    convolutions = made_up(32, 1)
    if change == "bias":
        convolutions[1][1].fill_(1e9)
    elif change == "scale":
        convolutions[0][0].mul_(1e30)
    with pytest.raises(ValueError, match=words):
        quantize_decoder(convolutions, ranges)


def test_a_decoder_has_blocks():
    with pytest.raises(ValueError, match="1 layers"):
        quantize_decoder(made_up(32, 1)[-1:], [])


def test_features_of_another_decoder_are_refused():
    if not native_library.forms_here():
        pytest.skip("the compiled kernels are missing")
    convolutions = made_up(32, 1)
    with pytest.raises(ValueError, match="32 channels"):
        NativeDecoder(quantize_decoder(convolutions, [9.0, 9.0]))(in_steps(features(1, 34)))
