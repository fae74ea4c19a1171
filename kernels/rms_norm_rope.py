"""RMSNorm of every head of a query or key, then its rotary position.

    y = x / sqrt(mean(x ** 2) + eps) * weight           # over a head
    out[2 i], out[2 i + 1] = y[2 i] cos[i] - y[2 i + 1] sin[i], y[2 i + 1] cos[i] + y[2 i] sin[i]

cos and sin are one row per token. The attention itself stays PyTorch's: its fused kernels are at the tensor cores' limit. Around them
PyTorch's own operations move a query some twenty times, most of it in float32; this reads and writes it once, straight into its
place in the joint sequence of text and image. Zhang and Sennrich 2019 (arXiv 1910.07467); Su 2021 (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.triton_launch import launch, runs_on

#: Values that one program holds: some heads of one token.
TILE = 2048
#: The widest head.
MAX_WIDTH = 512

#: See `group_norm_silu`.
MAX_REGISTERS, MAX_SHARED_BYTES = 64, 512


def rms_norm_rope_reference(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The plain form; see `rms_norm_rope`."""
    y = F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x.dtype), eps)
    if cos is not None and sin is not None:
        even, odd = y.float().unflatten(-1, (-1, 2)).unbind(-1)  # [n, tokens, heads, width / 2]
        c, s = cos[:, None], sin[:, None]  # [tokens, 1, width / 2]
        y = torch.stack([even * c - odd * s, odd * c + even * s], -1).flatten(-2).to(x.dtype)
    return y if out is None else out.copy_(y)


def rms_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The fused form where Triton runs, the plain one elsewhere.

    Args:
        x: float32, bfloat16 or float16 `[n, tokens, heads, width]`, of any strides.
        weight: `[width]`, or None.
        cos, sin: `[tokens, width / 2]`, of any strides; None: no rotation.
        out: where the result goes, such as a part of a longer sequence.

    Returns:
        `out`, or a new tensor, `[n, tokens, heads, width]` of x's type.
    """
    width = x.shape[-1]
    rotated = cos is not None and sin is not None
    if not runs_on(x, weight, cos, sin, out) or x.dim() != 4 or width % 2 or width > MAX_WIDTH:
        return rms_norm_rope_reference(x, weight, eps, cos, sin, out=out)
    if x.stride(-1) != 1:
        x = x.contiguous()
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n, tokens, heads, _ = x.shape
    half = triton.next_power_of_2(width // 2)
    block_h = min(triton.next_power_of_2(heads), max(TILE // (2 * half), 1))
    parts = triton.cdiv(heads, block_h)
    launch(
        _norm_and_rotate,
        n * tokens * parts,
        x.device,
        *(x, out, weight, cos if rotated else None, sin if rotated else None),
        *(*x.stride()[:3], *out.stride()),
        *(cos.stride() if rotated and cos is not None else (0, 0)),
        *(sin.stride() if rotated and sin is not None else (0, 0)),
        *(tokens, heads, width, parts, eps),
        BLOCK_H=block_h,
        HALF=half,
        num_warps=4,
    )
    return out


@triton.jit
def _norm_and_rotate(
    x, out, weight, cos, sin,
    x_n, x_t, x_h, out_n, out_t, out_h, out_d, cos_t, cos_d, sin_t, sin_d, tokens, heads, width, parts, eps,
    BLOCK_H: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One program for some heads of one token."""
    program = tl.program_id(0)
    token = (program // parts).to(tl.int64)
    n = token // tokens
    t = token % tokens
    h = (program % parts) * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, 2 * HALF)
    keep = (h < heads)[:, None] & (d < width)[None, :]
    y = tl.load(x + (n * x_n + t * x_t) + ((h * x_h)[:, None] + d[None, :]), keep, 0.0).to(tl.float32)
    # y: [BLOCK_H, 2 * HALF]
    y = y * (1.0 / tl.sqrt(tl.sum(y * y, 1) / width + eps))[:, None]
    if weight is not None:
        y = y * tl.load(weight + d, d < width, 0.0).to(tl.float32)[None, :]  # [2 * HALF]
    if cos is not None:
        i = tl.arange(0, HALF)
        c = tl.load(cos + t * cos_t + i * cos_d, i < width // 2, 0.0).to(tl.float32)  # [HALF]
        s = tl.load(sin + t * sin_t + i * sin_d, i < width // 2, 0.0).to(tl.float32)  # [HALF]
        even, odd = tl.split(tl.reshape(y, [BLOCK_H, HALF, 2]))  # [BLOCK_H, HALF] each
        y = tl.join(even * c[None, :] - odd * s[None, :], odd * c[None, :] + even * s[None, :])
        y = tl.reshape(y, [BLOCK_H, 2 * HALF])
    place = (h * out_h)[:, None] + (d * out_d)[None, :]
    tl.store(out + (n * out_n + t * out_t) + place, y.to(out.dtype.element_ty), keep)  # [BLOCK_H, 2 * HALF]
