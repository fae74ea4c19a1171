"""diffusers' adaptive layer norms, whose norm and modulation are one pass.

Their norm has no weights (with weights it is left alone), so nothing is read past the modules that have some.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    FP32LayerNorm,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn

from millijoule.kernels.ada_layer_norm import ada_layer_norm
from millijoule.workers.engines.injection.fused import Fusion


class FusedAdaLayerNormZero(AdaLayerNormZero):
    """See `ada_layer_norm`."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: object = None,
        emb: Tensor | None = None,
    ) -> Any:
        """See `AdaLayerNormZero`."""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return ada_layer_norm(x, scale, shift, self.norm.eps), *rest


class FusedAdaLayerNormZeroSingle(AdaLayerNormZeroSingle):
    """See `ada_layer_norm`."""

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Any:
        """See `AdaLayerNormZeroSingle`."""
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return ada_layer_norm(x, scale, shift, self.norm.eps), gate


class FusedSD35AdaLayerNormZeroX(SD35AdaLayerNormZeroX):
    """See `ada_layer_norm`: twice, for the norm costs less than to write and read it."""

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> Any:
        """See `SD35AdaLayerNormZeroX`."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = self.linear(
            self.silu(emb)
        ).chunk(9, dim=1)
        first = ada_layer_norm(hidden_states, scale, shift, self.norm.eps)
        second = ada_layer_norm(hidden_states, scale2, shift2, self.norm.eps)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, second, gate2


class FusedAdaLayerNormContinuous(AdaLayerNormContinuous):
    """See `ada_layer_norm`."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """See `AdaLayerNormContinuous`."""
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return ada_layer_norm(x, scale, shift, self.norm.eps)


def is_plain(norm: Any) -> bool:
    """Whether it is a LayerNorm over the last dimension, without weights."""
    kinds = (nn.LayerNorm, FP32LayerNorm)
    return (
        type(norm) in kinds and len(norm.normalized_shape) == 1 and norm.weight is None and norm.bias is None
    )


def _fits(module: nn.Module) -> str:
    return "" if is_plain(module.norm) else f"its norm is another ({type(module.norm).__name__})"


FUSIONS = tuple(
    Fusion(original, fused, "AdaLN", _fits, frozenset({known}), ("norm",))
    for original, fused, known in (
        (AdaLayerNormZero, FusedAdaLayerNormZero, "d9d77ba02041498d"),
        (AdaLayerNormZeroSingle, FusedAdaLayerNormZeroSingle, "f7becca51756dd78"),
        (SD35AdaLayerNormZeroX, FusedSD35AdaLayerNormZeroX, "9713af6b08c4aade"),
        (AdaLayerNormContinuous, FusedAdaLayerNormContinuous, "3b35708dffe11223"),
    )
)
