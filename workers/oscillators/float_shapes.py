"""A network in training drawn from as it stands, with its rounding but without an integer form: for controls, some of which have none."""

from __future__ import annotations

import torch
from torch import Tensor

from millijoule.workers.oscillators.config import VARIANTS
from millijoule.workers.oscillators.float_network import FloatNetwork


class FloatShapes:
    """`network` with the two calls of an `IntegerNetwork` that `draw.Drawing` and `ink.InkCells` make.

    Its images differ from the integer form's where a rounding falls otherwise, and between machines.
    """

    def __init__(self, network: FloatNetwork) -> None:
        self.network, self.config = network, network.config
        self.codes = network.code.weight

    def phases(self, noun: Tensor, variant: Tensor, steps: int | None = None) -> Tensor:
        """Sine and cosine of the final phases of icons, all in one kind of window, float32 `[icons, cells, 2 channels]`."""
        if steps not in (None, self.config.steps):
            raise ValueError("a network in training has its own number of steps")
        half = VARIANTS // 2
        whole = bool(len(variant)) and int(variant[0]) >= half
        drives = self.network.drives(noun, variant % half, whole, True)
        return torch.cat(self.network.waves(*drives, True), 2)

    def shares(self, phases: Tensor, whole: bool, icon: Tensor, cell: Tensor) -> Tensor:
        """See `IntegerNetwork.shares`; all cells are computed."""
        logits = self.network.decode(phases, whole, True).flatten(1, 2)[icon, cell]
        return torch.round(255 * torch.sigmoid(logits)).to(torch.uint8)

    def to(self, device: str) -> FloatShapes:
        return FloatShapes(self.network.to(device))
