"""From scenes to images: every shape of a batch is drawn once, and only the cells that it has ink in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from millijoule.kernels.image import GROUPS, ImageKernel, ImageWeights
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.engines.protocol import Engine
from millijoule.workers.oscillators.canvas import Icons, Variation, ground, lay, window_covers
from millijoule.workers.oscillators.config import SIDES, VARIANTS
from millijoule.workers.oscillators.gpu_kernel import gpu_kernel
from millijoule.workers.oscillators.ink import InkCells
from millijoule.workers.oscillators.integer_network import SHARES, IntegerNetwork
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, JITTER, PALETTE, SHADE, WINDOWS


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

    def kernel_weights(self) -> ImageWeights:
        """As the compiled kernel takes them; the painter is on a CPU."""
        network, config = self.network, self.network.config
        layers = {name: getattr(network, name) for name in GROUPS}
        return ImageWeights(
            channels=config.channels,
            steps=config.steps,
            horizon=config.horizon,
            layers={name: (of.weights, of.bias, of.multiplier) for name, of in layers.items()},
            codes=network.codes,
            sizes=network.sizes,
            place=network.place,
            coupling=network.coupling,
            ink=(self.ink.inked(False), self.ink.inked(True)),
            colours=self.colours,
            grounds=self.grounds,
            windows=torch.tensor(WINDOWS),
            shares=SHARES,
            shade=SHADE,
            jitter=JITTER,
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


class _Kernel(Protocol):
    def draw(self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None) -> np.ndarray: ...


class Drawing:
    """A painter on a device.

    Args:
        engine: runs the network. None: the compiled kernel draws where there is one (`kernels.image`; on a GPU
            `kernels.gpu.image`), else PyTorch as it is; the pixels are the same.

    Attributes:
        kernel: what draws; None: `shapes` does.
        shapes: the network, prepared by the engine.
    """

    def __init__(self, painter: Painter, device: str = "cpu", engine: Engine | None = None) -> None:
        self.painter = painter.to(device)
        self.device = device
        network = ShapeNetwork(self.painter.network)
        # how many shapes and cells there are differs from batch to batch
        self.shapes = (engine or EagerEngine()).prepare(network, "shapes", static=False)
        self.kernel: _Kernel | None = None
        ours = engine is None and isinstance(painter.network, IntegerNetwork)
        if ours and device == "cpu":
            self.kernel = ImageKernel.of(painter.kernel_weights())
        elif ours and device.startswith("cuda"):
            self.kernel = gpu_kernel(painter.kernel_weights(), device, self.draw)

    @torch.inference_mode()
    def draw(
        self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None, *, dense: bool = False
    ) -> np.ndarray:
        """Images uint8 `[images, 64, 64, 3]` of completed scenes as `scene_tokens` has them, from uint64 seeds.

        `dense` computes all cells of the icons' windows, to the same pixels.
        """
        if self.kernel is not None and not dense:
            return self.kernel.draw(tokens, seeds, steps)
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
