"""A convolutional decoder in integers on a GPU: one kernel a layer; `kernels.upsampling_decoder` has the equations.

Tensor cores multiply int8, so a weight of 16 bits and an activation of 12 are two int8 each, and a product is four:

    w a = (256 wh + wl) (16 ah + al),   wh = (w + 128) >> 8,   ah = a >> 4

Sums of the parts are int32 and may wrap before they are put together; the whole sum fits, so it is right. wh must be below 128: a row
whose largest weight is too large for that is stored with the other sign. A block owns some outputs of some pixels, in one parity after
an upsampling, and writes activations as the next layer reads them, channels last. The last layer writes pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.triton_launch import INTERPRETED, launch
from millijoule.kernels.upsampling_decoder import (
    ACTIVATION,
    LEAK,
    TANH_REACH,
    TANH_STEPS,
    TANH_TABLE,
    IntegerConvolution,
    IntegerDecoder,
)

#: Pixels and outputs of a block, and channels that it multiplies at a time.
PIXELS, OUTPUTS, CHANNELS = 64, 64, 32

#: Channels are padded to a multiple of what int8 products of tensor cores take; the last layer's three outputs to so many.
PADDING, LAST_OUTPUTS = 32, 16

#: Weights from here on have no int8 half.
TOO_LARGE = 32640

_ACTIVATION = tl.constexpr(ACTIVATION)
_LEAK = tl.constexpr(LEAK)
_TANH_MOST = tl.constexpr(TANH_STEPS * TANH_REACH)
_ROUNDING = tl.constexpr(
    1.5 * 2.0**23
)  # added to a float32 of less than 2**22 in magnitude, it leaves no fraction


@dataclass(frozen=True)
class PackedConvolution:
    """One layer on a device, inputs and outputs padded with zeros.

    Attributes:
        weights: int8 `[2, parities, taps, outputs, inputs]`: wh, then wl.
        sign: int32 `[parities, outputs]`: -1 where a row is stored with the other sign.
        bias, multiplier: int32 and float32 `[parities, outputs]`.
        side: of the window of taps, 2 after an upsampling, else 3.
    """

    weights: Tensor
    sign: Tensor
    bias: Tensor
    multiplier: Tensor
    side: int


def misfit(decoder: IntegerDecoder) -> str | None:
    """Why the kernel does not take a decoder; None: it does."""
    for layer in decoder.layers:
        rows = layer.weights.flatten(2).to(torch.int32)
        if bool(((rows.amax(2) >= TOO_LARGE) & (rows.amin(2) <= -TOO_LARGE)).any()):
            return f"a row has weights of {TOO_LARGE} and more of both signs"
    return None


class DecoderKernel:
    """A decoder packed for one device; calls are `upsampling_decoder.decode` there, the same bits.

    Args:
        decoder: one that is no `misfit`.
        device: a GPU, or anything in Triton's interpreter.
    """

    def __init__(self, decoder: IntegerDecoder, device: str | torch.device) -> None:
        if why := misfit(decoder):
            raise ValueError(f"the decoder's kernel does not take this model: {why}")
        self.device = torch.device(device)
        if self.device.type != "cuda" and not INTERPRETED:
            raise ValueError(f"{device}: the decoder's kernel runs on NVIDIA GPUs")
        self.channels = decoder.channels
        self.layers = pack(decoder, self.device)
        self.table = TANH_TABLE.to(self.device)

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        """uint8 images `[images, size, size, 3]` from int16 features `[images, in, height, height]`, both on the device.

        Raises:
            ValueError: the features are not of this decoder.
        """
        images, channels, height, width = features.shape
        if channels != self.channels or height != width:
            raise ValueError(f"features {list(features.shape)} for a decoder of {self.channels} channels")
        size = height << (len(self.layers) // 2)
        if not images:
            return torch.empty(0, size, size, 3, dtype=torch.uint8, device=self.device)
        return decode_packed(self.layers, self.table, split(features))


def split(features: Tensor) -> Tensor:
    """Activations as layers read them, int8 `[2, images, height, width, padded channels]`: ah, then al."""
    last = F.pad(features.permute(0, 2, 3, 1), (0, -features.shape[1] % PADDING))
    return torch.stack([last >> 4, last & 15]).to(torch.int8)


def pack(decoder: IntegerDecoder, device: str | torch.device) -> list[PackedConvolution]:
    """`decoder` on `device`."""
    *layers, last = decoder.layers
    packed = [_packed(layer, -len(layer.bias[0]) % PADDING, device) for layer in layers]
    colours = last.weights.shape[1] // last.columns
    plain = IntegerConvolution(  # of one column: as CPUs take it, it draws several pixels
        last.weights[:, :colours, :, :3], last.bias[:, :colours], last.multiplier[:, :colours]
    )
    return [*packed, _packed(plain, LAST_OUTPUTS - colours, device)]


def _packed(layer: IntegerConvolution, more: int, device: str | torch.device) -> PackedConvolution:
    weights = layer.weights.flatten(2, 3).to(torch.int32)  # [parities, outputs, taps, inputs]
    sign = 1 - 2 * (weights.amax((2, 3)) >= TOO_LARGE).to(torch.int32)
    weights = (weights * sign[:, :, None, None]).transpose(1, 2)
    weights = F.pad(weights, (0, -weights.shape[3] % PADDING, 0, more))
    high = (weights + 128) >> 8
    halves = torch.stack([high, weights - 256 * high]).to(torch.int8)
    sign, bias, multiplier = (
        F.pad(x, (0, more)).contiguous().to(device) for x in (sign, layer.bias, layer.multiplier)
    )
    return PackedConvolution(
        halves.contiguous().to(device), sign, bias, multiplier, side=layer.weights.shape[2]
    )


def decode_packed(layers: list[PackedConvolution], table: Tensor, x: Tensor) -> Tensor:
    """Start all layers on activations `x`, see `split` -> pixels."""
    device = x.device
    for layer in layers:
        _, parities, _, outputs, inputs = layer.weights.shape
        _, images, height, width, _ = x.shape
        last = layer is layers[-1]
        twice = 2 if parities == 4 else 1
        if last:
            y = torch.empty(images, height, width, 3, dtype=torch.uint8, device=device)
        else:
            y = torch.empty(
                2, images, twice * height, twice * width, outputs, dtype=torch.int8, device=device
            )
        own = min(OUTPUTS, triton.next_power_of_2(outputs))
        launch(
            convolve,
            triton.cdiv(images * height * width, PIXELS) * triton.cdiv(outputs, own) * parities,
            device,
            *(x, layer.weights, layer.sign, layer.bias, layer.multiplier, table, y),
            *(images * height * width, height, width, inputs, outputs),
            *(x[0].numel(), layer.weights[0].numel(), y[0].numel()),
            TWICE=twice,
            SIDE=layer.side,
            LAST=last,
            PIXELS=PIXELS,
            OUTPUTS=own,
            CHANNELS=CHANNELS,
            num_warps=8,
        )
        x = y
    return x


@triton.jit
def convolve(
    x, weights, signs, biases, multipliers, table, y, pixels, height, width, inputs, outputs,
    low_x, low_weights, low_y,
    TWICE: tl.constexpr, SIDE: tl.constexpr, LAST: tl.constexpr,
    PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One layer: some outputs of some pixels, in one parity. `low_...`: how far behind the high halves the low ones stand."""
    groups = tl.cdiv(pixels, PIXELS)
    program = tl.program_id(0)
    pixel = (program % groups) * PIXELS + tl.arange(0, PIXELS)
    of_outputs = tl.cdiv(outputs, OUTPUTS)
    parity = program // groups // of_outputs
    out = (program // groups % of_outputs) * OUTPUTS + tl.arange(0, OUTPUTS)
    down, right = parity // 2, parity % 2
    row, column = pixel // width % height, pixel % width
    channel = tl.arange(0, CHANNELS)
    exists, known = pixel < pixels, out < outputs
    high = tl.zeros([PIXELS, OUTPUTS], tl.int32)
    high_low = tl.zeros([PIXELS, OUTPUTS], tl.int32)
    low_high = tl.zeros([PIXELS, OUTPUTS], tl.int32)
    low = tl.zeros([PIXELS, OUTPUTS], tl.int32)
    for tap in range(SIDE * SIDE):
        by_y, by_x = tap // SIDE - 1, tap % SIDE - 1
        if TWICE == 2:
            by_y += down
            by_x += right
        at_y, at_x = row + by_y, column + by_x
        inside = exists & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        beside = x + (pixel + by_y * width + by_x).to(tl.int64)[:, None] * inputs + channel[None, :]
        taken = weights + (((parity * SIDE * SIDE + tap) * outputs + out).to(tl.int64)[None, :] * inputs)
        taken += channel[:, None]
        for first in range(0, inputs, CHANNELS):
            ah = tl.load(beside + first, inside[:, None], 0)  # [PIXELS, CHANNELS] int8
            al = tl.load(beside + low_x + first, inside[:, None], 0)
            wh = tl.load(taken + first, known[None, :], 0)  # [CHANNELS, OUTPUTS] int8
            wl = tl.load(taken + low_weights + first, known[None, :], 0)
            high = tl.dot(ah, wh, high, out_dtype=tl.int32)
            high_low = tl.dot(al, wh, high_low, out_dtype=tl.int32)
            low_high = tl.dot(ah, wl, low_high, out_dtype=tl.int32)
            low = tl.dot(al, wl, low, out_dtype=tl.int32)
    total = (high << 12) + (high_low << 8) + (low_high << 4) + low
    numbers = parity * outputs + out
    total = total * tl.load(signs + numbers, known, 0)[None, :] + tl.load(biases + numbers, known, 0)[None, :]
    v = total.to(tl.float32) * tl.load(multipliers + numbers, known, 0)[None, :]
    if LAST:
        v = tl.minimum(tl.maximum(v, -_TANH_MOST), _TANH_MOST)
        entry = ((v + _ROUNDING) - _ROUNDING).to(tl.int32) + _TANH_MOST
        colour = tl.load(table + entry)  # [PIXELS, OUTPUTS] uint8
        target = y + pixel.to(tl.int64)[:, None] * 3 + out[None, :]
        tl.store(target, colour, exists[:, None] & (out < 3)[None, :])
    else:
        v = tl.maximum(v, v * _LEAK)
        v = tl.minimum(tl.maximum(v, -_ACTIVATION), _ACTIVATION)
        a = ((v + _ROUNDING) - _ROUNDING).to(tl.int32)
        own = pixel
        if TWICE == 2:
            own = (pixel - column) * 4 + down * 2 * width + 2 * column + right
        target = y + own.to(tl.int64)[:, None] * outputs + out[None, :]
        keep = exists[:, None] & known[None, :]
        tl.store(target, (a >> 4).to(tl.int8), keep)  # [PIXELS, OUTPUTS] int8
        tl.store(target + low_y, (a & 15).to(tl.int8), keep)
