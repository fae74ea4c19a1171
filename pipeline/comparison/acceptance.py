"""Which images count: the rule by which a reading of an image is accepted, and what a blank or repeated image is.

The rule for icon scenes is written here a second time, from what `workers.judging.quality.judge` says, over plain rows: a
bundle is checked without PyTorch and without the code that measured it. A test holds the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from millijoule.workers.records import decode
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import FAMILIES, Group

#: Pixels of one image that differ by no more than this many levels of 255 in every channel show nothing.
BLANK_LEVELS = 2
#: As `workers.judging.quality.RELATION_MARGIN`, pixels.
RELATION_MARGIN = 4.0
#: Longer readings are not of an image of 64x64 pixels.
MAX_ICONS = 256

Icon = tuple[str, str, str, float, float]  # noun, colour, size, x, y


def is_blank(pixels: np.ndarray) -> bool:
    """Whether uint8 `[height, width, 3]` is one even surface."""
    flat = pixels.reshape(-1, pixels.shape[-1]).astype(np.int16)
    return bool((flat.max(0) - flat.min(0) <= BLANK_LEVELS).all())


def find_repeats(prompts: Sequence[str], digests: Sequence[str | None]) -> list[bool]:
    """Which images are the same bytes as an earlier one of the same prompt (whose seed was another)."""
    seen: set[tuple[str, str]] = set()
    repeats = []
    for prompt, digest in zip(prompts, digests, strict=True):
        repeats.append(digest is not None and (prompt, digest) in seen)
        if digest is not None:
            seen.add((prompt, digest))
    return repeats


def parse_icons(text: str) -> list[Icon]:
    """Icons as a row of a bundle lists them.

    Raises:
        ValueError: not a JSON list of [noun, colour, size, x, y].
    """
    icons = decode(list[Icon], text)
    if len(icons) > MAX_ICONS:
        raise ValueError(f"{len(icons)} icons, more than {MAX_ICONS}")
    return icons


def shows_scene(prompt: str, family: str, icons: Iterable[Icon], nouns: int) -> bool:
    """Whether what was read shows what the prompt says, read with the vocabulary's first `nouns`, by the rule of its GenEval family.

    Raises:
        ValueError: no such family, or the prompt has fewer groups than the family's rule needs.
    """
    scene, _ = parse_prompt(prompt, nouns)
    if family not in FAMILIES:
        raise ValueError(f"no family named {family!r}")
    found = [_matching(group, list(icons)) for group in scene.groups]
    if not found or (family == "position" and (len(found) < 2 or scene.relation is None)):
        raise ValueError(f"{prompt!r} says too little for the family {family!r}")
    if family == "counting":
        return len(found[0]) == scene.groups[0].count
    if family == "position":
        return any(_stands(scene.relation, a, b) for a in found[0] for b in found[1])
    return all(len(some) >= group.count for some, group in zip(found, scene.groups, strict=True))


def _matching(group: Group, icons: list[Icon]) -> list[Icon]:
    return [
        icon
        for icon in icons
        if icon[0] == group.noun and group.colour in (None, icon[1]) and group.size in (None, icon[2])
    ]


def _stands(relation: str | None, first: Icon, second: Icon) -> bool:
    dx, dy = first[3] - second[3], first[4] - second[4]
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[str(relation)]
    across = dy if relation in ("left of", "right of") else dx
    return along >= RELATION_MARGIN and along > abs(across)
