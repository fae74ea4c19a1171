"""From scenes to images: every shape of a batch is drawn once, and only the cells that it has ink in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.oscillators.canvas import Icons, Variation, ground, lay, window_covers
from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.gpu_drawing import open_image_kernel, seed_bits
from millijoule.workers.oscillators.ink import InkCells
from millijoule.workers.oscillators.integer_network import IntegerNetwork
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, PALETTE


@dataclass(frozen=True)
class Painter:
    """All that a model is: the network, the cells it draws, and levels of colours and grounds, int64 `[n, 3]`."""

    network: IntegerNetwork
    ink: InkCells
    colours: Tensor
    grounds: Tensor

    @staticmethod
    def of(network: IntegerNetwork) -> Painter:
        """With the cells that `network` draws, and the domain's colours."""
        colours, grounds = (torch.tensor([PALETTE[c] for c in names]) for names in (COLOURS, BACKGROUNDS))
        return Painter(network, InkCells.of(network), colours, grounds)

    def to(self, device: str) -> Painter:
        return Painter(
            self.network.to(device), self.ink.to(device), self.colours.to(device), self.grounds.to(device)
        )


class ShapeNetwork(nn.Module):
    """`IntegerNetwork` as a module, which engines can run: tensors in, a tensor out, the same bits in all of them."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self._network = network

    def forward(
        self, noun: Tensor, size: Tensor, icon: Tensor, cell: Tensor, *, whole: bool, steps: int | None = None
    ) -> Tensor:
        """Shares uint8 `[asked, 64]` of cells of shapes in one kind of window; see `IntegerNetwork`."""
        phases = self._network.phases(noun, size + VARIANTS // 2 * whole, steps)
        return self._network.shares(phases, whole, icon, cell)


class Drawing:
    """A painter on a device, its network run by an engine; on a GPU, PyTorch's own becomes our kernels, to the same pixels.

    Args:
        engine: None runs it plainly.

    Attributes:
        shapes: the network, prepared by the engine.
    """

    def __init__(self, painter: Painter, device: str = "cpu", engine: Engine | None = None) -> None:
        self.painter = painter.to(device)
        self.device = device
        network = ShapeNetwork(self.painter.network)
        # how many shapes and cells there are differs from batch to batch
        engine = engine or EagerEngine()
        self.shapes = engine.prepare(network, "shapes", static=False)
        self._kernel = None
        if isinstance(engine, EagerEngine):  # another engine was asked for to run the network itself
            parts = (self.painter.network, self.painter.ink, self.painter.colours, self.painter.grounds)
            self._kernel = open_image_kernel(*parts, device, self.draw)

    @torch.inference_mode()
    def draw(
        self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None, *, dense: bool = False
    ) -> np.ndarray:
        """Images uint8 `[images, 64, 64, 3]` of completed scenes as `scene_tokens` has them, from uint64 seeds.

        `dense` computes all cells of the icons' windows, to the same pixels.
        """
        if self._kernel is not None and not dense:
            return self._kernel.draw(torch.from_numpy(tokens), seed_bits(seeds), steps).cpu().numpy()
        painter = self.painter
        rows = torch.from_numpy(tokens).to(self.device)
        variation = Variation.of(seeds, self.device)
        images = ground(rows[:, -1], painter.grounds, variation)
        icons = Icons.of(rows)
        for whole, side in enumerate(SIDES):
            some = icons.chosen(icons.whole == bool(whole))
            if not len(some.image):
                continue
            key, of_icon = torch.unique(some.noun * VARIANTS + some.size, return_inverse=True)
            noun, size = key // VARIANTS, key % VARIANTS
            if dense:
                icon = torch.arange(len(key), device=self.device).repeat_interleave(side * side)
                cell = torch.arange(side * side, device=self.device).repeat(len(key))
            else:
                icon, cell = painter.ink.cells(noun, size, bool(whole))
            shares = self.shapes(noun, size, icon, cell, whole=bool(whole), steps=steps)
            covers = window_covers(shares, icon, cell, len(key), bool(whole))
            lay(images, some, covers, of_icon, painter.colours, variation)
        return images.to(torch.uint8).cpu().numpy()
