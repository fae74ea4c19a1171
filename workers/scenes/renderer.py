"""True images of icon scenes, rendered many at once from an icon font, on a CPU or on the GPU that trains on them.

Icons are glyphs of Material Design Icons (Apache-2.0), found in the `qtawesome` package (the `train` extra) without
importing it. Models are trained on these renders and judged against them; drawing from a model needs none of this.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from millijoule.workers.errors import InputError
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    ICON_TOKENS,
    IMAGE_SIZE,
    JITTER,
    MAX_COUNT,
    PALETTE,
    SHADE,
    SIZES,
    WINDOWS,
    Scene,
    complete,
    icons,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, ENTRIES, NOUN_NUMBER

#: Side of an icon's em box in pixels, by size, in the whole image and in a half window. Its ink is a little smaller.
ICON_PIXELS = {8: (30, 42, 56), 4: (20, 25, 30)}

_SUPERSAMPLING = 8
_MARGIN = 4  # empty pixels around the atlas' tiles, so that what lies outside a tile reads as empty
_TILE = IMAGE_SIZE + 2 * _MARGIN  # pixels, both sides


@dataclass(frozen=True)
class IconFont:
    """A font of icons: where it is, and the code points of its glyphs by name."""

    path: Path
    code_points: Mapping[str, int]

    def cover(self, glyph: str, pixels: int, tile: int) -> np.ndarray:
        """Coverage of a glyph whose longer side is `pixels`, centred, uint8 `[tile, tile]`."""
        from PIL import Image, ImageDraw, ImageFont

        text, file, wanted = chr(self.code_points[glyph]), str(self.path), pixels * _SUPERSAMPLING
        left, top, right, bottom = ImageFont.truetype(file, wanted).getbbox(text)
        larger = wanted * wanted / max(right - left, bottom - top)
        font = ImageFont.truetype(file, round(larger))
        left, top, right, bottom = font.getbbox(text)
        middle = tile * _SUPERSAMPLING / 2
        canvas = Image.new("L", (tile * _SUPERSAMPLING,) * 2, 0)
        at = (round(middle - (left + right) / 2), round(middle - (top + bottom) / 2))
        ImageDraw.Draw(canvas).text(at, text, fill=255, font=font)
        return np.asarray(canvas.reduce(_SUPERSAMPLING))


@cache
def find_icon_font(name: str = "materialdesignicons6-webfont") -> IconFont:
    """A font of the package that carries icon fonts, by the beginning of its files' names; by default Material Design Icons.

    Raises:
        InputError: that package is not installed.
    """
    spec = importlib.util.find_spec("qtawesome")  # importing it would need Qt
    folder = Path(spec.origin).with_name("fonts") if spec and spec.origin else Path("qtawesome")
    fonts, maps = (sorted(folder.glob(f"{name}-*.{x}")) for x in ("ttf", "json"))
    if not fonts or not maps:
        raise InputError(
            f"the icon font {name} was not found: install it with `pip install 'millijoule[train]'`"
        )
    charmap = json.loads(maps[-1].read_text())
    return IconFont(fonts[-1], {glyph: int(code, 16) for glyph, code in charmap.items()})


@cache
def icon_mask(noun: int) -> np.ndarray:
    """Coverage of the icon of noun number `noun`, uint8 `[side of the window // 8, size, tile, tile]`, centred in its tile.

    Made when first asked for, and kept.
    """
    font = find_icon_font()
    masks = np.zeros((2, len(SIZES), _TILE, _TILE), np.uint8)
    for side, all_pixels in ICON_PIXELS.items():
        for s, pixels in enumerate(all_pixels):
            masks[side // 8, s] = font.cover(ENTRIES[noun].glyph, pixels, _TILE)
    masks.flags.writeable = False
    return masks


def icon_masks(nouns: int = DEFAULT_NOUNS) -> np.ndarray:
    """`icon_mask` of the first `nouns`, uint8 `[noun, side of the window // 8, size, tile, tile]`."""
    return np.stack([icon_mask(n) for n in range(nouns)])


def draw_variation(scenes: int, renders: int, seed: int) -> dict[str, Tensor]:
    """How renders of the same scene differ.

    Returns:
        "shade", what is added to the levels of the background and of each icon, int32 `[scenes, renders, 1 + MAX_COUNT]`,
        and "jitter", by how many pixels icons are moved in x and y, int32 `[scenes, renders, MAX_COUNT, 2]`.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    shade = rng.integers(-SHADE, SHADE + 1, (scenes, renders, MAX_COUNT + 1), np.int32)
    jitter = rng.integers(-JITTER, JITTER + 1, (scenes, renders, MAX_COUNT, 2), np.int32)
    return {"shade": torch.from_numpy(shade), "jitter": torch.from_numpy(jitter)}


