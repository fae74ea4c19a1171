"""True images of icon scenes, rendered many at once from an icon font.

Icons are glyphs of Material Design Icons (Apache-2.0), found in the `qtawesome` package (the `train` extra) without
importing it. Models are trained on these renders and judged against them; drawing from a model needs none of this.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.scenes.scenes import (
    CELL,
    IMAGE_SIZE,
    MAX_COUNT,
    NOUN_GLYPHS,
    NOUNS,
    PALETTE,
    SIZES,
    WINDOWS,
    Scene,
    icons,
)

#: Side of an icon's em box in pixels, by size, in the whole image and in a half window. Its ink is a little smaller.
ICON_PIXELS = {8: (30, 42, 56), 4: (20, 25, 30)}

_JITTER = 1  # pixels; each icon moves by -1, 0 or 1 in x and in y
_SHADE = 14  # levels; the lightness of each colour moves by at most this much
_SUPERSAMPLING = 8
_MARGIN = 4  # empty pixels around the atlas' tiles, so that what lies outside a tile reads as empty


def find_icon_font() -> tuple[Path, dict[str, int]]:
    """Path of the Material Design Icons font and its map from glyph name to code point.

    Raises:
        InputError: the package that carries the font is not installed.
    """
    spec = importlib.util.find_spec("qtawesome")  # importing it would need Qt
    folders = list(spec.submodule_search_locations or ()) if spec else []
    fonts = sorted(Path(folders[0], "fonts").glob("materialdesignicons6-webfont-6*.ttf")) if folders else []
    maps = (
        sorted(Path(folders[0], "fonts").glob("materialdesignicons6-webfont-charmap-6*.json"))
        if folders
        else []
    )
    if not fonts or not maps:
        raise InputError("the icon font was not found: install it with `pip install 'millijoule[train]'`")
    charmap = json.loads(maps[-1].read_text())
    return fonts[-1], {name: int(code, 16) for name, code in charmap.items()}


@lru_cache(maxsize=1)
def icon_masks() -> np.ndarray:
    """Coverage of every icon, uint8 `[noun, side of the window // 8, size, tile, tile]`, centred in its tile."""
    from PIL import Image, ImageDraw, ImageFont

    font_path, code_points = find_icon_font()
    tile = IMAGE_SIZE + 2 * _MARGIN
    masks = np.zeros((len(NOUNS), 2, len(SIZES), tile, tile), np.uint8)
    for n, noun in enumerate(NOUNS):
        glyph = chr(code_points[NOUN_GLYPHS[noun]])
        for side, all_pixels in ICON_PIXELS.items():
            for s, pixels in enumerate(all_pixels):
                wanted = pixels * _SUPERSAMPLING
                probe = ImageFont.truetype(str(font_path), wanted)
                left, top, right, bottom = probe.getbbox(glyph)
                font = ImageFont.truetype(
                    str(font_path), round(wanted * wanted / max(right - left, bottom - top))
                )
                left, top, right, bottom = font.getbbox(glyph)
                middle = tile * _SUPERSAMPLING / 2
                canvas = Image.new("L", (tile * _SUPERSAMPLING,) * 2, 0)
                at = (round(middle - (left + right) / 2), round(middle - (top + bottom) / 2))
                ImageDraw.Draw(canvas).text(at, glyph, fill=255, font=font)
                masks[n, side // 8, s] = np.asarray(canvas.reduce(_SUPERSAMPLING))
    return masks


def draw_variation(scenes: int, renders: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How renders of the same scene differ.

    Returns:
        What is added to the levels of the background and of each icon, int32 `[scenes, renders, 1 + MAX_COUNT]`, and by
        how many pixels icons are moved in x and y, int32 `[scenes, renders, MAX_COUNT, 2]`.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    shade = rng.integers(-_SHADE, _SHADE + 1, (scenes, renders, MAX_COUNT + 1), np.int32)
    return shade, rng.integers(-_JITTER, _JITTER + 1, (scenes, renders, MAX_COUNT, 2), np.int32)


class SceneRenderer:
    """Draws scenes, many renders at once; the same scenes and seed give the same pixels."""

    def __init__(self) -> None:
        self._masks = icon_masks()

    def render(self, scenes: Sequence[Scene], renders: int, seed: int) -> np.ndarray:
        """True images of completed scenes, uint8 `[scenes, renders, 64, 64, 3]`.

        Each icon is moved by up to a pixel; each icon and the background vary a little in lightness. Integer
        arithmetic after the draws.
        """
        shape = (len(scenes), renders)
        shade, jitter = draw_variation(*shape, seed)
        shade = shade[..., None]
        backgrounds = np.array([PALETTE[s.background or ""] for s in scenes], np.int32)
        images = np.empty((*shape, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        images[:] = np.clip(backgrounds[:, None] + shade[:, :, 0], 0, 255)[:, :, None, None]
        by_side: dict[int, list[tuple[int, int, int, int, int, int, tuple[int, int, int]]]] = {8: [], 4: []}
        for i, scene in enumerate(scenes):
            for k, icon in enumerate(icons(scene)):
                x, y, side = WINDOWS[icon.window]
                which = NOUNS.index(icon.noun), SIZES.index(icon.size)
                by_side[side].append((i, k, *which, x * CELL, y * CELL, PALETTE[icon.colour]))
        for side, placed in by_side.items():
            if placed:
                self._draw(images, side, placed, jitter, shade)
        return images

    def _draw(
        self, images: np.ndarray, side: int, placed: list, jitter: np.ndarray, shade: np.ndarray
    ) -> None:
        """Blend icons of one window side into `images`; windows of one image do not overlap."""
        scene, k, noun, size, x, y = np.array([p[:6] for p in placed]).T
        colour = np.array([p[6] for p in placed], np.int32)
        pixels, tile = side * CELL, self._masks.shape[-1]
        moved = jitter[scene, :, k]  # [icons, renders, 2], x then y
        rows = np.arange(pixels)
        first = (tile - pixels) // 2
        at_y = first + rows - moved[..., 1, None]  # [icons, renders, pixels]
        at_x = first + rows - moved[..., 0, None]
        which = (noun, np.full_like(noun, side // 8), size)
        cover = self._masks[(*(w[:, None, None, None] for w in which), at_y[..., None], at_x[..., None, :])]
        cover = cover.astype(np.int32)[..., None]  # [icons, renders, pixels, pixels, 1]
        paint = np.clip(colour[:, None] + shade[scene, :, 1 + k], 0, 255)[:, :, None, None]
        renders = np.arange(images.shape[1])
        where = (
            scene[:, None, None, None],
            renders[None, :, None, None],
            (y[:, None] + rows)[:, None, :, None],
            (x[:, None] + rows)[:, None, None, :],
        )
        under = images[where].astype(np.int32)
        images[where] = ((under * (255 - cover) + paint * cover + 127) // 255).astype(np.uint8)

    def cover(self, scene: Scene) -> np.ndarray:
        """Share of each pixel that the icons cover without jitter, float32 `[icons, 64, 64]`, in `icons` order."""
        covers = []
        for icon in icons(scene):
            x, y, side = WINDOWS[icon.window]
            mask = self._masks[NOUNS.index(icon.noun), side // 8, SIZES.index(icon.size)]
            first, pixels = (mask.shape[0] - side * CELL) // 2, side * CELL
            full = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
            full[y * CELL :, x * CELL :][:pixels, :pixels] = mask[
                first : first + pixels, first : first + pixels
            ]
            covers.append(full / 255.0)
        return np.array(covers, np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
