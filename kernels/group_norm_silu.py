"""GroupNorm, what modulates it, and SiLU, in one pass over memory more than the statistics need.

    h = x + before                                      # before: a value per sample and channel (a timestep's embedding)
    y = (h - mean) / sqrt(variance + eps) * weight + bias    # mean and variance over a sample's group of channels
    y = y * (1 + scale) + shift                         # per sample and channel
    out = y * sigmoid(y)

Every term but the norm may be left out. x is `[n, channels, *positions]`, channels first or last in memory, and out lies as x does;
statistics are float32 and are those of moments about the mean (Chan, Golub, LeVeque 1979), so large means cost nothing. Sums are
added in an order that depends on a sample's shape alone: the same bits in any batch, and in any run.

PyTorch's own does this in four passes and more, and a channels-last tensor is copied to channels-first and back. Wu and He 2018
(arXiv 1803.08494); Elfwing 2018 (arXiv 1702.03118).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.triton_launch import launch, runs_on, silu

#: A group of at most so many values is held by one program, which reads it once.
WHOLE_GROUP = 16384

#: Larger ones are read in tiles of so many values, a few of them by one program.
TILE = 4096
TILES_PER_PROGRAM = 4
#: Channels of a tile where they are last in memory.
TILE_CHANNELS = 128

#: Registers of a thread and shared bytes of a program that the largest form may take on an H100 (compute capability 9.0): more, and
#: fewer programs fit beside each other. See tests/kernels/test_compiled.py.
MAX_REGISTERS, MAX_SHARED_BYTES = 96, 8192


def group_norm_silu_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """The plain form: PyTorch's own operations, one after the other. See `group_norm_silu`."""

    def along_channels(values: Tensor) -> Tensor:
        return values.reshape(*values.shape[:2], *[1] * (x.dim() - 2))

    if before is not None:
        x = x + along_channels(before)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        y = y * (1 + along_channels(scale)) + along_channels(shift)
    return F.silu(y) if activate else y


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    before: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """The fused form where Triton runs, the plain one elsewhere.

    Args:
        x: float32, bfloat16 or float16 `[n, channels, *positions]`.
        num_groups: divides the channels.
        weight, bias: `[channels]`, together or not at all.
        before, scale, shift: `[n, channels]`; scale and shift together or not at all.
        activate: whether SiLU follows.

    Returns:
        As x, in its memory format.
    """
    given = (x, weight, bias, before, scale, shift)
    if not runs_on(*given) or (weight is None) != (bias is None) or x.dim() < 3:
        return group_norm_silu_reference(
            x, num_groups, weight, bias, eps, before=before, scale=scale, shift=shift, activate=activate
        )
    x, last = _laid_out(x)
    out = torch.empty_like(x)
    n, channels, positions = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    per_group = channels // num_groups
    channel_stride, position_stride = (1, channels) if last else (positions, 1)
    before, scale, shift = (_rows(t) for t in (before, scale, shift))
    shape = (channels, positions, per_group, channel_stride, position_stride)
    modulation = (before, scale, shift)
    strides = tuple(0 if t is None else t.stride(0) for t in modulation)
    flags = {"ACTIVATE": activate}
    whole = triton.next_power_of_2(per_group) * triton.next_power_of_2(positions)
    if whole <= WHOLE_GROUP:
        launch(
            _whole_group,
            n * num_groups,
            x.device,
            *(x, out, weight, bias, *modulation, *strides, *shape, num_groups, eps),
            BLOCK_C=triton.next_power_of_2(per_group),
            BLOCK_P=triton.next_power_of_2(positions),
            num_warps=min(max(whole // 512, 1), 16),
            **flags,
        )
        return out
    block_c, block_p = tile(channels, positions, last)
    chunks = triton.cdiv(positions, block_p * TILES_PER_PROGRAM)
    blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p, "TILES": TILES_PER_PROGRAM, "num_warps": 8}
    programs = n * triton.cdiv(channels, block_c) * chunks
    means, squares = torch.empty(2, n, channels, chunks, dtype=torch.float32, device=x.device).unbind()
    mean, factor = torch.empty(2, n, num_groups, dtype=torch.float32, device=x.device).unbind()
    launch(_partial_moments, programs, x.device, *(x, means, squares, chunks, *shape), **blocks)
    block_s = min(triton.next_power_of_2(chunks), max(TILE // triton.next_power_of_2(per_group), 1))
    launch(
        _group_moments,
        n * num_groups,
        x.device,
        *(means, squares, mean, factor, before, strides[0]),
        *(chunks, channels, positions, per_group, num_groups, eps),
        CHUNK=block_p * TILES_PER_PROGRAM,
        BLOCK_C=triton.next_power_of_2(per_group),
        BLOCK_S=block_s,
        STEPS=triton.next_power_of_2(triton.cdiv(chunks, block_s)),
    )
    launch(
        _normalise,
        programs,
        x.device,
        *(x, out, mean, factor, weight, bias, *modulation, *strides, chunks, *shape, num_groups),
        **blocks,
        **flags,
    )
    return out


def tile(channels: int, positions: int, last: bool) -> tuple[int, int]:
    """Channels and positions of a tile, powers of two: what lies together in memory first."""
    if last:
        block_c = min(triton.next_power_of_2(channels), TILE_CHANNELS)
        return block_c, min(triton.next_power_of_2(positions), TILE // block_c)
    block_p = min(triton.next_power_of_2(positions), TILE)
    return min(triton.next_power_of_2(channels), TILE // block_p), block_p


def _laid_out(x: Tensor) -> tuple[Tensor, bool]:
    """x dense in memory, and whether its channels are last there; what is neither first nor last is copied."""
    if x.is_contiguous():
        return x, False
    rows = x.movedim(1, -1)
    return (x, True) if rows.is_contiguous() else (x.contiguous(), False)


def _rows(values: Tensor | None) -> Tensor | None:
    """`[n, channels]` with channels next to each other; rows may lie apart, as halves of a projection do."""
    if values is None:
        return None
    values = values.reshape(values.shape[0], values.shape[1])
    return values if values.stride(1) == 1 else values.contiguous()


@triton.jit
def _finish(y, weight, bias, scale, shift, scale_row, shift_row, c, keep, ACTIVATE: tl.constexpr):
    """The affine part, modulation and SiLU of normalised `y` `[BLOCK_C, BLOCK_P]`; `c` `[BLOCK_C]` are its channels."""
    if weight is not None:
        w = tl.load(weight + c, keep, 0.0).to(tl.float32)  # [BLOCK_C]
        b = tl.load(bias + c, keep, 0.0).to(tl.float32)  # [BLOCK_C]
        y = y * w[:, None] + b[:, None]
    if scale is not None:
        s = tl.load(scale + scale_row + c, keep, 0.0).to(tl.float32)  # [BLOCK_C]
        t = tl.load(shift + shift_row + c, keep, 0.0).to(tl.float32)  # [BLOCK_C]
        y = y * (1.0 + s)[:, None] + t[:, None]
    if ACTIVATE:
        y = silu(y)
    return y


@triton.jit
def _whole_group(
    x, out, weight, bias, before, scale, shift, before_stride, scale_stride, shift_stride,
    channels, positions, per_group, channel_stride, position_stride, num_groups, eps,
    ACTIVATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program for one group of one sample, which fits in registers."""
    program = tl.program_id(0)
    n = (program // num_groups).to(tl.int64)
    own = tl.arange(0, BLOCK_C)
    c = (program % num_groups) * per_group + own
    p = tl.arange(0, BLOCK_P)
    keep_c = own < per_group
    keep = keep_c[:, None] & (p < positions)[None, :]
    sample = n * channels * positions
    offset = (c * channel_stride)[:, None] + (p * position_stride)[None, :]
    h = tl.load(x + sample + offset, keep, 0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
    if before is not None:
        h += tl.load(before + n * before_stride + c, keep_c, 0.0).to(tl.float32)[:, None]  # [BLOCK_C]
        h = tl.where(keep, h, 0.0)
    count = 1.0 * per_group * positions
    mean = tl.sum(tl.sum(h, 1), 0) / count
    centred = tl.where(keep, h - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, 1), 0) / count
    y = centred * (1.0 / tl.sqrt(variance + eps))
    y = _finish(y, weight, bias, scale, shift, n * scale_stride, n * shift_stride, c, keep_c, ACTIVATE)
    tl.store(out + sample + offset, y.to(out.dtype.element_ty), keep)  # [BLOCK_C, BLOCK_P]


@triton.jit
def _part(chunks, channels, BLOCK_C: tl.constexpr):
    """Which sample, first channel and chunk of positions this program has, the first two as int64."""
    program = tl.program_id(0)
    chunk = program % chunks
    block = program // chunks
    blocks = tl.cdiv(channels, BLOCK_C)
    return (block // blocks).to(tl.int64), ((block % blocks) * BLOCK_C).to(tl.int64), chunk


@triton.jit
def _tile(
    n, first, position, channels, positions, channel_stride, position_stride, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Where a tile begins, beyond 2**31 where the tensor is that large; offsets `[BLOCK_C, BLOCK_P]` in it, and which exist."""
    own = tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    start = n * channels * positions + first * channel_stride + position.to(tl.int64) * position_stride
    keep = (first + own < channels)[:, None] & (position + p < positions)[None, :]
    return start, (own * channel_stride)[:, None] + (p * position_stride)[None, :], keep


@triton.jit
def _partial_moments(
    x, means, squares, chunks, channels, positions, per_group, channel_stride, position_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Mean, and sum of squares about it, of each channel over a chunk of positions -> means, squares `[n, channels, chunks]`."""
    n, first, chunk = _part(chunks, channels, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_C], tl.float32)
    seen = 0.0
    for i in range(TILES):
        p = (chunk * TILES + i) * BLOCK_P
        count = tl.minimum(tl.maximum(positions - p, 0), BLOCK_P).to(tl.float32)
        start, offset, keep = _tile(
            n, first, p, channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_P
        )
        h = tl.load(x + start + offset, keep, 0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
        own_mean = tl.sum(h, 1) / tl.maximum(count, 1.0)
        centred = tl.where(keep, h - own_mean[:, None], 0.0)
        total = tl.maximum(seen + count, 1.0)
        gap = own_mean - mean
        weight = tl.where(count > 0, count / total, 0.0)
        mean += gap * weight
        square += tl.sum(centred * centred, 1) + gap * gap * (seen * weight)
        seen += count
    c = first + tl.arange(0, BLOCK_C)
    keep_c = c < channels
    place = (n * channels + c) * chunks + chunk
    tl.store(means + place, mean, keep_c)  # [BLOCK_C]
    tl.store(squares + place, square, keep_c)  # [BLOCK_C]


@triton.jit
def _group_moments(
    means, squares, mean, factor, before, before_stride,
    chunks, channels, positions, per_group, num_groups, eps,
    CHUNK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of one group, from its channels' moments -> mean, factor `[n, num_groups]`."""
    program = tl.program_id(0)
    n = (program // num_groups).to(tl.int64)
    own = tl.arange(0, BLOCK_C)
    c = (program % num_groups) * per_group + own
    keep_c = own < per_group
    rows = (n * channels + c) * chunks
    added = tl.zeros([BLOCK_C], tl.float32)
    if before is not None:
        added = tl.load(before + n * before_stride + c, keep_c, 0.0).to(tl.float32)  # [BLOCK_C]
    total = 1.0 * per_group * positions
    whole_mean = 0.0
    for i in range(STEPS):
        s = i * BLOCK_S + tl.arange(0, BLOCK_S)
        keep = keep_c[:, None] & (s < chunks)[None, :]
        share = tl.minimum(positions - s * CHUNK, CHUNK).to(tl.float32) / total  # [BLOCK_S]
        part = tl.load(means + rows[:, None] + s[None, :], keep, 0.0) + added[:, None]  # [BLOCK_C, BLOCK_S]
        whole_mean += tl.sum(tl.sum(tl.where(keep, part * share[None, :], 0.0), 1), 0)
    variance = 0.0
    for i in range(STEPS):
        s = i * BLOCK_S + tl.arange(0, BLOCK_S)
        keep = keep_c[:, None] & (s < chunks)[None, :]
        share = tl.minimum(positions - s * CHUNK, CHUNK).to(tl.float32) / total  # [BLOCK_S]
        part = tl.load(means + rows[:, None] + s[None, :], keep, 0.0) + added[:, None]  # [BLOCK_C, BLOCK_S]
        square = tl.load(squares + rows[:, None] + s[None, :], keep, 0.0)  # [BLOCK_C, BLOCK_S]
        gap = part - whole_mean
        variance += tl.sum(tl.sum(tl.where(keep, gap * gap * share[None, :] + square / total, 0.0), 1), 0)
    tl.store(mean + program, whole_mean)
    tl.store(factor + program, 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _normalise(
    x, out, mean, factor, weight, bias, before, scale, shift, before_stride, scale_stride, shift_stride,
    chunks, channels, positions, per_group, channel_stride, position_stride, num_groups,
    ACTIVATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The second reading: everything after the statistics."""
    n, first, chunk = _part(chunks, channels, BLOCK_C)
    c = first.to(tl.int32) + tl.arange(0, BLOCK_C)
    keep_c = c < channels
    group = n * num_groups + c // per_group
    middle = tl.load(mean + group, keep_c, 0.0)  # [BLOCK_C]
    stretch = tl.load(factor + group, keep_c, 0.0)  # [BLOCK_C]
    if before is not None:
        middle -= tl.load(before + n * before_stride + c, keep_c, 0.0).to(tl.float32)  # [BLOCK_C]
    for i in range(TILES):
        start, offset, keep = _tile(
            n, first, (chunk * TILES + i) * BLOCK_P,
            channels, positions, channel_stride, position_stride, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        h = tl.load(x + start + offset, keep, 0.0).to(tl.float32)  # [BLOCK_C, BLOCK_P]
        y = (h - middle[:, None]) * stretch[:, None]
        y = _finish(y, weight, bias, scale, shift, n * scale_stride, n * shift_stride, c, keep_c, ACTIVATE)
        tl.store(out + start + offset, y.to(out.dtype.element_ty), keep)  # [BLOCK_C, BLOCK_P]
