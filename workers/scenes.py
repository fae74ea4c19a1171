"""Icon scenes: the closed domain of the default model, as a grammar and as a renderer.

A scene is one or two coloured icons on a plain background. `parse_prompt` turns words into a `Scene` (and says which
words it does not know), `write_prompt` goes the other way, `scene_tokens` is what the model reads, `SceneRenderer`
draws the true images a model is trained on and judged by. Rendering needs the icon font (the `train` extra); parsing
needs nothing. Nothing here learns anything.

Icons are glyphs of Material Design Icons (Apache-2.0), found in the `qtawesome` package without importing it.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from millijoule.workers.errors import InputError

IMAGE_SIZE = 32  # pixels, both sides

#: noun -> glyph name in Material Design Icons 6
NOUN_GLYPHS = {
    "apple": "food-apple",
    "bell": "bell",
    "car": "car-side",
    "cat": "cat",
    "cloud": "cloud",
    "crown": "crown",
    "duck": "duck",
    "fish": "fish",
    "flower": "flower",
    "heart": "cards-heart",
    "house": "home",
    "key": "key",
    "moon": "moon-waning-crescent",
    "star": "star",
    "tree": "pine-tree",
    "umbrella": "umbrella",
}
NOUNS = tuple(NOUN_GLYPHS)

#: colour -> sRGB, for icons and backgrounds alike
PALETTE = {
    "red": (220, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (245, 215, 40),
    "green": (30, 150, 60),
    "blue": (35, 85, 220),
    "purple": (140, 45, 170),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "gray": (135, 135, 135),
}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "yellow", "blue")
SIZES = ("small", "medium", "big")
RELATIONS = ("left of", "right of", "above", "below")

DEFAULT_COLOUR = "black"
DEFAULT_BACKGROUND = "white"

_NOUN_SYNONYMS = {
    "apples": "apple", "bells": "bell", "automobile": "car", "cars": "car", "kitten": "cat", "kitty": "cat",
    "cats": "cat", "kittens": "cat", "clouds": "cloud", "crowns": "crown", "ducks": "duck", "duckling": "duck",
    "bird": "duck", "birds": "duck", "fishes": "fish", "flowers": "flower", "blossom": "flower",
    "hearts": "heart", "home": "house", "houses": "house", "homes": "house", "keys": "key", "moons": "moon",
    "crescent": "moon", "stars": "star", "trees": "tree", "fir": "tree", "pine": "tree",
    "umbrellas": "umbrella", "parasol": "umbrella",
}  # fmt: skip
_COLOUR_SYNONYMS = {
    "violet": "purple",
    "scarlet": "red",
    "crimson": "red",
    "golden": "yellow",
    "grey": "gray",
}
_SIZE_SYNONYMS = {
    "little": "small", "tiny": "small", "large": "big", "huge": "big", "normal": "medium",
}  # fmt: skip
_RELATION_WORDS = {
    "left": "left of", "right": "right of", "above": "above", "over": "above", "below": "below",
    "under": "below", "beneath": "below", "underneath": "below", "beside": "left of", "and": "left of",
}  # fmt: skip
_BACKGROUND_WORDS = ("background", "backdrop")
_COUNT_WORDS = ("two", "pair", "2")
_FILLER = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "on",
        "in",
        "to",
        "with",
        "by",
        "at",
        "its",
        "is",
        "it",
        "there",
        "one",
        "1",
        "picture",
        "image",
        "icon",
        "photo",
        "drawing",
        "illustration",
        "scene",
        "showing",
        "shows",
        "plain",
        "solid",
        "color",
        "colour",
        "colored",
        "coloured",
        "next",
        "side",
        "against",
        "which",
        "that",
        "please",
        "draw",
    ]
)


@dataclass(frozen=True)
class SceneObject:
    """One icon: what, in which colour, how big."""

    noun: str
    colour: str = DEFAULT_COLOUR
    size: str = "medium"


@dataclass(frozen=True)
class Scene:
    """Zero, one or two icons on a background; with two, the first is `relation` the second."""

    objects: tuple[SceneObject, ...]
    relation: str | None = None
    background: str = DEFAULT_BACKGROUND


# ---- words <-> scene ------------------------------------------------------------------------------------------


def parse_prompt(prompt: str) -> tuple[Scene, tuple[str, ...]]:
    """Read a prompt into a scene; never fails.

    Returns:
        The scene, and warnings in the user's words: unknown words, objects beyond the second, no object at all.
    """
    words = re.findall(r"[^\W_]+", prompt.lower())
    warnings: list[str] = []
    objects: list[SceneObject] = []
    colour = size = relation = background = None
    count = 1
    i = 0
    while i < len(words):
        word = words[i]
        word = _COLOUR_SYNONYMS.get(word, _SIZE_SYNONYMS.get(word, _NOUN_SYNONYMS.get(word, word)))
        following = words[i + 1] if i + 1 < len(words) else ""
        i += 1
        if word in PALETTE and following in _BACKGROUND_WORDS:
            if word in BACKGROUNDS:
                background = word
            else:
                warnings.append(f"unknown background: '{word}'")
            i += 1
        elif word == "light" and following in PALETTE:
            warnings.append("unknown word: 'light'")
        elif word in COLOURS:
            colour = word
        elif word in SIZES:
            size = word
        elif word in NOUNS:
            if words[i - 1] in ("pine", "fir") and _NOUN_SYNONYMS.get(following, following) == "tree":
                continue  # "pine tree" is one tree
            new = [SceneObject(word, colour or DEFAULT_COLOUR, size or "medium")] * count
            if count == 2:
                relation = "left of"
            if len(objects) + len(new) > 2:
                warnings.append(f"only two objects are drawn: '{word}' is left out")
            objects.extend(new[: 2 - len(objects)])
            colour = size = None
            count = 1
        elif word in _COUNT_WORDS:
            count = 2
        elif word in _RELATION_WORDS:
            if word != "and" or relation is None:
                relation = _RELATION_WORDS[word] if len(objects) < 2 else relation
        elif word not in _FILLER and word not in _BACKGROUND_WORDS:
            warnings.append(f"unknown word: '{word}'")
    if not objects:
        warnings.append("no object named: only the background is drawn")
    relation = (relation or "left of") if len(objects) == 2 else None
    scene = Scene(tuple(objects), relation, background or DEFAULT_BACKGROUND)
    return scene, tuple(dict.fromkeys(warnings))


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that says `scene` in one of several ways; `parse_prompt` reads it back."""

    def phrase(o: SceneObject) -> str:
        words = [o.noun]
        if o.colour != DEFAULT_COLOUR or rng.random() < 0.7:
            words.insert(0, o.colour)
        if o.size != "medium":
            words.insert(0, o.size)
        article = ("an " if words[0][0] in "aeiou" else "a ") if rng.random() < 0.8 else ""
        return article + " ".join(words)

    if not scene.objects:
        text = "nothing" if False else "a plain picture"
    elif len(scene.objects) == 1:
        text = phrase(scene.objects[0])
    else:
        first, second = scene.objects
        if first == second and scene.relation == "left of" and rng.random() < 0.8:
            size = "" if first.size == "medium" else first.size + " "
            noun = first.noun if first.noun == "fish" else first.noun + "s"
            text = f"two {size}{first.colour} {noun}"
        else:
            ways = {
                "left of": ("left of", "to the left of", "and"),
                "right of": ("right of", "to the right of"),
                "above": ("above", "over"),
                "below": ("below", "under"),
            }[scene.relation or "left of"]
            text = f"{phrase(first)} {ways[rng.integers(len(ways))]} {phrase(second)}"
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 0.4:
        text += (f" on a {scene.background} background", f", {scene.background} background")[rng.integers(2)]
    return text


