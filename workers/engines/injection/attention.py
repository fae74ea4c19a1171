"""Attention layers whose queries and keys are normed, rotated and put into the joint sequence in one pass.

The attention itself is the one that is chosen for the layer (diffusers' `dispatch_attention_fn`). A layer with a processor of
another kind, such as an image prompt's adapter, runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    _get_qkv_projections,
)
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import Tensor, nn

from millijoule.workers.engines.injection.fused import OTHER_VERSION, Fusion
from millijoule.workers.engines.injection.known_forms import digest_of
from millijoule.workers.engines.injection.norms import FusedHeadNorm, FusedRMSNorm

#: Rows of cosines and sines for the tokens of one stream.
Rotation = tuple[Tensor, Tensor] | tuple[None, None]
UNROTATED: Rotation = (None, None)


class FusedFluxAttention(FluxAttention):
    """FLUX: text before image, one rotation over both."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        """See `FluxAttention`."""
        joint = encoder_hidden_states is not None and self.added_kv_proj_dim is not None
        if type(self.processor) is not FluxAttnProcessor or joint != (self.added_kv_proj_dim is not None):
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **kwargs
            )
        query, key, value, *text = (
            None if t is None else t.unflatten(-1, (-1, self.head_dim))
            for t in _get_qkv_projections(self, hidden_states, encoder_hidden_states if joint else None)[
                : 6 if joint else 3
            ]
        )
        cos, sin = UNROTATED
        if image_rotary_emb is not None:  # [tokens, width], every value twice
            cos, sin = (t.to(query.device)[:, ::2] for t in image_rotary_emb)
        if not joint:
            query, key = self.norm_q(query, cos, sin), self.norm_k(key, cos, sin)
            return _attend(self, query, key, value, attention_mask).flatten(2)
        tokens = text[0].shape[1]
        first, second = ((None, None), (None, None))
        if cos is not None and sin is not None:
            first, second = (cos[:tokens], sin[:tokens]), (cos[tokens:], sin[tokens:])
        query = _join(text[0], query, self.norm_added_q, self.norm_q, first, second)
        key = _join(text[1], key, self.norm_added_k, self.norm_k, first, second)
        value = torch.cat([text[2], value], dim=1)
        out = _attend(self, query, key, value, attention_mask).flatten(2)
        image = self.to_out[1](self.to_out[0](out[:, tokens:].contiguous()))
        return image, self.to_add_out(out[:, :tokens].contiguous())


class FusedQwenAttention(Attention):
    """Qwen-Image: text before image, each with rotations of its own."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Any:
        """See `QwenDoubleStreamAttnProcessor2_0`."""
        more = dict(cross_attention_kwargs)
        mask, rotation = more.pop("encoder_hidden_states_mask", None), more.pop("image_rotary_emb", None)
        known = type(self.processor) is QwenDoubleStreamAttnProcessor2_0
        if not known or more or attention_mask is not None or encoder_hidden_states is None:
            return super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
        tokens = encoder_hidden_states.shape[1]
        if mask is not None:
            image_mask = mask.new_ones((len(mask), hidden_states.shape[1]), dtype=torch.bool)
            attention_mask = torch.cat([mask, image_mask], dim=1)[:, None, None, :]
        head = self.inner_dim // self.heads
        image_turn, text_turn = UNROTATED, UNROTATED
        if rotation is not None:  # complex [tokens, width / 2]
            image_turn, text_turn = ((turn.real, turn.imag) for turn in rotation)

        def heads(project: nn.Module, x: Tensor) -> Tensor:
            return project(x).unflatten(-1, (-1, head))

        query = _join(
            heads(self.add_q_proj, encoder_hidden_states), heads(self.to_q, hidden_states),
            self.norm_added_q, self.norm_q, text_turn, image_turn,
        )  # fmt: skip
        key = _join(
            heads(self.add_k_proj, encoder_hidden_states), heads(self.to_k, hidden_states),
            self.norm_added_k, self.norm_k, text_turn, image_turn,
        )  # fmt: skip
        value = torch.cat(
            [heads(self.add_v_proj, encoder_hidden_states), heads(self.to_v, hidden_states)], dim=1
        )
        out = _attend(self, query, key, value, attention_mask).flatten(2)
        image = self.to_out[0](out[:, tokens:].contiguous())
        if len(self.to_out) > 1:
            image = self.to_out[1](image)
        return image, self.to_add_out(out[:, :tokens].contiguous())


def _join(
    text: Tensor,
    image: Tensor,
    text_norm: Any,
    image_norm: Any,
    text_turn: Rotation,
    image_turn: Rotation,
) -> Tensor:
    """`[n, tokens, heads, width]` of both streams, each normed and rotated into its place."""
    n, tokens = text.shape[:2]
    joint = text.new_empty((n, tokens + image.shape[1], *text.shape[2:]))
    text_norm(text, *text_turn, out=joint[:, :tokens])
    image_norm(image, *image_turn, out=joint[:, tokens:])
    return joint


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    processor = attn.processor
    out = dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return out.to(query.dtype)


_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


_FUSED_NORM: dict[type[nn.Module], type[nn.Module]] = {nn.RMSNorm: FusedRMSNorm, RMSNorm: FusedHeadNorm}


def _norms_fit(module: nn.Module) -> str:
    for name in _NORMS:
        norm = getattr(module, name, None)
        if norm is not None and type(norm) not in (*_FUSED_NORM, *_FUSED_NORM.values()):
            return f"its {name} is {type(norm).__name__}"
    return ""


def _flux_fits(module: nn.Module) -> str:
    if type(module.processor) is not FluxAttnProcessor:
        return f"its processor is {type(module.processor).__name__}"
    return _norms_fit(module) or _text_differs(FluxAttnProcessor, _FLUX)


def _qwen_fits(module: nn.Module) -> str:
    if type(module.processor) is not QwenDoubleStreamAttnProcessor2_0:
        return "no fused form wins over PyTorch's attention"
    if any(getattr(module, name, None) is None for name in _NORMS):
        return "it norms no queries"
    return _norms_fit(module) or _text_differs(QwenDoubleStreamAttnProcessor2_0, _QWEN)


def _text_differs(processor: type, known: frozenset[str]) -> str:
    if digest_of(processor.__call__) in known:
        return ""
    return OTHER_VERSION


_FLUX, _QWEN = frozenset({"b04b58af9e39b63d"}), frozenset({"8d0e4b672f22ea99"})

FUSIONS = (
    Fusion(
        FluxAttention,
        FusedFluxAttention,
        "QK norm + rotation",
        _flux_fits,
        frozenset({"7fc9c3baa1e51c9a"}),
        _NORMS,
        _FUSED_NORM,
    ),
    Fusion(
        Attention,
        FusedQwenAttention,
        "QK norm + rotation",
        _qwen_fits,
        frozenset({"9c4251032098683a"}),
        _NORMS,
        _FUSED_NORM,
    ),
)
