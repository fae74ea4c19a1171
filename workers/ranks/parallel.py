"""How a denoiser is spread: tensor parallelism of its attention, feed-forward and modulation layers; the rest is whole on every rank.

Heads of attention and units of a feed-forward layer are independent of each other up to the layer that sums them. Each rank has some,
and one sum over the ranks follows each. Modulations are computed in parts and gathered: their input is one vector per image.

Text encoders and decoders are not spread. DeepSpeed's tensor parallelism is not used: its AutoTP knows the blocks of language models,
and its collectives on CPUs compile code when a worker starts and read a launcher's variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from millijoule.workers.ranks.linear import ColumnParallelLinear, RowParallelLinear

#: Attention processors that take the number of heads from the layer or from the size of what is projected, and mix no heads
#: before the last projection. Each is tried (`tests/workers/ranks/test_parallel.py`).
PROCESSORS = frozenset(
    {
        "AttnProcessor2_0",
        "AuraFlowAttnProcessor2_0",
        "FluxAttnProcessor",
        "HunyuanAttnProcessor2_0",
        "JointAttnProcessor2_0",
        "QwenDoubleStreamAttnProcessor2_0",
        "ZSingleStreamAttnProcessor",
    }
)

#: First layers of a feed-forward network whose two halves meet: by class.
_GATED = ("GEGLU", "SwiGLU")
#: Sequences of an activation and a linear layer that make shifts, scales and gates from a vector per image.
_MODULATIONS = ("img_mod", "txt_mod", "adaLN_modulation")


@dataclass(frozen=True)
class Part:
    """One linear layer to spread: `name` in `owner`, by "column", "row" or "gather", cut into `blocks` (None: one)."""

    owner: nn.Module
    name: str
    how: str
    blocks: tuple[int, ...] | None = None

    @property
    def layer(self) -> nn.Linear:
        return self.owner.get_submodule(self.name)  # type: ignore[return-value]


@dataclass(frozen=True)
class Unit:
    """Layers that are spread together or not at all, and the layer of attention among them whose heads become fewer."""

    parts: tuple[Part, ...]
    attention: Any = None


@dataclass(frozen=True)
class Spread:
    """Numbers of a denoiser's weights: all of them, and what a rank holds of those that are spread and of the others."""

    all: int
    spread: int
    whole: int

    @property
    def share(self) -> float:
        """Of the weights, what one rank holds."""
        return (self.spread + self.whole) / self.all


def spread_module(module: nn.Module, rank: int, ranks: int) -> Spread:
    """Leave in `module`, in place, what rank `rank` of `ranks` computes. What cannot be cut into `ranks` parts stays whole."""
    everything = sum(p.numel() for p in module.parameters())
    spread = 0
    for unit in list(_units(module)):
        if not _divides(unit, ranks):
            continue
        for part in unit.parts:
            layer: nn.Module
            if part.how == "row":
                layer = RowParallelLinear(part.layer, rank, ranks, part.blocks)
            else:
                layer = ColumnParallelLinear(
                    part.layer, rank, ranks, part.blocks, gather=part.how == "gather"
                )
            spread += layer.weight.numel()  # type: ignore[operator]
            part.owner.set_submodule(part.name, layer)
        if unit.attention is not None:
            for name in ("heads", "inner_dim", "inner_kv_dim"):
                if isinstance(value := getattr(unit.attention, name, None), int):
                    setattr(unit.attention, name, value // ranks)
    held = sum(p.numel() for p in module.parameters())
    return Spread(everything, spread, held - spread)


def _units(module: nn.Module) -> Iterator[Unit]:
    """What of `module` can be spread."""
    for name, child in module.named_modules():
        if _is_single_block(child):
            yield _single_block(child)
        elif hasattr(child, "to_q") and hasattr(child, "to_out"):
            if (unit := _attention(child, "to_out.0")) is not None:
                yield unit
        elif unit := _feed_forward(child):
            yield unit
        elif "AdaLayerNorm" in type(child).__name__ and isinstance(getattr(child, "linear", None), nn.Linear):
            yield Unit((Part(child, "linear", "gather"),))
        elif name.rpartition(".")[2] in _MODULATIONS and isinstance(child, nn.Sequential):
            places = [str(i) for i, layer in enumerate(child) if isinstance(layer, nn.Linear)]
            if len(places) == 1:
                yield Unit((Part(child, places[0], "gather"),))


def _attention(attention: Any, out: str | None) -> Unit | None:
    """An attention layer; `out`: its last projection, None: somebody else's."""
    if type(attention.processor).__name__ not in PROCESSORS or getattr(attention, "fused_projections", False):
        return None
    heads, size = attention.heads, attention.to_q.out_features
    if size % heads or attention.to_k.out_features != size:  # heads that share keys
        return None
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        if not _is_per_head(getattr(attention, name, None), size // heads):
            return None
    columns = [
        n
        for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
        if getattr(attention, n, None) is not None
    ]
    rows = [n for n in (out,) if n is not None]
    if getattr(attention, "to_add_out", None) is not None:
        rows.append("to_add_out")
    parts = [Part(attention, n, "column") for n in columns] + [Part(attention, n, "row") for n in rows]
    return Unit(tuple(parts), attention)


def _is_per_head(norm: Any, size: int) -> bool:
    """Whether `norm` (None: nothing) looks at `size` numbers, those of one head, and not at all heads at once."""
    if norm is None:
        return True
    if (weight := getattr(norm, "weight", None)) is not None:
        return weight.numel() == size
    return tuple(getattr(norm, "normalized_shape", ())) == (size,)


def _is_single_block(block: Any) -> bool:
    """Whether attention and feed-forward stand side by side, and one layer reads both (FLUX)."""
    return all(hasattr(block, name) for name in ("attn", "proj_mlp", "proj_out"))


def _single_block(block: Any) -> Unit:
    attention = _attention(block.attn, None)
    inner, hidden = block.attn.to_q.out_features, block.proj_mlp.out_features
    if attention is None or block.proj_out.in_features != inner + hidden:
        return Unit(())
    both = Part(block, "proj_out", "row", (inner, hidden))
    return replace(attention, parts=(*attention.parts, Part(block, "proj_mlp", "column"), both))


def _feed_forward(block: Any) -> Unit | None:
    """Layers up, an activation by units, a layer down."""
    if type(block).__name__ == "FeedForward" and isinstance(getattr(block, "net", None), nn.ModuleList):
        up, down = block.net[0], block.net[2]
        if not isinstance(getattr(up, "proj", None), nn.Linear) or not isinstance(down, nn.Linear):
            return None
        hidden = down.in_features
        blocks = (hidden, hidden) if type(up).__name__ in _GATED else None
        return Unit((Part(block, "net.0.proj", "column", blocks), Part(block, "net.2", "row")))
    for ups, down in ((("w1", "w3"), "w2"), (("linear_1", "linear_2"), "out_projection")):
        names = (*ups, down)
        if "FeedForward" in type(block).__name__ and all(
            isinstance(getattr(block, name, None), nn.Linear) for name in names
        ):
            return Unit((*(Part(block, name, "column") for name in ups), Part(block, down, "row")))
    return None


def _divides(unit: Unit, ranks: int) -> bool:
    if not unit.parts or (unit.attention is not None and unit.attention.heads % ranks):
        return False
    return all(type(part.layer) is nn.Linear and not _uneven(part, ranks) for part in unit.parts)


def _uneven(part: Part, ranks: int) -> bool:
    sizes: Sequence[int] = part.blocks or (
        (part.layer.in_features,) if part.how == "row" else (part.layer.out_features,)
    )
    return any(size % ranks for size in sizes)