# ---- scene -> tokens ------------------------------------------------------------------------------------------

#: Everything the model can be told, as words; a token is an index into this tuple. 0 is "nothing here".
VOCABULARY = (
    "<none>",
    *NOUNS,
    *(f"colour:{c}" for c in COLOURS),
    *(f"size:{s}" for s in SIZES),
    *(f"relation:{r}" for r in RELATIONS),
    *(f"background:{b}" for b in BACKGROUNDS),
)
_TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
NUM_TOKENS = 8  # noun, colour, size of the first object; the same of the second; relation; background


def scene_tokens(scenes: Sequence[Scene]) -> np.ndarray:
    """Token ids, int64 `[scenes, NUM_TOKENS]`."""
    tokens = np.zeros((len(scenes), NUM_TOKENS), np.int64)
    for row, scene in zip(tokens, scenes, strict=True):
        for k, o in enumerate(scene.objects):
            row[3 * k : 3 * k + 3] = _TOKEN[o.noun], _TOKEN[f"colour:{o.colour}"], _TOKEN[f"size:{o.size}"]
        row[6] = _TOKEN[f"relation:{scene.relation}"] if scene.relation else 0
        row[7] = _TOKEN[f"background:{scene.background}"]
    return tokens


# ---- scenes to train on ---------------------------------------------------------------------------------------


