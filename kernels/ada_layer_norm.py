"""LayerNorm that the conditioning modulates, after a gated residual where one comes before it.

    h = residual + gate * update                        # only `gated_ada_layer_norm`, which returns h, too
    y = (h - mean) / sqrt(variance + eps)               # over the last dimension; * weight + bias where there are any
    out = y * (1 + scale) + shift                       # a row of scale, shift and gate per sample

Statistics are float32. One program reads a token once and writes it once; PyTorch's own operations read and write it three times
for the norm and its modulation, and twice more for the gate. Peebles and Xie 2023 (arXiv 2212.09748): adaLN-Zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.triton_launch import launch, runs_on

#: The widest token that one program holds.
MAX_WIDTH = 16384

#: See `group_norm_silu`.
MAX_REGISTERS, MAX_SHARED_BYTES = 112, 64


def ada_layer_norm_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The plain form; see `ada_layer_norm`."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = 1e-6,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The fused form where Triton runs, the plain one elsewhere.

    Args:
        x: float32, bfloat16 or float16 `[n, tokens, width]`.
        scale, shift: `[n, width]`; rows may lie apart, as parts of a projection do.
        weight, bias: `[width]` of the norm itself.

    Returns:
        `[n, tokens, width]`, of the type that x and its modulation promote to.
    """
    if not _fits(x, scale, shift, weight, bias):
        return ada_layer_norm_reference(x, scale, shift, eps, weight=weight, bias=bias)
    out = torch.empty(x.shape, dtype=_promoted(x, scale, shift), device=x.device)
    _run(x, None, None, None, out, scale, shift, weight, bias, eps)
    return out


def gated_ada_layer_norm_reference(
    residual: Tensor, gate: Tensor, update: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The plain form; see `gated_ada_layer_norm`."""
    h = residual + gate[:, None] * update
    return h, ada_layer_norm_reference(h, scale, shift, eps)


def gated_ada_layer_norm(
    residual: Tensor, gate: Tensor, update: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The sum of `residual` and the gated `update`, and that sum normalised and modulated.

    Args:
        residual, update: `[n, tokens, width]`, of one type.
        gate, scale, shift: `[n, width]`, of one type.

    Returns:
        h and out, both `[n, tokens, width]`.
    """
    one_type = residual.dtype == update.dtype and gate.dtype == scale.dtype
    if not one_type or residual.shape != update.shape or not _fits(residual, scale, shift, gate, update):
        return gated_ada_layer_norm_reference(residual, gate, update, scale, shift, eps)
    dtype = _promoted(residual, gate, scale, shift)
    h, out = torch.empty(2, *residual.shape, dtype=dtype, device=residual.device).unbind()
    _run(residual, update, gate, h, out, scale, shift, None, None, eps)
    return h, out


def _fits(x: Tensor, scale: Tensor, shift: Tensor, *more: Tensor | None) -> bool:
    rows = (x.shape[0], x.shape[-1]) if x.dim() == 3 else None
    return runs_on(x, scale, shift, *more) and x.shape[-1] <= MAX_WIDTH and rows == scale.shape == shift.shape


def _promoted(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _rows(values: Tensor) -> Tensor:
    """`[n, width]` with a row's values next to each other."""
    return values if values.stride(1) == 1 else values.contiguous()


def _run(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    h: Tensor | None,
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    n, tokens, width = x.shape
    x, update = x.contiguous(), None if update is None else update.contiguous()
    scale, shift, gate = _rows(scale), _rows(shift), None if gate is None else _rows(gate)
    block = triton.next_power_of_2(width)
    launch(
        _modulated_norm,
        n * tokens,
        x.device,
        *(x, update, gate, h, out, scale, shift, weight, bias),
        *(0 if t is None else t.stride(0) for t in (gate, scale, shift)),
        *(tokens, width, eps),
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


@triton.jit
def _modulated_norm(
    x, update, gate, h_out, out, scale, shift, weight, bias, gate_stride, scale_stride, shift_stride, tokens, width, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for one token."""
    row = tl.program_id(0).to(tl.int64)
    n = row // tokens
    d = tl.arange(0, BLOCK)
    keep = d < width
    h = tl.load(x + row * width + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    if update is not None:
        g = tl.load(gate + n * gate_stride + d, keep, 0.0).to(tl.float32)  # [BLOCK]
        h += g * tl.load(update + row * width + d, keep, 0.0).to(tl.float32)  # [BLOCK]
        rounded = h.to(h_out.dtype.element_ty)
        tl.store(h_out + row * width + d, rounded, keep)  # [BLOCK]
        h = rounded.to(tl.float32)  # the norm is of what the next reader finds
    mean = tl.sum(h, 0) / width
    centred = tl.where(keep, h - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / width
    y = centred * (1.0 / tl.sqrt(variance + eps))
    if weight is not None:
        y *= tl.load(weight + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    if bias is not None:
        y += tl.load(bias + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    s = tl.load(scale + n * scale_stride + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    t = tl.load(shift + n * shift_stride + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    y = y * (1.0 + s) + t
    tl.store(out + row * width + d, y.to(out.dtype.element_ty), keep)  # [BLOCK]
