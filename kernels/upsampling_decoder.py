"""A convolutional decoder in integers: blocks of {nearest x2, 3x3, leaky, 3x3, leaky}, then 3x3 to three channels and tanh.

Nearest x2 followed by a 3x3 convolution is four 2x2 convolutions of the small image, one for each parity of the output's row and
column (sub-pixel convolution: Shi et al. 2016): taps that fall on the same source pixel are added up, 4/9 of the products are left.
Weights are int16 with a scale for each output channel and parity, activations int16 of at most `ACTIVATION` in magnitude. In each layer

    v = float32(sum w a + bias) * m,   a' = round(clamp(max(v, 0.2 v)))

with sums exact in int32, and float32 conversion, products and rounding to even as IEEE 754 has them, so the result has the same bits
on every machine. The last layer's v is in 1/1024 and a table makes uint8 of it: round((tanh(v / 1024) + 1) * 127.5).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from millijoule.kernels.native_library import native_form, native_library

#: The largest activation. Larger ones, which calibration leaves room for, saturate.
ACTIVATION = 2047

#: Slope of the activation function below zero.
LEAK = 0.2

#: Before tanh: steps within 1.0, and the value beyond which a pixel does not change any more.
TANH_STEPS, TANH_REACH = 1024, 4

#: Of int32: what a sum of products may reach, and what is left to the bias.
MOST_SUM, MOST_BIAS = 3 * 2**29, 2**29 - 1

#: Calibrated activations reach so far into int16's range; the rest is for images that were not seen.
HEADROOM = 1.5

#: Pixels side by side that the last layer draws at once: its three channels alone would leave vectors empty.
OUTPUT_COLUMNS = 4

#: A convolution's float weights `[out, in, 3, 3]` and bias `[out]`.
FloatConvolution = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class IntegerConvolution:
    """One layer.

    Attributes:
        weights: int16 `[parities, rows, taps down, taps right, in]`. Four parities (down, right; right runs faster) of 2x2 after an
            upsampling, else one.
        bias: int32 `[parities, rows]`, in units of a sum.
        multiplier: float32 `[parities, rows]`, m.
        columns: neighbouring output pixels that `rows` are made of, pixel-major: 1, or `OUTPUT_COLUMNS`.
    """

    weights: Tensor
    bias: Tensor
    multiplier: Tensor
    columns: int = 1


@dataclass(frozen=True)
class IntegerDecoder:
    """Layers in order: first and second of each block, then the output's."""

    layers: tuple[IntegerConvolution, ...]

    def to(self, device: str) -> IntegerDecoder:
        return IntegerDecoder(
            tuple(
                IntegerConvolution(
                    x.weights.to(device), x.bias.to(device), x.multiplier.to(device), x.columns
                )
                for x in self.layers
            )
        )

    @property
    def blocks(self) -> int:
        return len(self.layers) // 2

    @property
    def channels(self) -> int:
        return self.layers[0].weights.shape[-1]


def quantize_decoder(convolutions: Sequence[FloatConvolution], ranges: Sequence[float]) -> IntegerDecoder:
    """From float convolutions in order, the last one the output's.

    Args:
        ranges: for all layers but the last, the real value that `ACTIVATION` stands for in what it puts out.

    Raises:
        ValueError: there is no block, a range is not a positive number, there is not one for each layer, or a bias is so large beside its weights that
            sums would leave int32.
    """
    if len(convolutions) < 3 or len(convolutions) % 2 == 0:
        raise ValueError(
            f"{len(convolutions)} layers: two in each block, at least one block, and the output's"
        )
    if len(ranges) != len(convolutions) - 1:
        raise ValueError(f"{len(ranges)} activation ranges for {len(convolutions)} layers")
    layers, taken = [], 1 / ACTIVATION  # features reach 1.0
    for number, (convolution, reach) in enumerate(zip(convolutions, (*ranges, None), strict=True)):
        if reach is None:
            unit, last = 1 / TANH_STEPS, True
        else:
            if not 1e-30 < reach < 1e30:
                raise ValueError(f"activation range {reach}: not a positive number that float32 holds")
            unit, last = reach / ACTIVATION, False
        layers.append(_quantized(convolution, taken, unit, upsampled=number % 2 == 0 and not last, last=last))
        taken = unit
    return IntegerDecoder(tuple(layers))


def calibrated_ranges(convolutions: Sequence[FloatConvolution], features: Tensor) -> list[float]:
    """Ranges for `quantize_decoder` from int16 features `[images, in, size, size]` of typical images, with `HEADROOM`."""
    ranges: list[float] = []
    x, taken = features, 1 / ACTIVATION
    for number, convolution in enumerate(convolutions[:-1]):
        trial = _quantized(
            convolution, taken, 1.0, upsampled=number % 2 == 0, last=False
        )  # 1.0: m makes real values
        reach = float(_convolved(x, trial).abs().max()) * HEADROOM
        ranges.append(float(f"{max(reach, 1e-6):.4g}"))
        unit = ranges[-1] / ACTIVATION
        x = _activations(
            _convolved(x, _quantized(convolution, taken, unit, upsampled=number % 2 == 0, last=False))
        )
        taken = unit
    return ranges


