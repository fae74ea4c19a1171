"""Icon scenes: the closed domain of the packaged models. What a scene is, which ones training never sees, what a model reads.

A scene is one or two groups of up to four coloured icons on a plain background. What a prompt leaves open (a colour, a
size, an arrangement) is open in the `Scene` too; `complete` settles it from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUN_NUMBER, NOUNS

IMAGE_SIZE = 64  # pixels, both sides
CELL = 8  # pixels; windows of icons lie on this grid

#: How images of one scene differ: each icon moves by at most so many pixels in x and in y, ...
JITTER = 1
#: ... and the lightness of each colour by at most so many levels.
SHADE = 14

#: colour -> sRGB, for icons and backgrounds alike
PALETTE = {
    "red": (220, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (245, 215, 40),
    "green": (30, 150, 60),
    "blue": (35, 85, 220),
    "purple": (130, 40, 170),
    "pink": (250, 150, 200),
    "brown": (120, 70, 30),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "gray": (135, 135, 135),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "yellow", "blue")
SIZES = ("small", "medium", "big")
RELATIONS = ("left of", "right of", "above", "below")
MAX_COUNT = 4
MAX_GROUPS = 2

#: GenEval's task families (Ghosh et al. 2023), which prompts are drawn from and scored by.
FAMILIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")


@dataclass(frozen=True)
class Group:
    """`count` icons that look the same; None is "any"."""

    noun: str
    colour: str | None = None
    size: str | None = None
    count: int = 1


@dataclass(frozen=True)
class Scene:
    """Zero, one or two groups; of two, the first is `relation` the second, and each has at most two icons.

    `arrangement` (0 or 1) is which of two ways a lone group of two or three icons stands. None is "any", everywhere.
    """

    groups: tuple[Group, ...]
    relation: str | None = None
    background: str | None = None
    arrangement: int | None = None


@dataclass(frozen=True)
class Icon:
    """One icon of a completed scene, in window number `window` of `WINDOWS`."""

    noun: str
    colour: str
    size: str
    window: int


#: Where icons stand: left and top in cells, and side in cells. 0 is the whole image, the others are its half as wide.
WINDOWS = (
    (0, 0, 8),
    (0, 0, 4), (2, 0, 4), (4, 0, 4),
    (0, 2, 4), (4, 2, 4),
    (0, 4, 4), (2, 4, 4), (4, 4, 4),
)  # fmt: skip
_TOP_LEFT, _TOP, _TOP_RIGHT, _LEFT, _RIGHT, _BOTTOM_LEFT, _BOTTOM, _BOTTOM_RIGHT = range(1, 9)

#: windows of a lone group, by count and arrangement
_ALONE: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,), (0,)),
    2: ((_LEFT, _RIGHT), (_TOP, _BOTTOM)),
    3: ((_TOP, _BOTTOM_LEFT, _BOTTOM_RIGHT), (_TOP_LEFT, _TOP_RIGHT, _BOTTOM)),
    4: ((_TOP_LEFT, _TOP_RIGHT, _BOTTOM_LEFT, _BOTTOM_RIGHT),) * 2,
}
#: windows of a group of one or two icons on one side of the image
_SIDE: dict[str, tuple[tuple[int, ...], ...]] = {
    "left": ((_LEFT,), (_TOP_LEFT, _BOTTOM_LEFT)),
    "right": ((_RIGHT,), (_TOP_RIGHT, _BOTTOM_RIGHT)),
    "top": ((_TOP,), (_TOP_LEFT, _TOP_RIGHT)),
    "bottom": ((_BOTTOM,), (_BOTTOM_LEFT, _BOTTOM_RIGHT)),
}
_SIDES_OF_RELATION = {
    "left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top"),
}  # fmt: skip


def icons(scene: Scene) -> tuple[Icon, ...]:
    """The icons of a completed scene, ordered by window.

    Raises:
        ValueError: something is still open.
    """
    if len(scene.groups) == 2:
        if scene.relation is None:
            raise ValueError(f"relation is open: {scene}")
        sides = _SIDES_OF_RELATION[scene.relation]
        windows = [_SIDE[side][g.count - 1] for side, g in zip(sides, scene.groups, strict=True)]
    else:
        windows = [_ALONE[g.count][scene.arrangement or 0] for g in scene.groups]
    found = []
    for group, places in zip(scene.groups, windows, strict=True):
        if group.colour is None or group.size is None:
            raise ValueError(f"colour or size is open: {group}")
        found += [Icon(group.noun, group.colour, group.size, window) for window in places]
    return tuple(sorted(found, key=lambda icon: icon.window))


# ---- settling what is open ------------------------------------------------------------------------------------

_T = TypeVar("_T")

#: What seeds are mixed with here, so that choices are another stream than the image's noise.
CHOICES_STREAM = 0x5CE4E5C0FFEE


class Choices:
    """Uniform choices from a 64-bit seed by SplitMix64 (Steele, Lea and Flood 2014): the same on every machine."""

    def __init__(self, seed: int) -> None:
        self._state = (seed ^ CHOICES_STREAM) % 2**64

    def of(self, options: Sequence[_T]) -> _T:
        self._state = (self._state + 0x9E3779B97F4A7C15) % 2**64
        z = self._state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        return options[z * len(options) >> 64]


def complete(scene: Scene, seed: int) -> Scene:
    """Settle everything `scene` leaves open, from `seed`. No icon takes the colour of its background by this."""
    choose = Choices(seed)
    given = {g.colour for g in scene.groups}
    background = scene.background or choose.of([b for b in BACKGROUNDS if b not in given])
    colours = [c for c in COLOURS if c != background]
    groups = tuple(
        replace(g, colour=g.colour or choose.of(colours), size=g.size or choose.of(SIZES))
        for g in scene.groups
    )
    relation, arrangement = scene.relation, scene.arrangement
    if len(groups) == 2:
        relation = relation or choose.of(RELATIONS)
    if arrangement is None:
        arrangement = choose.of((0, 1))
    return Scene(groups, relation, background, arrangement)


# ---- scene -> tokens ------------------------------------------------------------------------------------------

ICON_TOKENS = 4  # noun, colour, size, window; 0 where there is no icon, else 1 + the index
NUM_TOKENS = MAX_COUNT * ICON_TOKENS + 1  # the icons, then the background (its index)

_COLOUR_TOKEN = {colour: 1 + i for i, colour in enumerate(COLOURS)}


def scene_tokens(scenes: Sequence[Scene]) -> np.ndarray:
    """What a model reads of completed scenes, int64 `[scenes, NUM_TOKENS]`."""
    tokens = np.zeros((len(scenes), NUM_TOKENS), np.int64)
    for row, scene in zip(tokens, scenes, strict=True):
        for k, icon in enumerate(icons(scene)):
            noun, colour = 1 + NOUN_NUMBER[icon.noun], _COLOUR_TOKEN[icon.colour]
            token = noun, colour, 1 + SIZES.index(icon.size), 1 + icon.window
            row[ICON_TOKENS * k : ICON_TOKENS * (k + 1)] = token
        row[-1] = BACKGROUNDS.index(scene.background or "")
    return tokens


# ---- train and held-out scenes --------------------------------------------------------------------------------


def is_held_out_colour(noun: str, colour: str) -> bool:
    """True for the tenth of all noun-colour pairs that training never shows; one colour of every noun."""
    return (NOUN_NUMBER[noun] + 3 * COLOURS.index(colour)) % 10 == 0


def is_held_out_pair(noun: str, other: str) -> bool:
    """True for the ninth of all noun pairs that training never shows in one image; the order does not matter."""
    return noun != other and (NOUN_NUMBER[noun] + NOUN_NUMBER[other]) % 9 == 0


def is_held_out(scene: Scene) -> bool:
    """True if a completed scene shows any combination that training never does."""
    nouns = [g.noun for g in scene.groups]
    return any(is_held_out_colour(g.noun, g.colour) for g in scene.groups if g.colour) or (
        len(nouns) == 2 and is_held_out_pair(*nouns)
    )


#: With fewer of the first nouns no pair of them is held out.
MIN_NOUNS = 6


def sample_scene(
    family: str, rng: np.random.Generator, *, held_out: bool = False, nouns: int = DEFAULT_NOUNS
) -> Scene:
    """A scene of the first `nouns` that says what prompts of `family` say, and leaves the rest open.

    With `held_out`, its nouns and colours are combinations that training never shows, where the family names any
    combination at all; otherwise, combinations that it does show.

    Raises:
        ValueError: fewer nouns than `MIN_NOUNS`.
    """
    if nouns < MIN_NOUNS:
        raise ValueError(f"{nouns} nouns: at least {MIN_NOUNS}")
    while True:
        first, second = (NOUNS[i] for i in rng.choice(nouns, 2, replace=False))
        colour, other = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
        relation = RELATIONS[rng.integers(4)]
        match family:
            case "single object":
                return Scene((Group(first),))
            case "counting":
                return Scene((Group(first, count=int(rng.integers(2, MAX_COUNT + 1))),))
            case "colours":
                if is_held_out_colour(first, colour) == held_out:
                    return Scene((Group(first, colour),))
            case "two objects":
                if is_held_out_pair(first, second) == held_out:
                    return Scene((Group(first), Group(second)))
            case "position":
                if is_held_out_pair(first, second) == held_out:
                    return Scene((Group(first), Group(second)), relation)
            case "colour attribution":
                new = is_held_out_pair(first, second), is_held_out_colour(first, colour)
                if all(new) if held_out else not any(new) and not is_held_out_colour(second, other):
                    return Scene((Group(first, colour), Group(second, other)))
            case _:
                raise ValueError(f"no such family: {family}")


def sample_training_scenes(
    rng: np.random.Generator, count: int, nouns: int = DEFAULT_NOUNS
) -> list[tuple[Scene, Scene]]:
    """Pairs of a scene as a prompt may say it (with open parts) and completed; never a held-out combination.

    All are of the first `nouns`.
    """

    def at_times(word: str | None, probability: float) -> str | None:
        return word if rng.random() < probability else None

    pairs: list[tuple[Scene, Scene]] = []
    while len(pairs) < count:
        kind = rng.random()
        if kind < 0.02:
            scene = Scene(())
        elif kind < 0.25:
            scene = sample_scene("single object", rng, nouns=nouns)
        elif kind < 0.5:
            scene = sample_scene("counting", rng, nouns=nouns)
        else:
            scene = sample_scene("position", rng, nouns=nouns)
            if kind > 0.85:
                one_or_two = tuple(replace(g, count=int(rng.integers(1, 3))) for g in scene.groups)
                scene = replace(scene, groups=one_or_two)
        completed = complete(scene, int(rng.integers(2**63)))
        if is_held_out(completed):
            continue
        groups = tuple(
            replace(g, colour=at_times(g.colour, 0.6), size=at_times(g.size, 0.3)) for g in completed.groups
        )
        relation, background = at_times(completed.relation, 0.6), at_times(completed.background, 0.3)
        pairs.append((Scene(groups, relation, background), completed))
    return pairs