class SceneRenderer:
    """Draws scenes that are given as tokens, in integers: the same pixels on every device."""

    def __init__(
        self, device: str = "cpu", nouns: int = DEFAULT_NOUNS, *, masks: np.ndarray | None = None
    ) -> None:
        """`nouns`: how many of the first can be drawn. `masks`: those of what noun tokens count, in place of the first."""

        def on_device(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        masks = icon_masks(nouns) if masks is None else masks
        self._masks = torch.from_numpy(masks).flatten().to(device)
        self._colours = on_device([PALETTE[c] for c in COLOURS], torch.int32)
        self._backgrounds = on_device([PALETTE[b] for b in BACKGROUNDS], torch.int32)
        # left, top, side in pixels; of "no window" first
        self._windows = on_device([(0, 0, 0), *WINDOWS]) * CELL
        self._pixels = torch.arange(IMAGE_SIZE, device=device)

    def render(self, tokens: Tensor, shade: Tensor, jitter: Tensor) -> Tensor:
        """True images, uint8 `[scenes, renders, 3, 64, 64]`.

        Each icon is moved by up to a pixel; each icon and the background vary a little in lightness. No shape depends on
        what the scenes hold, so that a training step can be captured as a CUDA graph. `tokens` are of completed scenes
        (`scenes.scene_tokens`), `shade` and `jitter` as `draw_variation` draws them.
        """
        ground = self._backgrounds[tokens[:, -1]][:, None] + shade[..., :1]
        image = ground.clamp(0, 255)[..., None, None].expand(-1, -1, -1, IMAGE_SIZE, IMAGE_SIZE)
        icons = tokens[:, :-1].unflatten(1, (MAX_COUNT, ICON_TOKENS))
        for k in range(MAX_COUNT):
            noun, colour, size, window = icons[:, k].unbind(1)
            left, top, side = self._windows[window][..., None, None].unbind(1)  # [scenes, 1, 1]
            first = (_TILE - side) // 2
            moved = jitter[:, :, k].long()
            inside, at = [], []
            for begin, shift in ((top, moved[..., 1]), (left, moved[..., 0])):
                offset = self._pixels - begin  # [scenes, 1, 64]
                inside.append((offset >= 0) & (offset < side))
                at.append((first + offset - shift[..., None]).clamp(0, _TILE - 1))
            rows, columns = at  # [scenes, renders, 64]
            which = ((noun - 1).clamp_min(0) * 2 + side[:, 0, 0] // IMAGE_SIZE) * len(SIZES)
            which = (which + (size - 1).clamp_min(0)) * _TILE**2
            index = which[:, None, None, None] + rows[..., :, None] * _TILE + columns[..., None, :]
            cover = self._masks[index].int() * (inside[0][..., :, None] & inside[1][..., None, :])
            cover = cover[:, :, None]
            paint = self._colours[(colour - 1).clamp_min(0)][:, None] + shade[..., 1 + k, None]
            paint = paint.clamp(0, 255)[..., None, None]
            image = (image * (255 - cover) + paint * cover + 127) // 255
        return image.to(torch.uint8)


def render_scenes(scenes: Sequence[Scene], renders: int, seed: int) -> np.ndarray:
    """True images of completed scenes, uint8 `[scenes, renders, 64, 64, 3]`; the same seed gives the same pixels."""
    tokens = scene_tokens(scenes)
    nouns = tokens[:, :-1:ICON_TOKENS]
    shown = np.unique(nouns[nouns > 0])
    nouns[nouns > 0] = 1 + np.searchsorted(shown, nouns[nouns > 0])  # masks of what is shown suffice
    masks = np.stack([icon_mask(n - 1) for n in shown.tolist() or [1]])
    images = SceneRenderer(masks=masks).render(
        torch.from_numpy(tokens), **draw_variation(len(scenes), renders, seed)
    )
    return images.permute(0, 1, 3, 4, 2).contiguous().numpy()


def render_prompted(scenes: Sequence[Scene], seed: int) -> Iterator[np.ndarray]:
    """One true image of each scene as a prompt says it, in parts: uint8 `[up to 500, 64, 64, 3]`.

    What the scenes leave open is settled from `seed`.
    """
    rng = np.random.default_rng((seed, 77))
    whole = [complete(scene, int(rng.integers(2**63))) for scene in scenes]
    for first in range(0, len(whole), 500):
        yield render_scenes(whole[first : first + 500], 1, int(rng.integers(2**62)))[:, 0]


def icon_cover(scene: Scene) -> np.ndarray:
    """Share of each pixel that the icons cover without jitter, float32 `[icons, 64, 64]`, in `icons` order."""
    covers = []
    for icon in icons(scene):
        x, y, side = WINDOWS[icon.window]
        mask = icon_mask(NOUN_NUMBER[icon.noun])[side // 8, SIZES.index(icon.size)]
        pixels = side * CELL
        inside = slice((len(mask) - pixels) // 2, (len(mask) + pixels) // 2)
        full = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        full[y * CELL :, x * CELL :][:pixels, :pixels] = mask[inside, inside]
        covers.append(full / 255.0)
    return np.array(covers, np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