def _quantized(
    convolution: FloatConvolution, taken: float, unit: float, *, upsampled: bool, last: bool
) -> IntegerConvolution:
    """A layer whose activations come in steps of `taken` and go in steps of `unit`. The same integers on every machine: scales come
    from largest weights and from sums of integers."""
    weights, bias = convolution[0].double(), convolution[1].double()
    kernels = folded(weights) if upsampled else weights[None]  # [parities, out, in, down, right]
    largest = kernels.abs().amax((2, 3, 4)).clamp_min(1e-30)  # [parities, out]
    integers = torch.round(kernels / largest[..., None, None, None] * 32767).to(torch.int64)
    sums = (integers.abs().sum((2, 3, 4)) * ACTIVATION).double()
    shrink = (sums / MOST_SUM).clamp_min(1.0) * 1.001  # rounding may add half of a unit to every weight
    scale = largest / 32767 * shrink
    integers = torch.round(kernels / scale[..., None, None, None]).to(torch.int64)
    if int((integers.abs().sum((2, 3, 4)) * ACTIVATION).max()) > MOST_SUM + MOST_BIAS // 2:
        raise ValueError("a layer has too many inputs for sums in int32")
    steps = bias / (scale * taken)
    if not float(steps.abs().max()) < MOST_BIAS // 2:
        raise ValueError(
            f"a bias of {float(bias.abs().max()):.3g} beside weights of {float(largest.min()):.3g}"
        )
    multiplier = (scale * (taken / unit)).to(torch.float32)
    if not bool(torch.isfinite(multiplier).all()):
        raise ValueError("a layer's scale does not fit float32")
    laid_out = integers.to(torch.int16).permute(0, 1, 3, 4, 2)  # [parities, out, down, right, in]
    steps = torch.round(steps).to(torch.int32).contiguous()
    if not last:
        return IntegerConvolution(laid_out.contiguous(), steps, multiplier.contiguous())
    _, rows, down, right, channels = laid_out.shape
    wide = laid_out.new_zeros(1, OUTPUT_COLUMNS, rows, down, right + OUTPUT_COLUMNS - 1, channels)
    for column in range(OUTPUT_COLUMNS):
        wide[:, column, :, :, column : column + right] = laid_out
    return IntegerConvolution(
        wide.flatten(1, 2).contiguous(),
        steps.repeat(1, OUTPUT_COLUMNS),
        multiplier.repeat(1, OUTPUT_COLUMNS),
        OUTPUT_COLUMNS,
    )


def folded(weights: Tensor) -> Tensor:
    """3x3 weights `[out, in, 3, 3]` after nearest x2 as four 2x2 ones `[4, out, in, 2, 2]`, parity = 2 * down + right."""
    both = []
    for down in range(2):
        rows = _merged(weights, 2, down)
        both += [_merged(rows, 3, right) for right in range(2)]
    return torch.stack(both)


def _merged(weights: Tensor, dim: int, parity: int) -> Tensor:
    """Of an even output pixel, the second and third tap fall on its own source pixel; of an odd one, the first and second."""
    first, second, third = weights.unbind(dim)
    return torch.stack([first, second + third] if parity == 0 else [first + second, third], dim)