def is_held_out(noun: str, colour: str) -> bool:
    """True for the 8 of 128 noun-colour pairs that training never shows (to judge composition)."""
    return (NOUNS.index(noun) + 5 * COLOURS.index(colour)) % 16 == 0


def sample_scenes(rng: np.random.Generator, count: int, *, held_out: bool = False) -> list[Scene]:
    """Random scenes whose icons can be seen: no icon has the colour of its background.

    Args:
        rng: source of all choices.
        count: how many scenes.
        held_out: draw every first object from the held-out pairs instead of never using them.
    """

    def one_object(background: str, size: str | None, want_held_out: bool) -> SceneObject:
        while True:
            noun, colour = NOUNS[rng.integers(len(NOUNS))], COLOURS[rng.integers(len(COLOURS))]
            if colour != background and is_held_out(noun, colour) == want_held_out:
                return SceneObject(noun, colour, size or SIZES[rng.choice(3, p=(0.15, 0.7, 0.15))])

    scenes = []
    for kind in rng.random(count):
        background = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=(0.4, 0.15, 0.15, 0.15, 0.15))]
        first = one_object(background, None, held_out)
        if kind < 0.02 and not held_out:
            scenes.append(Scene((), None, background))
        elif kind < 0.45:
            scenes.append(Scene((first,), None, background))
        elif kind < 0.55:
            scenes.append(Scene((first, first), "left of", background))
        else:
            second = one_object(background, None, False)
            scenes.append(Scene((first, second), RELATIONS[rng.integers(4)], background))
    return scenes


# ---- scene -> pixels ------------------------------------------------------------------------------------------

