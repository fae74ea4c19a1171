"""Numbers of the GPU's kernels that are integers: sums times fixed-point numbers."""

from __future__ import annotations

import triton
import triton.language as tl

from millijoule.kernels.oscillator import MULTIPLIER_BITS
from millijoule.kernels.phase import AMPLITUDE

_HALF = tl.constexpr(1 << (MULTIPLIER_BITS - 1))
_BITS = tl.constexpr(MULTIPLIER_BITS)
_AMPLITUDE = tl.constexpr(AMPLITUDE)


@triton.jit
def scaled(total, multiplier):
    """int32 sums `[rows, outputs]` times the int32 number of each output, over 2**24, rounded: int64."""
    return (total.to(tl.int64) * multiplier.to(tl.int64)[None, :] + _HALF) >> _BITS


@triton.jit
def activations(total, bias, multiplier):
    """The same after `bias`, cut to 0 to 127: int8."""
    out = scaled(total + bias[None, :], multiplier)
    return tl.minimum(tl.maximum(out, 0), _AMPLITUDE).to(tl.int8)
