"""Prompts of icon scenes: words to a `Scene`, and a `Scene` to words in one of many ways."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    NOUNS,
    PALETTE,
    SIZES,
    Group,
    Scene,
    icons,
)

_PLURALS = {
    noun: {
        "axe": "axes", "bus": "buses", "butterfly": "butterflies", "cactus": "cacti", "church": "churches",
        "fish": "fish", "leaf": "leaves",
    }.get(noun, noun + "s")
    for noun in NOUNS
}  # fmt: skip
_SYNONYMS = {
    "airplane": ("plane", "aeroplane", "aircraft", "jet"), "bike": ("bicycle",), "bus": ("coach",),
    "butterfly": (), "cactus": ("cactuses",), "car": ("automobile",), "cat": ("kitten", "kitty"), "cup": ("glass",),
    "church": ("chapel",), "diamond": ("rhombus",), "dog": ("puppy", "hound"), "duck": ("duckling",),
    "fish": ("fishes",), "flower": ("blossom",), "ghost": ("spook",), "gift": ("present",), "hand": ("palm",),
    "hat": ("fedora",), "helicopter": ("chopper",), "horse": ("pony",), "house": ("home",), "lock": ("padlock",),
    "moon": ("crescent",), "mushroom": ("toadstool",), "pig": ("piglet", "hog"), "rabbit": ("bunny", "hare"),
    "robot": ("android",), "rocket": ("spaceship",), "sailboat": ("yacht",), "snowflake": ("flake",),
    "train": ("locomotive",), "tree": ("fir", "pine"), "truck": ("lorry",), "umbrella": ("parasol",),
}  # fmt: skip
_SYNONYM_PLURALS = {
    "puppy": "puppies", "kitty": "kitties", "pony": "ponies", "bunny": "bunnies", "lorry": "lorries",
    "aircraft": "aircraft", "glass": "glasses", "coach": "coaches", "cactuses": "cactuses", "fishes": "fishes",
}  # fmt: skip
_NOUN_WORDS = {noun: noun for noun in NOUNS} | {plural: noun for noun, plural in _PLURALS.items()}
for _noun, _words in _SYNONYMS.items():
    for _word in _words:
        _NOUN_WORDS[_word] = _noun
        _NOUN_WORDS[_SYNONYM_PLURALS.get(_word, _word + "s")] = _noun

_COLOUR_WORDS = {c: c for c in PALETTE} | {
    "violet": "purple", "scarlet": "red", "crimson": "red", "golden": "yellow", "gold": "yellow", "grey": "gray",
    "rose": "pink", "chocolate": "brown",
}  # fmt: skip
_SIZE_WORDS = {s: s for s in SIZES} | {
    "little": "small", "tiny": "small", "large": "big", "huge": "big", "giant": "big", "normal": "medium",
}  # fmt: skip
_COUNT_WORDS = {
    "one": 1, "single": 1, "two": 2, "three": 3, "four": 4, "1": 1, "2": 2, "3": 3, "4": 4, "pair": 2, "couple": 2,
    "both": 2, "twin": 2, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "5": 5, "6": 6,
    "7": 7, "8": 8, "9": 9, "10": 10,
}  # fmt: skip
_RELATION_WORDS = {
    "left": "left of", "right": "right of", "above": "above", "over": "above", "atop": "above", "below": "below",
    "under": "below", "beneath": "below", "underneath": "below",
}  # fmt: skip
_BACKGROUND_WORDS = ("background", "backdrop")
_FILLER = frozenset(
    re.findall(
        r"\w+",
        "a an the of on in to with and by at its is are it there beside next side near against which that please "
        "draw show showing shows picture pictures image icon icons photo photograph drawing illustration scene "
        "plain solid simple color colour colored coloured",
    )
)


def parse_prompt(prompt: str) -> tuple[Scene, tuple[str, ...]]:
    """Read a prompt into a scene; never fails.

    Returns:
        The scene, with open parts where the prompt says nothing, and warnings in the user's words: unknown words,
        icons beyond what a scene holds, no icon at all.
    """
    words = re.findall(r"[^\W_]+", prompt.lower())
    warnings: list[str] = []
    groups: list[Group] = []
    colour = size = relation = background = None
    count = 1
    i = 0
    while i < len(words):
        word, following = words[i], words[i + 1] if i + 1 < len(words) else ""
        i += 1
        if word in _COLOUR_WORDS and following in _BACKGROUND_WORDS:
            background = _COLOUR_WORDS[word] if _COLOUR_WORDS[word] in BACKGROUNDS else None
            if background is None:
                warnings.append(f"unknown background: '{word}'")
            i += 1
        elif word in _COLOUR_WORDS and _COLOUR_WORDS[word] in COLOURS:
            colour = _COLOUR_WORDS[word]
        elif word in _COLOUR_WORDS:
            warnings.append(f"'{word}' can only be a background")
        elif word in _SIZE_WORDS:
            size = _SIZE_WORDS[word]
        elif word in ("pine", "fir", "rocket") and following in ("tree", "trees", "ship"):
            continue  # "pine tree" is one tree
        elif word in _NOUN_WORDS:
            groups.append(Group(_NOUN_WORDS[word], colour, size, count))
            colour, size, count = None, None, 1
        elif word in _COUNT_WORDS:
            count = _COUNT_WORDS[word]
        elif word in _RELATION_WORDS:
            if len(groups) == 1:
                relation = _RELATION_WORDS[word]
            elif not groups:
                warnings.append(f"'{word}' has nothing before it")
        elif word not in _FILLER and word not in _BACKGROUND_WORDS:
            warnings.append(f"unknown word: '{word}'")
    for group in groups[2:]:
        warnings.append(f"a scene has two kinds of icons at most: '{group.noun}' is left out")
    groups = groups[:2]
    if len(groups) == 2 and relation is None and groups[0] == groups[1] and groups[0].count == 1:
        groups = [replace(groups[0], count=2)]  # "a cat and a cat"
    limit = MAX_COUNT if len(groups) == 1 else 2
    for k, group in enumerate(groups):
        if group.count > limit:
            warnings.append(f"only {limit} of {group.count} are drawn: '{group.noun}'")
            groups[k] = replace(group, count=limit)
        if group.colour is not None and group.colour == background:
            warnings.append(f"'{group.noun}' has the colour of its background and will hardly be seen")
    if not groups:
        warnings.append("no icon named: only the background is drawn")
    scene = Scene(tuple(groups), relation if len(groups) == 2 else None, background)
    return scene, tuple(dict.fromkeys(warnings))


_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_WAYS = {
    None: ("and", "and", "next to", "with"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "an icon of ", "draw ")


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that says what `scene` fixes, and nothing else, in one of many ways; `parse_prompt` reads it back.

    `arrangement` has no words.
    """

    def of(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    def noun_word(noun: str, many: bool) -> str:
        if rng.random() < 0.85 or not _SYNONYMS.get(noun):
            return _PLURALS[noun] if many else noun
        word = of(_SYNONYMS[noun])
        if word == _SYNONYM_PLURALS.get(word):  # a second plural form
            return word if many else noun
        return _SYNONYM_PLURALS.get(word, word + "s") if many else word

    def phrase(group: Group) -> str:
        words = [w for w in (group.size, group.colour) if w] + [noun_word(group.noun, group.count > 1)]
        if group.count > 1:
            return " ".join([of(_NUMBERS[group.count]), *words])
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join(words if rng.random() < 0.15 else [article, *words])

    text = of(_OPENINGS)
    if scene.groups:
        text += f" {of(_WAYS[scene.relation])} ".join(phrase(g) for g in scene.groups)
    else:
        text += "a plain picture"
    if scene.background:
        text += f"{of((' on a', ', on a', ','))} {scene.background} {of(_BACKGROUND_WORDS)}"
    return text


#: What captions call the windows, in the order of `WINDOWS`.
PLACES = (
    "centre", "northwest", "north", "northeast", "west", "east", "southwest", "south", "southeast",
)  # fmt: skip

#: Every word of a caption.
CAPTION_WORDS = (*PLACES, *SIZES, *COLOURS, *NOUNS, "on", *sorted(set(BACKGROUNDS) - set(COLOURS)))


def write_caption(scene: Scene) -> str:
    """A completed scene said in full, in the one way that conventional models are trained on: "west small red cat east big
    blue car on white". Of each icon `CAPTION_WORDS_PER_ICON` words, place, size, colour and noun, then the background.
    """
    words = [f"{PLACES[i.window]} {i.size} {i.colour} {i.noun}" for i in icons(scene)]
    return " ".join([*words, f"on {scene.background}"])


#: Words that a caption has of each icon; the noun is the last.
CAPTION_WORDS_PER_ICON = 4
