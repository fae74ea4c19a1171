"""Linear layers of which each rank holds a part: by columns of the output, or by rows of the input (Megatron-LM, arXiv 1909.08053).

A pair of them, column first, needs one sum over the ranks. Collectives are those of the default group of `torch.distributed`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional


class ColumnParallelLinear(nn.Module):
    """Rank r computes its part of the output features: `y_r = x W_r^T + b_r`.

    Args:
        whole: the layer it stands for; weight `[out, in]`.
        rank, ranks: whose part, of how many.
        blocks: sizes of the parts that the output is cut into by who reads it, each of which is spread for itself.
        gather: give every rank the whole output, in order.
    """

    def __init__(
        self,
        whole: nn.Linear,
        rank: int,
        ranks: int,
        blocks: Sequence[int] | None = None,
        *,
        gather: bool = False,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features // ranks
        self.ranks, self.gather = ranks, gather
        places = part_of(blocks or [whole.out_features], rank, ranks)
        self.weight = _kept(whole.weight, 0, places)
        self.bias = None if whole.bias is None else _kept(whole.bias, 0, places)
        self.train(whole.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out / ranks]`, or to `[..., out]` where outputs are gathered."""
        y = functional.linear(x, self.weight, self.bias)
        if not self.gather:
            return y
        parts = [torch.empty_like(y) for _ in range(self.ranks)]
        dist.all_gather(parts, y.contiguous())
        return torch.cat(parts, dim=-1)


class RowParallelLinear(nn.Module):
    """Rank r has its part of the input features, and all get the sum: `y = sum over r of (x_r W_r^T) + b`.

    Arguments as for `ColumnParallelLinear`; `blocks` cut the input, weight `[out, in]` by its second dimension. The bias is whole.
    """

    def __init__(self, whole: nn.Linear, rank: int, ranks: int, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features // ranks, whole.out_features
        self.weight = _kept(whole.weight, 1, part_of(blocks or [whole.in_features], rank, ranks))
        self.bias = whole.bias
        self.train(whole.training)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in / ranks]` to `[..., out]`."""
        y = functional.linear(x, self.weight).contiguous()
        dist.all_reduce(y)
        return y if self.bias is None else y + self.bias


def part_of(blocks: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Places of `rank`'s part of features that come in `blocks`, each of a size that `ranks` divides."""
    starts = [sum(blocks[:i]) for i in range(len(blocks))]
    return torch.cat(
        [
            torch.arange(start + rank * (size // ranks), start + (rank + 1) * (size // ranks))
            for start, size in zip(starts, blocks, strict=True)
        ]
    )


def _kept(weight: Tensor, dim: int, places: Tensor) -> nn.Parameter:
    """A copy of a part, so that nothing holds the whole."""
    if weight.is_meta:
        shape = list(weight.shape)
        shape[dim] = len(places)
        return nn.Parameter(weight.new_empty(shape), requires_grad=False)
    return nn.Parameter(weight.detach().index_select(dim, places.to(weight.device)), requires_grad=False)
