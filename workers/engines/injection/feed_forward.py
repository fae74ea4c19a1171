"""Gated feed-forward layers whose product with the activated gate is one pass."""

from __future__ import annotations

from diffusers.models.activations import GEGLU, SwiGLU
from torch import Tensor, nn

from millijoule.kernels.gated_activation import gated_activation
from millijoule.workers.engines.injection.fused import Fusion


class FusedGEGLU(GEGLU):
    """The projection as it is, then `gated_activation`."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        """See `GEGLU`; the deprecated `scale` is ignored there, too."""
        return gated_activation(self.proj(hidden_states), "gelu")


class FusedSwiGLU(SwiGLU):
    """The projection as it is, then `gated_activation`."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """See `SwiGLU`."""
        return gated_activation(self.proj(hidden_states), "silu")


def _swiglu_fits(module: nn.Module) -> str:
    assert isinstance(module, SwiGLU)
    return (
        ""
        if isinstance(module.activation, nn.SiLU)
        else f"its activation is {type(module.activation).__name__}"
    )


FUSIONS = (
    Fusion(GEGLU, FusedGEGLU, "GEGLU", known=frozenset({"2b46ae61cd4a0ce9"})),
    Fusion(SwiGLU, FusedSwiGLU, "SwiGLU", _swiglu_fits, frozenset({"ca0a2f7708430109"})),
)
