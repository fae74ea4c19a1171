"""Which cells of its window an icon has ink in: a few bits for each noun and size, made from the network itself.

A cell that is not listed shows nothing but background, whatever its pixels are computed to be: all their shares are 0. So it
costs nothing, and leaving it out changes no pixel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.integer_network import IntegerNetwork
from millijoule.workers.scenes.scenes import SIZES

#: Bits of a noun: of each size in a half window, then of each in the whole image.
BITS = len(SIZES) * sum(side * side for side in SIDES)

_BATCH = 64


class InkCells:
    """`packed` uint8 `[nouns, BITS / 8]`."""

    def __init__(self, packed: Tensor) -> None:
        if packed.dtype != torch.uint8 or packed.shape[1:] != (BITS // 8,):
            raise ValueError(f"ink cells {list(packed.shape)}, {packed.dtype}")
        self.packed = packed
        bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1)).bool().to(packed.device)
        parts = bits.split([len(SIZES) * side * side for side in SIDES], 1)
        self._inked = [part.unflatten(1, (len(SIZES), -1)) for part in parts]

    def cells(self, noun: Tensor, size: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """The cells of some icons, icon by icon: which of the icons, and which cell of its window; int64 `[cells]` both."""
        icon, cell = self._inked[whole][noun, size].nonzero(as_tuple=True)
        return icon, cell

    def inked(self, whole: bool) -> Tensor:
        """Whether an icon has ink in a cell of its window, bool `[nouns, sizes, cells]`."""
        return self._inked[whole]

    def counts(self, whole: bool) -> Tensor:
        """How many cells each noun has at each size, int64 `[nouns, sizes]`."""
        return self._inked[whole].sum(2)

    def to(self, device: str) -> InkCells:
        return InkCells(self.packed.to(device))

    @staticmethod
    @torch.inference_mode()
    def of(network: IntegerNetwork) -> InkCells:
        """Compute every cell of every icon, and list those in which a share is not 0."""
        nouns = len(network.codes)
        found = []
        for whole, side in enumerate(SIDES):
            inked = torch.zeros(nouns, len(SIZES), side * side, dtype=torch.bool)
            for size in range(len(SIZES)):
                for noun in torch.arange(nouns).split(_BATCH):
                    variant = torch.full_like(noun, whole * VARIANTS // 2 + size)
                    icon = torch.arange(len(noun)).repeat_interleave(side * side)
                    cell = torch.arange(side * side).repeat(len(noun))
                    shares = network.shares(network.phases(noun, variant), bool(whole), icon, cell)
                    inked[noun, size] = (shares != 0).any(1).view(len(noun), -1)
            found.append(inked.flatten(1))
        return InkCells(torch.from_numpy(np.packbits(torch.cat(found, 1).numpy(), axis=1)))
