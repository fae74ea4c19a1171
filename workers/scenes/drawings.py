"""Nouns that several icon fonts draw, each in its own way: a domain in which one prompt has several right images.

The fonts are Material Design Icons and Remix Icon (both Apache-2.0), Font Awesome 6 Free (SIL OFL 1.1) and Phosphor (MIT), all
in the `qtawesome` package.
"""

from __future__ import annotations

from collections.abc import Container
from functools import cache

import numpy as np

from millijoule.workers.scenes.renderer import find_icon_font
from millijoule.workers.scenes.vocabulary import ENTRIES, Noun

#: Beginnings of the fonts' file names, and endings of the names of their filled glyphs; Material Design Icons come first.
OTHER_FONTS = {"fontawesome6-solid-webfont": "", "phosphor": "-fill", "remixicon": "-fill"}

#: Pixels of a drawing, in both directions, and of its longer side.
SIDE, INK_SIDE = 32, 26


@cache
def several_drawings() -> tuple[tuple[str, ...], np.ndarray]:
    """Nouns, in the vocabulary's order, and their drawings: coverage uint8 `[nouns, fonts, SIDE, SIDE]`.

    A noun is found in another font by its name or an alias.

    Raises:
        InputError: the package that carries the fonts is not installed.
    """
    first = find_icon_font()
    others = [(find_icon_font(name), ending) for name, ending in OTHER_FONTS.items()]
    nouns, drawings = [], []
    for entry in ENTRIES:
        found = [(first, entry.glyph)]
        for font, ending in others:
            if (glyph := _glyph(entry, font.code_points, ending)) is not None:
                found.append((font, glyph))
        if len(found) > len(others):
            nouns.append(entry.noun)
            drawings.append(np.stack([font.cover(glyph, INK_SIDE, SIDE) for font, glyph in found]))
    return tuple(nouns), np.stack(drawings)


def _glyph(noun: Noun, names: Container[str], ending: str) -> str | None:
    words = (word.replace(" ", "-") + ending for word in (noun.noun, *noun.aliases))
    return next((name for name in words if name in names), None)
