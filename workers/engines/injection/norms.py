"""Norms that do in one pass what comes after them, too: SiLU, modulation, rotation.

These have weights of their own, so they are called, never read from outside: whoever brings weights to a device only when their
module is called finds the call.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from millijoule.kernels.group_norm_silu import group_norm_silu
from millijoule.kernels.rms_norm_rope import MAX_WIDTH, rms_norm_rope
from millijoule.workers.engines.injection.fused import Fusion

SILU = (nn.SiLU,)


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm that stays in its input's memory format; what else it does in the same pass is told per call.

    Attributes:
        activates: whether SiLU follows where a call does not say.
    """

    activates = False

    def forward(
        self,
        input: Tensor,
        before: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activate: bool | None = None,
    ) -> Tensor:
        """See `group_norm_silu`."""
        return group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps,
            before=before, scale=scale, shift=shift, activate=self.activates if activate is None else activate,
        )  # fmt: skip


class FusedResnetBlock2D(ResnetBlock2D):
    """Both norms with their SiLU, the second one with the timestep's embedding as well."""

    def forward(self, input_tensor: Tensor, temb: Any, *args: object, **kwargs: object) -> Tensor:
        """See `ResnetBlock2D`; the deprecated `scale` is ignored there, too."""
        if self.training:
            return super().forward(input_tensor, temb)
        hidden = self.norm1(input_tensor, activate=True)
        resample = self.downsample if self.upsample is None else self.upsample
        if resample is not None:
            if self.upsample is not None and len(hidden) >= 64:  # nearest upsampling fails on large batches
                input_tensor, hidden = input_tensor.contiguous(), hidden.contiguous()
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift" and temb is not None:
            scale, shift = temb.chunk(2, dim=1)
            hidden = self.norm2(hidden, scale=scale, shift=shift, activate=True)
        else:
            hidden = self.norm2(hidden, before=temb, activate=True)
        hidden = self.conv2(self.dropout(hidden))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        total = input_tensor + hidden
        return total if self.output_scale_factor == 1.0 else total / self.output_scale_factor


class FusedRMSNorm(nn.RMSNorm):
    """PyTorch's norm of heads, with a rotation where a call gives one. Alone it is one pass in PyTorch, too."""

    def forward(
        self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """See `rms_norm_rope`."""
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm_rope(x, self.weight, eps, cos, sin, out=out)


class FusedHeadNorm(RMSNorm):
    """diffusers' RMSNorm of the heads of a query or key, with a rotation where a call gives one."""

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `rms_norm_rope`; what it does not take goes diffusers' way."""
        fits = hidden_states.dim() == 4 and (self.weight is None or self.weight.dtype == hidden_states.dtype)
        if not fits and cos is None and out is None:
            return super().forward(hidden_states)
        return rms_norm_rope(hidden_states, self.weight, self.eps, cos, sin, out=out)


def _group_norm_fits(module: nn.Module) -> str:
    assert isinstance(module, nn.GroupNorm)
    return "" if module.affine else "it has no weights"


def _resnet_fits(module: nn.Module) -> str:
    assert isinstance(module, ResnetBlock2D)
    if not isinstance(module.nonlinearity, SILU):
        return f"its activation is {type(module.nonlinearity).__name__}"
    norms = (module.norm1, module.norm2)
    if not all(type(norm) in (nn.GroupNorm, FusedGroupNorm) for norm in norms):
        return f"its norms are {' and '.join(type(norm).__name__ for norm in norms)}"
    known = module.time_emb_proj is None or module.time_embedding_norm in ("default", "scale_shift")
    return "" if known else "its embedding enters in another way"


def _head_norm_fits(module: nn.Module) -> str:
    assert isinstance(module, RMSNorm)
    if module.bias is not None:
        return "it has a bias"
    width = module.dim[0] if len(module.dim) == 1 else 0
    return "" if 0 < width <= MAX_WIDTH and width % 2 == 0 else "it is not over heads"


FUSIONS = (
    Fusion(
        ResnetBlock2D,
        FusedResnetBlock2D,
        "ResNet block's GroupNorm + SiLU twice",
        _resnet_fits,
        frozenset({"0c9bfe0763ec5ad7"}),
        ("norm1", "norm2"),
        {nn.GroupNorm: FusedGroupNorm},
    ),
    Fusion(nn.GroupNorm, FusedGroupNorm, "GroupNorm", _group_norm_fits),
    Fusion(RMSNorm, FusedHeadNorm, "RMSNorm of heads", _head_norm_fits, frozenset({"f201df6f3c975285"})),
)
