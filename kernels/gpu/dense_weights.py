"""The int8 weights of a dense coupling as a GPU's kernels read them: all, or the blocks that have something in them.

A block is 64 targets by 128 sources. Block-sparse weights have only those blocks in which any weight is not zero; the others are neither
stored nor multiplied, and sums stay the same integers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

#: n is padded to a multiple of this.
PADDING = 128

#: Targets and sources of a block.
BLOCK_ROWS, SOURCES = 64, 128

#: Block-sparse form is taken where so large a share of the blocks, or a smaller one, has something in it: its tiles are half as large as
#: those of the dense form, and read the sources twice as often. A guess until a GPU has measured it.
SPARSE_SHARE = 0.75


@dataclass(frozen=True)
class PackedWeights:
    """Weights on a device, n padded to N.

    Attributes:
        padded: N.
        values: int8 `[N, N]`; block-sparse, `[stored, 64, 128]`, a row of blocks after the other.
        columns: int32 `[stored]`: which 128 sources a block multiplies; empty where weights are dense.
        starts: int32 `[N / 64 + 1]`: of a row of blocks, and at last the end; empty where weights are dense.
        fullest: blocks of the row of blocks that has most; 0 where weights are dense.
    """

    padded: int
    values: Tensor
    columns: Tensor
    starts: Tensor
    fullest: int = 0

    @property
    def sparse(self) -> bool:
        return self.fullest > 0


def pack_weights(weights: Tensor, device: str | torch.device, *, sparse: bool) -> PackedWeights:
    """int8 `[n, n]` on `device`."""
    padded = _padded(weights)
    n = len(padded)
    if not sparse:
        none = torch.zeros(1, dtype=torch.int32, device=device)
        return PackedWeights(n, padded.to(device), none, none)
    blocks = _blocks(padded)
    filled = blocks.flatten(2).any(2)  # [rows of blocks, columns of blocks]
    counts = filled.sum(1)
    if not int(counts.sum()):
        filled[0, 0], counts[0] = True, 1  # there is something to point to
    starts = F.pad(counts.cumsum(0), (1, 0))
    columns = filled.nonzero()[:, 1]
    return PackedWeights(
        n,
        blocks[filled].contiguous().to(device),
        columns.to(device, torch.int32),
        starts.to(device, torch.int32),
        int(counts.max()),
    )


def filled_blocks(weights: Tensor) -> tuple[float, int]:
    """Of int8 `[n, n]`, the share of blocks in which any weight is not zero, and how many the fullest row of blocks has."""
    filled = _blocks(_padded(weights)).flatten(2).any(2)
    return float(filled.float().mean()), int(filled.sum(1).max())


def _padded(weights: Tensor) -> Tensor:
    more = -len(weights) % PADDING
    return F.pad(weights, (0, more, 0, more)).contiguous()


def _blocks(padded: Tensor) -> Tensor:
    """`[N / 64, N / 128, 64, 128]`."""
    n = len(padded)
    return padded.view(n // BLOCK_ROWS, BLOCK_ROWS, n // SOURCES, SOURCES).transpose(1, 2)