def _convolved(x: Tensor, layer: IntegerConvolution) -> Tensor:
    """v, float32 `[images, rows, height, width]` (or twice the size), from int16 `[images, in, height, width]`."""
    images, _, height, width = x.shape
    kernels = layer.weights.permute(0, 1, 4, 2, 3).double()  # [parities, rows, in, down, right]
    parts = []
    for parity, kernel in enumerate(kernels):
        if len(kernels) == 4:
            down, right = divmod(parity, 2)
            padded = F.pad(x.double(), (1 - right, right, 1 - down, down))
            sums = F.conv2d(padded, kernel)
        else:
            sums = F.conv2d(F.pad(x.double(), (1, 1, 1, 1)), kernel, stride=(1, layer.columns))
        # float64 adds these integers exactly, in any order
        exact = sums.to(torch.int32) + layer.bias[parity][:, None, None]
        parts.append(exact.to(torch.float32) * layer.multiplier[parity][:, None, None])
    if len(parts) == 1:
        found = parts[0]
        if layer.columns > 1:  # [images, columns * channels, height, width / columns]
            found = found.view(images, layer.columns, -1, height, width // layer.columns)
            found = found.permute(0, 2, 3, 4, 1).reshape(images, -1, height, width)
        return found
    rows = parts[0].shape[1]
    woven = torch.stack(parts).view(2, 2, images, rows, height, width)
    return woven.permute(2, 3, 4, 0, 5, 1).reshape(images, rows, 2 * height, 2 * width)


def _activations(v: Tensor) -> Tensor:
    leaky = torch.maximum(v, v * torch.tensor(LEAK, dtype=torch.float32))
    return torch.round(leaky.clamp(-ACTIVATION, ACTIVATION)).to(torch.int16)


def _tanh_table() -> Tensor:
    """uint8 of v + reach, for v from minus to plus the reach."""
    most = TANH_STEPS * TANH_REACH
    values = (round((math.tanh(v / TANH_STEPS) + 1) * 127.5) for v in range(-most, most + 1))
    return torch.tensor(list(values), dtype=torch.uint8)


TANH_TABLE = _tanh_table()


def decode(features: Tensor, decoder: IntegerDecoder) -> Tensor:
    """uint8 images `[images, size, size, 3]` from int16 features `[images, in, height, width]`, at most `ACTIVATION` in magnitude."""
    x = features
    for layer in decoder.layers[:-1]:
        x = _activations(_convolved(x, layer))
    most = TANH_STEPS * TANH_REACH
    v = torch.round(_convolved(x, decoder.layers[-1]).clamp(-most, most)).to(torch.int64)
    pixels = TANH_TABLE.to(v.device).index_select(0, (v + most).flatten()).view(v.shape)
    return pixels.permute(0, 2, 3, 1).contiguous()


class NativeDecoder:
    """A decoder packed for the compiled kernel, in the form that `native_library` names now; calls are `decode`.

    Raises:
        ValueError: there is no compiled kernel.
    """

    def __init__(self, decoder: IntegerDecoder) -> None:
        library = native_library()
        if library is None:
            raise ValueError("the compiled kernels are missing")
        self._library = library
        self._form = native_form()
        self._decoder = decoder
        self._layers = [self._packed(layer) for layer in decoder.layers]

    def _packed(self, layer: IntegerConvolution) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, bias and multipliers as the kernel reads them."""
        weights = F.pad(layer.weights, (0, layer.weights.shape[-1] % 2))
        parities, rows = weights.shape[:2]
        block = int(self._library.millijoule_decoder_block(self._form, ctypes.c_int64(rows)))
        padded = rows + -rows % block
        k = weights[0, 0].numel()
        packed = torch.empty(parities, padded, k, dtype=torch.int16)
        flat = weights.reshape(parities, rows, k).contiguous()
        for parity in range(parities):
            self._library.millijoule_decoder_pack(
                ctypes.c_int64(block),
                _pointer(flat[parity]),
                ctypes.c_int64(rows),
                ctypes.c_int64(k),
                _pointer(packed[parity]),
            )
        more = (0, padded - rows)
        return packed, F.pad(layer.bias, more), F.pad(layer.multiplier, more)

    @cached_property
    def _shapes(self) -> Tensor:
        """int64 `[layers, 6]`: parities, rows, taps down and right, channels taken (made even), columns."""
        return torch.tensor(
            [
                (*layer.weights.shape[:4], layer.weights.shape[4] + layer.weights.shape[4] % 2, layer.columns)
                for layer in self._decoder.layers
            ],
            dtype=torch.int64,
        )

    def __call__(self, features: Tensor, *, threads: int = 1) -> Tensor:
        """See `decode`; the bits do not depend on `threads`, which share the images.

        Raises:
            ValueError: the features are not of this decoder.
            MemoryError: there is not enough of it.
        """
        images, channels, height, width = features.shape
        if channels != self._decoder.channels or height != width or width % OUTPUT_COLUMNS:
            raise ValueError(
                f"features {list(features.shape)} for a decoder of {self._decoder.channels} channels"
            )
        laid_out = features.permute(0, 2, 3, 1).to(torch.int16)
        laid_out = F.pad(laid_out, (0, channels % 2)).contiguous()  # [images, height, width, even channels]
        size = height << self._decoder.blocks
        pixels = torch.empty(images, size, size, 3, dtype=torch.uint8)
        pointers = [
            (ctypes.c_void_p * len(self._layers))(*(part.data_ptr() for part in parts))
            for parts in zip(*self._layers, strict=True)
        ]
        failed = self._library.millijoule_decode(
            self._form,
            ctypes.c_int64(len(self._layers)),
            _pointer(self._shapes),
            *pointers,
            _pointer(TANH_TABLE),
            ctypes.c_int64(TANH_STEPS * TANH_REACH),
            ctypes.c_int64(images),
            ctypes.c_int64(height),
            _pointer(laid_out),
            _pointer(pixels),
            ctypes.c_int64(threads),
        )
        if failed:
            raise MemoryError(f"decoding {images} images of {size}x{size}")
        return pixels


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
