"""The product at the middle of a gated feed-forward layer.

    out = a * act(b),  [a, b] = x                       # halves of the last dimension

act is GELU, exact or by its tanh approximation, or SiLU: GEGLU and SwiGLU (Shazeer 2020, arXiv 2002.05202). One reading and one
writing; PyTorch's own operations write and read the activated half once more, and round it.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.triton_launch import launch, runs_on, silu

Activation = Literal["gelu", "gelu_tanh", "silu"]

#: Values of a row that one program computes, at most.
BLOCK = 1024

#: See `group_norm_silu`.
MAX_REGISTERS, MAX_SHARED_BYTES = 64, 0


def gated_activation_reference(x: Tensor, activation: Activation = "gelu") -> Tensor:
    """The plain form; see `gated_activation`."""
    value, gate = x.chunk(2, dim=-1)
    if activation == "silu":
        return value * F.silu(gate)
    return value * F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def gated_activation(x: Tensor, activation: Activation = "gelu") -> Tensor:
    """The fused form where Triton runs, the plain one elsewhere.

    Args:
        x: float32, bfloat16 or float16 `[..., 2 * width]`: values, then gates.

    Returns:
        `[..., width]`.
    """
    if not runs_on(x) or x.shape[-1] % 2:
        return gated_activation_reference(x, activation)
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(width), BLOCK)
    parts = triton.cdiv(width, block)
    launch(
        _gated,
        out.numel() // width * parts,
        x.device,
        *(x, out, width, parts),
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=4,
    )
    return out


@triton.jit
def _gated(x, out, width, parts, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One program for a part of a row."""
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    d = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    keep = d < width
    value = tl.load(x + row * 2 * width + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    gate = tl.load(x + row * 2 * width + width + d, keep, 0.0).to(tl.float32)  # [BLOCK]
    if ACTIVATION == "silu":
        gate = silu(gate)
    elif ACTIVATION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # 0.5 (1 + tanh(u)) is the logistic function of 2 u
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out + row * width + d, (value * gate).to(out.dtype.element_ty), keep)  # [BLOCK]