_PLACES = ("centre", "left", "right", "top", "bottom")
_CENTRES = {
    "centre": (16, 16),
    "left": (8, 16),
    "right": (24, 16),
    "top": (16, 8),
    "bottom": (16, 24),
}  # x, y
_GLYPH_PIXELS = {
    "centre": {"small": 15, "medium": 22, "big": 28},
    "half": {"small": 10, "medium": 14, "big": 16},
}
_PLACES_BY_RELATION = {
    "left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top"),
}  # fmt: skip
_JITTER = 1  # pixels; each icon moves by -1, 0 or 1 in x and in y
_SHADE = 14  # levels; the lightness of each colour moves by at most this much
_SUPERSAMPLING = 8


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
def _place_masks() -> np.ndarray:
    """Coverage of every icon, uint8 `[noun, place, size, jitter, 32, 32]`; jitter index is 3 * (dy+1) + (dx+1)."""
    from PIL import Image, ImageDraw, ImageFont

    font_path, code_points = find_icon_font()
    side = 2 * _JITTER + 1
    masks = np.zeros((len(NOUNS), len(_PLACES), len(SIZES), side * side, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    big = IMAGE_SIZE * _SUPERSAMPLING
    for n, noun in enumerate(NOUNS):
        glyph = chr(code_points[NOUN_GLYPHS[noun]])
        for p, place in enumerate(_PLACES):
            for s, size in enumerate(SIZES):
                pixels = _GLYPH_PIXELS["centre" if place == "centre" else "half"][size] * _SUPERSAMPLING
                canvas = Image.new("L", (big, big), 0)
                probe = ImageFont.truetype(str(font_path), pixels)
                left, top, right, bottom = probe.getbbox(glyph)
                font = ImageFont.truetype(
                    str(font_path), round(pixels * pixels / max(right - left, bottom - top))
                )
                left, top, right, bottom = font.getbbox(glyph)
                x, y = (c * _SUPERSAMPLING for c in _CENTRES[place])
                at = (round(x - (left + right) / 2), round(y - (top + bottom) / 2))
                ImageDraw.Draw(canvas).text(at, glyph, fill=255, font=font)
                small = np.asarray(canvas, np.float32).reshape(IMAGE_SIZE, _SUPERSAMPLING, IMAGE_SIZE, -1)
                mask = np.rint(small.mean(axis=(1, 3))).astype(np.uint8)
                for j in range(side * side):
                    dy, dx = j // side - _JITTER, j % side - _JITTER
                    masks[n, p, s, j] = _shifted(mask, dy, dx)
    return masks


def _shifted(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    padded = np.pad(mask, _JITTER)
    y, x = _JITTER - dy, _JITTER - dx
    return padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]


class SceneRenderer:
    """Draws scenes, many renders at once; the same scenes and seed give the same pixels."""

    def __init__(self) -> None:
        self._masks = _place_masks()

    def render(self, scenes: Sequence[Scene], renders: int, seed: int) -> np.ndarray:
        """True images, uint8 `[scenes, renders, 32, 32, 3]`: jittered places and slightly varied lightness."""
        rng = np.random.Generator(np.random.Philox(seed))
        shape = (len(scenes), renders)
        backgrounds = np.array([PALETTE[s.background] for s in scenes], np.float32)
        shade = rng.uniform(-_SHADE, _SHADE, (*shape, 3, 1)).astype(np.float32)
        images = (backgrounds[:, None] + shade[:, :, 0])[:, :, None, None, :]  # [scenes, renders, 1, 1, 3]
        images = np.broadcast_to(images, (*shape, IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
        jitter = rng.integers(0, self._masks.shape[3], (*shape, 2))
        for k in range(2):
            index = np.zeros((len(scenes), 3), np.int64)
            colours = np.zeros((len(scenes), 3), np.float32)
            present = np.zeros(len(scenes), np.float32)
            for i, scene in enumerate(scenes):
                if k < len(scene.objects):
                    o = scene.objects[k]
                    place = _PLACES_BY_RELATION[scene.relation][k] if scene.relation else "centre"
                    index[i] = NOUNS.index(o.noun), _PLACES.index(place), SIZES.index(o.size)
                    colours[i], present[i] = PALETTE[o.colour], 1.0 / 255.0
            cover = self._masks[index[:, :1], index[:, 1:2], index[:, 2:3], jitter[:, :, k]].astype(
                np.float32
            )
            cover = (cover * present[:, None, None, None])[..., None]  # [scenes, renders, 32, 32, 1]
            images += cover * ((colours[:, None] + shade[:, :, k + 1])[:, :, None, None, :] - images)
        return np.clip(np.rint(images), 0, 255).astype(np.uint8)

    def cover(self, scene: Scene) -> np.ndarray:
        """Share of each pixel that the icons cover without jitter, float32 `[objects, 32, 32]`."""
        places = _PLACES_BY_RELATION[scene.relation] if scene.relation else ("centre",)
        centre = self._masks.shape[3] // 2
        covers = [
            self._masks[NOUNS.index(o.noun), _PLACES.index(p), SIZES.index(o.size), centre]
            for o, p in zip(scene.objects, places, strict=False)
        ]
        return np.array(covers, np.float32).reshape(-1, IMAGE_SIZE, IMAGE_SIZE) / 255.0
