"""Images laid out of icons, in integers: ground, places, colours, and what a seed varies.

Two true images of one scene differ in where its icons stand, by up to a pixel, and in the lightness of each of their colours.
Both are drawn from the seed here, as whole numbers; the network says nothing of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.phase import TURN, random_phases
from millijoule.workers.oscillators.config import SIDES
from millijoule.workers.scenes.scenes import (
    CELL,
    ICON_TOKENS,
    IMAGE_SIZE,
    JITTER,
    MAX_COUNT,
    SHADE,
    WINDOWS,
)

_SHADES = 1 + MAX_COUNT
_NOISE = 16  # numbers of a seed: shades, then shifts in x and y of each icon; a multiple of 4


@dataclass(frozen=True)
class Icons:
    """The icons of some images, image by image: all int64 `[icons]`. `noun`, `colour`, `size` and `window` are indices."""

    image: Tensor
    slot: Tensor
    noun: Tensor
    colour: Tensor
    size: Tensor
    window: Tensor

    @staticmethod
    def of(tokens: Tensor) -> Icons:
        """From `scenes.scene_tokens`."""
        icons = tokens[:, :-1].reshape(len(tokens), MAX_COUNT, ICON_TOKENS)
        image, slot = (icons[..., 0] > 0).nonzero(as_tuple=True)
        noun, colour, size, window = (icons[image, slot] - 1).unbind(1)
        return Icons(image, slot, noun, colour, size, window)

    @property
    def whole(self) -> Tensor:
        """Whether an icon stands in the whole image, bool `[icons]`."""
        sides = torch.tensor([side for *_, side in WINDOWS], device=self.window.device)
        return sides[self.window] == max(SIDES)

    def chosen(self, which: Tensor) -> Icons:
        return Icons(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Variation:
    """What seeds vary: `shade` int64 `[images, 1 + MAX_COUNT]` in levels, of the ground first, and `shift` int64
    `[images, MAX_COUNT, 2]` in pixels, x and y."""

    shade: Tensor
    shift: Tensor

    @staticmethod
    def of(seeds: np.ndarray, device: str = "cpu") -> Variation:
        """Uniform whole numbers from uint64 seeds `[images]`."""
        noise = random_phases(seeds, _NOISE).to(device, torch.int64)
        shade = (noise[:, :_SHADES] * (2 * SHADE + 1)).div(TURN, rounding_mode="floor") - SHADE
        shift = (noise[:, _SHADES : _SHADES + 2 * MAX_COUNT] * (2 * JITTER + 1)).div(
            TURN, rounding_mode="floor"
        )
        return Variation(shade, (shift - JITTER).view(-1, MAX_COUNT, 2))


def ground(background: Tensor, paint: Tensor, variation: Variation) -> Tensor:
    """Images of nothing but their ground, int32 `[images, 64, 64, 3]`; `paint` int64 `[backgrounds, 3]` in levels."""
    levels = (paint[background] + variation.shade[:, :1]).clamp_(0, 255).to(torch.int32)
    return levels[:, None, None].repeat(1, IMAGE_SIZE, IMAGE_SIZE, 1)


def lay(
    images: Tensor, icons: Icons, cover: Tensor, of_icon: Tensor, paint: Tensor, variation: Variation
) -> None:
    """Paint icons, all in one kind of window, on `images`; windows of an image do not overlap.

    Args:
        cover: shares uint8 `[shapes, pixels, pixels]` of windows.
        of_icon: which of the shapes each icon has, int64 `[icons]`.
        paint: levels of the colours, int64 `[colours, 3]`.
    """
    pixels = cover.shape[-1]
    shift = variation.shift[icons.image, icons.slot]
    corner = torch.tensor([(x, y) for x, y, _ in WINDOWS], device=shift.device)[icons.window] * CELL
    steps = torch.arange(pixels, device=shift.device)
    x, y = (steps - shift[:, axis, None] for axis in (0, 1))  # of the window, where a pixel's share stands
    inside = [(at >= 0) & (at < pixels) for at in (x, y)]
    share = cover[of_icon[:, None, None], y.clamp(0, pixels - 1)[:, :, None], x.clamp(0, pixels - 1)[:, None]]
    share = (share * (inside[1][:, :, None] & inside[0][:, None]))[..., None].to(torch.int32)
    ink = (
        (paint[icons.colour] + variation.shade[icons.image, 1 + icons.slot, None])
        .clamp_(0, 255)
        .to(torch.int32)
    )
    columns, rows = (corner[:, axis, None] + steps for axis in (0, 1))
    at = icons.image[:, None, None], rows[:, :, None], columns[:, None]
    under = images[at]
    images[at] = (under * (255 - share) + ink[:, None, None] * share + 127).div_(255, rounding_mode="floor")


def window_covers(shares: Tensor, icon: Tensor, cell: Tensor, shapes: int, whole: bool) -> Tensor:
    """Shares of listed cells uint8 `[cells, 64]` put together to windows, uint8 `[shapes, pixels, pixels]`; 0 elsewhere."""
    side = SIDES[whole]
    covers = shares.new_zeros(shapes, side * side, CELL * CELL)
    covers[icon, cell] = shares
    covers = covers.view(shapes, side, side, CELL, CELL).transpose(2, 3)
    return covers.reshape(shapes, side * CELL, side * CELL)
