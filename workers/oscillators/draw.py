"""From scenes to images: every shape of a batch is drawn once, and only the cells that it has ink in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millijoule.workers.oscillators.canvas import Icons, Variation, ground, lay, window_covers
from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.ink import InkCells
from millijoule.workers.oscillators.integer_network import IntegerNetwork


@dataclass(frozen=True)
class Painter:
    """All that a model is: the network, the cells it draws, and levels of colours and grounds, int64 `[n, 3]`."""

    network: IntegerNetwork
    ink: InkCells
    colours: Tensor
    grounds: Tensor

    @torch.inference_mode()
    def draw(
        self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None, *, dense: bool = False
    ) -> np.ndarray:
        """Images uint8 `[images, 64, 64, 3]` of completed scenes as `scene_tokens` has them, from uint64 seeds.

        `dense` computes all cells of the icons' windows, to the same pixels.
        """
        variation = Variation.of(seeds)
        images = ground(torch.from_numpy(tokens[:, -1]), self.grounds, variation)
        icons = Icons.of(tokens)
        for whole in (False, True):
            some = icons.chosen(icons.whole == whole)
            if not len(some.image):
                continue
            key, of_icon = torch.unique(some.noun * VARIANTS + some.size, return_inverse=True)
            noun, size = key // VARIANTS, key % VARIANTS
            phases = self.network.phases(noun, size + VARIANTS // 2 * whole, steps)
            if dense:
                side = SIDES[whole]
                icon = torch.arange(len(key)).repeat_interleave(side * side)
                cell = torch.arange(side * side).repeat(len(key))
            else:
                icon, cell = self.ink.cells(noun, size, whole)
            shares = self.network.shares(phases, whole, icon, cell)
            covers = window_covers(shares, icon, cell, len(key), whole)
            lay(images, some, covers, of_icon, self.colours, variation)
        return images.to(torch.uint8).numpy()
