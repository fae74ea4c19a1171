"""Transformer blocks that normalise and modulate between their layers themselves, rather than by an adaptive norm.

Gate, residual, norm and modulation that follow each other are one pass (`gated_ada_layer_norm`); a gate and residual alone are
PyTorch's `addcmul`. The layers between are called as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from millijoule.kernels.ada_layer_norm import ada_layer_norm, gated_ada_layer_norm
from millijoule.workers.engines.injection.ada_layer_norm import is_plain
from millijoule.workers.engines.injection.fused import OTHER_VERSION, Fits, Fusion
from millijoule.workers.engines.injection.known_forms import digest_of

#: What float16 holds: some blocks keep their output within it.
HALF_LIMIT = 65504


def gated(residual: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """residual + gate * update, for a gate `[n, width]`."""
    return torch.addcmul(residual, gate[:, None], update)


def within_half(x: Tensor) -> Tensor:
    """`x`, clipped where it is float16."""
    return x.clip(-HALF_LIMIT, HALF_LIMIT) if x.dtype == torch.float16 else x


class FusedFluxTransformerBlock(FluxTransformerBlock):
    """Both streams' norms before their feed-forward layers."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `FluxTransformerBlock`."""
        image, gate, shift, scale, gate_mlp = self.norm1(hidden_states, emb=temb)
        text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(
            encoder_hidden_states, emb=temb
        )
        image, text, *adapters = self.attn(
            hidden_states=image,
            encoder_hidden_states=text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
        )
        hidden, image = gated_ada_layer_norm(hidden_states, gate, image, scale, shift, self.norm2.eps)
        hidden = gated(hidden, gate_mlp, self.ff(image))
        for adapter in adapters:  # of an image prompt
            hidden = hidden + adapter
        context, text = gated_ada_layer_norm(
            encoder_hidden_states, text_gate, text, text_scale, text_shift, self.norm2_context.eps
        )
        context = gated(context, text_gate_mlp, self.ff_context(text))
        return within_half(context), hidden


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """Its gate and residual; norm and attention have fused forms of their own."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `FluxSingleTransformerBlock`."""
        tokens = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        x, gate = self.norm(residual, emb=temb)
        middle = self.act_mlp(self.proj_mlp(x))
        attended = self.attn(
            hidden_states=x, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        out = within_half(gated(residual, gate, self.proj_out(torch.cat([attended, middle], dim=2))))
        return out[:, :tokens], out[:, tokens:]


class FusedJointTransformerBlock(JointTransformerBlock):
    """Stable Diffusion 3's: both streams' norms before their feed-forward layers."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See `JointTransformerBlock`."""
        if self._chunk_size is not None:  # feed-forward layers in parts, to save memory
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        more = joint_attention_kwargs or {}
        image, gate, shift, scale, gate_mlp, *dual = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            text = self.norm1_context(encoder_hidden_states, temb)
        else:
            text, text_gate, text_shift, text_scale, text_gate_mlp = self.norm1_context(
                encoder_hidden_states, emb=temb
            )
        image, text = self.attn(hidden_states=image, encoder_hidden_states=text, **more)
        if self.use_dual_attention:
            hidden_states = gated(hidden_states, gate, image)
            second, gate = dual
            image = self.attn2(hidden_states=second, **more)
        hidden, image = gated_ada_layer_norm(hidden_states, gate, image, scale, shift, self.norm2.eps)
        hidden = gated(hidden, gate_mlp, self.ff(image))
        if self.context_pre_only:
            return None, hidden
        context, text = gated_ada_layer_norm(
            encoder_hidden_states, text_gate, text, text_scale, text_shift, self.norm2_context.eps
        )
        return gated(context, text_gate_mlp, self.ff_context(text)), hidden


class FusedSanaTransformerBlock(SanaTransformerBlock):
    """Both norms with their modulation, which is a table plus the timestep's."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """See `SanaTransformerBlock`."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self, timestep, len(hidden_states))
        x = ada_layer_norm(hidden_states, scale, shift, self.norm1.eps).to(hidden_states.dtype)
        hidden = gated(hidden_states, gate, self.attn1(x))
        if self.attn2 is not None:
            hidden = hidden + self.attn2(
                hidden, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        x = ada_layer_norm(hidden, scale_mlp, shift_mlp, self.norm2.eps)
        x = self.ff(x.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return gated(hidden, gate_mlp, x.flatten(2, 3).permute(0, 2, 1))


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """PixArt's (`ada_norm_single`): both norms with their modulation."""

    norm1: Any
    norm2: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """See `BasicTransformerBlock`."""
        if self._chunk_size is not None or cross_attention_kwargs or hidden_states.dim() != 3:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _modulation(self, timestep, len(hidden_states))
        x = self.attn1(
            ada_layer_norm(hidden_states, scale, shift, self.norm1.eps),
            encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
            attention_mask=attention_mask,
        )
        hidden = gated(hidden_states, gate, x)
        if self.attn2 is not None:
            hidden = hidden + self.attn2(
                hidden, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        x = ada_layer_norm(hidden, scale_mlp, shift_mlp, self.norm2.eps)
        return gated(hidden, gate_mlp, self.ff(x))


def _modulation(block: Any, timestep: Tensor | None, n: int) -> tuple[Tensor, ...]:
    """Six rows `[n, width]` for each image, from a block's table and the timestep's embedding."""
    assert timestep is not None
    return (block.scale_shift_table[None] + timestep.reshape(n, 6, -1)).unbind(1)


class FusedQwenImageTransformerBlock(QwenImageTransformerBlock):
    """Norms without weights pass on what they are given; what modulates it then does both."""

    modulated_norm: nn.LayerNorm

    def _modulate(self, x: Tensor, mod_params: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `QwenImageTransformerBlock`: norm and modulation of x, and the gate."""
        if index is not None:  # rows that differ within an image
            return super()._modulate(self.modulated_norm(x), mod_params, index)
        shift, scale, gate = mod_params.chunk(3, dim=-1)
        return ada_layer_norm(x, scale, shift, self.modulated_norm.eps), gate[:, None]


class _QwenFusion(Fusion):
    def become(self, module: nn.Module) -> nn.Module:
        """The four norms are alike and have no weights: one is kept."""
        norm = module.img_norm1
        for name in _QWEN_NORMS:
            setattr(module, name, nn.Identity())
        super().become(module)
        module.__dict__["modulated_norm"] = norm  # a part that `state_dict` and repr need not know
        return module


_QWEN_NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")


def _norms_fit(*names: str) -> Fits:
    def fits(module: nn.Module) -> str:
        norms = [getattr(module, name) for name in names]
        return "" if all(is_plain(norm) for norm in norms if norm is not None) else "its norms have weights"

    return fits


def _pixart_fits(module: nn.Module) -> str:
    assert isinstance(module, BasicTransformerBlock)
    if module.norm_type != "ada_norm_single":
        return (
            "it modulates nothing" if module.norm_type == "layer_norm" else f"its norm is {module.norm_type}"
        )
    if module.pos_embed is not None or hasattr(module, "fuser"):
        return "it has more parts than PixArt's"
    return _norms_fit("norm1", "norm2")(module)


def _qwen_fits(module: nn.Module) -> str:
    if digest_of(QwenImageTransformerBlock._modulate) != "7c06d6b0ba815c58":
        return OTHER_VERSION
    if len({getattr(module, name).eps for name in _QWEN_NORMS}) > 1:
        return "its norms differ"
    return _norms_fit(*_QWEN_NORMS)(module)


FUSIONS = (
    Fusion(
        FluxTransformerBlock,
        FusedFluxTransformerBlock,
        "AdaLN and gates of a block",
        _norms_fit("norm2", "norm2_context"),
        frozenset({"f927a2eeb97fb45b"}),
        ("norm2", "norm2_context"),
    ),
    Fusion(
        FluxSingleTransformerBlock,
        FusedFluxSingleTransformerBlock,
        "gate of a block",
        known=frozenset({"4f5de605a69f2733"}),
    ),
    Fusion(
        JointTransformerBlock,
        FusedJointTransformerBlock,
        "AdaLN and gates of a block",
        _norms_fit("norm2", "norm2_context"),
        frozenset({"695435b3f9628a35"}),
        ("norm2", "norm2_context"),
    ),
    Fusion(
        SanaTransformerBlock,
        FusedSanaTransformerBlock,
        "AdaLN of a block",
        _norms_fit("norm1", "norm2"),
        frozenset({"34ffc52902fde8ee"}),
        ("norm1", "norm2"),
    ),
    Fusion(
        BasicTransformerBlock,
        FusedBasicTransformerBlock,
        "AdaLN of a block",
        _pixart_fits,
        frozenset({"def32e411be0e867"}),
        ("norm1", "norm2"),
    ),
    _QwenFusion(
        QwenImageTransformerBlock,
        FusedQwenImageTransformerBlock,
        "AdaLN of a block",
        _qwen_fits,
        frozenset({"9f3122ca517d2042"}),
        _QWEN_NORMS,
    ),
)


def know_as_blocks() -> None:
    """Tell diffusers' hooks, which look blocks up by their class, that a fused block is called as its original is."""
    for fusion in FUSIONS:
        try:
            metadata = TransformerBlockRegistry.get(fusion.original)
        except ValueError:  # none of those they can skip
            continue
        TransformerBlockRegistry.register(fusion.fused, copy.copy(metadata))


know_as_blocks()
