"""Prompts of icon scenes: words to a `Scene`, and a `Scene` to words in one of many ways."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np

from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    MAX_GROUPS,
    PALETTE,
    SIZES,
    Group,
    Scene,
    icons,
)
from millijoule.workers.scenes.vocabulary import (
    DEFAULT_NOUNS,
    ENTRIES,
    NOUN_NUMBER,
    NOUNS,
    WORD_NUMBER,
    similar_noun,
)

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
_APART = frozenset(",;.:")
_FILLER = frozenset(
    re.findall(
        r"\w+",
        "a an the of on in to with and by at its is are it there beside next side near against which that please "
        "draw show showing shows picture pictures image icon icons photo photograph drawing illustration scene "
        "plain solid simple color colour colored coloured",
    )
).union(_APART)


#: Fillers after which another icon begins.
_BETWEEN_ICONS = ("and", "with", "beside", "next", "near", "against")

#: What captions call the windows, in the order of `WINDOWS`.
PLACES = (
    "centre", "northwest", "north", "northeast", "west", "east", "southwest", "south", "southeast",
)  # fmt: skip

#: Words of the grammar: they never stand for a similar noun.
GRAMMAR_WORDS = _FILLER.union(
    _COLOUR_WORDS, _SIZE_WORDS, _COUNT_WORDS, _RELATION_WORDS, _BACKGROUND_WORDS, PLACES
)
_PAIR_WORDS = frozenset(form for e in ENTRIES for word in e.pairs for form in (word, e.plural_of(word)))
#: Words that names of two words begin with.
_FIRST_WORDS = frozenset(word.split()[0] for word in WORD_NUMBER if " " in word)
#: Words that only describe the group they belong to.
_SAME_GROUP = frozenset(("of", *_COLOUR_WORDS, *_SIZE_WORDS))


def parse_prompt(prompt: str, nouns: int = DEFAULT_NOUNS) -> tuple[Scene, tuple[str, ...]]:
    """Read a prompt into a scene of the first `nouns`; never fails.

    A word that none of them has is replaced by a similar one's (`vocabulary.similar_noun`) where it stands for a thing and the
    scene has a place left beside those that the prompt does name.

    Returns:
        The scene, with open parts where the prompt says nothing, and warnings in the user's words: substitutes, unknown
        words, icons beyond what a scene holds, no icon at all.
    """
    words = _join_names(_words(prompt), nouns)
    named = [NOUNS[n] if (n := WORD_NUMBER.get(word, nouns)) < nouns else None for word in words]
    warnings: list[str] = []
    _substitute(words, named, nouns, warnings)
    groups: list[Group] = []
    relation = background = None
    said: dict[
        str, tuple[Any, str]
    ] = {}  # of the next icon: colour, size, count; what was said, in which word

    def say(what: str, value: Any, word: str) -> None:
        if what in said:
            warnings.append(f"'{said[what][1]}' gives way to '{word}'")
        said[what] = value, word

    def drop() -> None:
        """What was said of an icon that never came is not said of the next one."""
        if said:
            warnings.append(f"'{' '.join(word for _, word in said.values())}' belongs to no icon")
            said.clear()

    i = 0
    while i < len(words):
        word, following, noun = words[i], words[i + 1] if i + 1 < len(words) else "", named[i]
        i += 1
        if noun is not None:
            colour, size, count = (said.get(what, (None,))[0] for what in ("colour", "size", "count"))
            groups.append(Group(noun, colour, size, 1 if count is None else count))
            said.clear()
        elif word in _COLOUR_WORDS and following in _BACKGROUND_WORDS:
            if background is not None:
                warnings.append(f"only the last background is drawn, not '{background}'")
            background = _COLOUR_WORDS[word] if _COLOUR_WORDS[word] in BACKGROUNDS else None
            if background is None:
                warnings.append(f"unknown background: '{word}'")
            i += 1
        elif word in _COLOUR_WORDS and _COLOUR_WORDS[word] in COLOURS:
            say("colour", _COLOUR_WORDS[word], word)
        elif word in _COLOUR_WORDS:
            warnings.append(f"'{word}' can only be a background")
        elif word in _SIZE_WORDS:
            say("size", _SIZE_WORDS[word], word)
        elif word in ("pair", "pairs") and _next_name(words[i:]) in _PAIR_WORDS:
            continue  # a pair of scissors is one icon
        elif word in _COUNT_WORDS:
            say("count", _COUNT_WORDS[word], word)
        elif word in _RELATION_WORDS:
            drop()
            if relation not in (None, _RELATION_WORDS[word]) and len(groups) == 1:
                warnings.append(f"'{relation}' gives way to '{word}'")
            if len(groups) == 1:
                relation = _RELATION_WORDS[word]
            elif not groups:
                warnings.append(f"'{word}' has nothing before it")
        elif word in _BETWEEN_ICONS:
            drop()
        elif word not in _FILLER and word not in _BACKGROUND_WORDS:
            warnings.append(f"unknown word: '{word}'")
    drop()
    for group in groups[MAX_GROUPS:]:
        warnings.append(f"a scene has two kinds of icons at most: '{group.noun}' is left out")
    groups = groups[:MAX_GROUPS]
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


def _words(prompt: str) -> list[str]:
    """Words of a prompt in lower case, composed forms and plain letters (Unicode NFKC); pictures like emoji are words, too, and
    so is what keeps words apart."""
    text = unicodedata.normalize("NFKC", prompt).lower()
    found = re.findall(r"[^\W_]+|[^\w\s]", text)
    return [
        word for word in found if word in _APART or word[0].isalnum() or unicodedata.category(word) == "So"
    ]


def _join_names(words: list[str], nouns: int) -> list[str]:
    """`words` with names of two words joined, as far as the first `nouns` have any."""
    if _FIRST_WORDS.isdisjoint(words):
        return words
    joined = []
    i = 0
    while i < len(words):
        two = " ".join(words[i : i + 2])
        length = 2 if " " in two and WORD_NUMBER.get(two, nouns) < nouns else 1
        joined.append(" ".join(words[i : i + length]))
        i += length
    return joined


def _substitute(words: list[str], named: list[str | None], nouns: int, warnings: list[str]) -> None:
    """Name unknown words' similar nouns in `named`, from left to right, while fewer than two groups are named.

    A word right before a noun describes it ("a peach cat"), and one before "background" names no icon.
    """
    places = MAX_GROUPS - len(named) + named.count(None)
    if places <= 0:
        return
    similar = [
        similar_noun(word, nouns) if noun is None and word not in GRAMMAR_WORDS else None
        for word, noun in zip(words, named, strict=True)
    ]
    followed = [
        after in _BACKGROUND_WORDS or noun is not None or other is not None
        for after, noun, other in zip(words[1:], named[1:], similar[1:], strict=True)
    ]
    for i, noun in enumerate(similar):
        if noun is not None and places > 0 and not any(followed[i : i + 1]):
            named[i] = noun
            places -= 1
            warnings.append(f"drew '{noun}' for '{words[i]}'")


def _next_name(words: list[str]) -> str:
    """The first of `words` that is not in `_SAME_GROUP`."""
    return next((word for word in words if word not in _SAME_GROUP), "")


_NUMBERS = {2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
_WAYS = {
    None: ("and", "and", "next to", "with"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
_OPENINGS = ("", "", "", "a photo of ", "a picture of ", "an icon of ", "draw ")


def _article(word: str) -> str:
    """ "a " or "an ", by how `word` begins when spoken."""
    vowel = word.startswith(("a", "e", "i", "o", "u", "hour"))
    return "an " if vowel and not word.startswith(_SPOKEN_WITH_Y) else "a "


_SPOKEN_WITH_Y = ("eu", "uk", "uni", "usb", "use", "ufo", "uti")


def write_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """A prompt that says what `scene` fixes, and nothing else, in one of many ways; `parse_prompt` reads it back.

    `arrangement` has no words.
    """

    def of(options: tuple[str, ...]) -> str:
        return options[rng.integers(len(options))]

    def noun_word(group: Group) -> str:
        """The noun or one of its aliases, in the singular."""
        entry = ENTRIES[NOUN_NUMBER[group.noun]]
        if rng.random() < 0.85 or not entry.aliases:
            return group.noun
        word = of(entry.aliases)
        if group.count == 1 and word == entry.plural_of(word) and word not in entry.pairs + entry.bare:
            return group.noun  # a second plural form
        return word

    def phrase(group: Group) -> str:
        entry = ENTRIES[NOUN_NUMBER[group.noun]]
        noun = noun_word(group)
        words = [w for w in (group.size, group.colour) if w]
        if group.count > 1:
            return " ".join([of(_NUMBERS[group.count]), *words, entry.plural_of(noun)])
        words.append(noun)
        article = _article(words[0])
        if noun in entry.pairs:
            article = of(("", "a pair of "))
        elif noun in entry.bare:
            article = ""
        return ("" if rng.random() < 0.15 else article) + " ".join(words)

    text = of(_OPENINGS)
    if scene.groups:
        text += f" {of(_WAYS[scene.relation])} ".join(phrase(g) for g in scene.groups)
    else:
        text += "a plain picture"
    if scene.background:
        text += f"{of((' on a', ', on a', ','))} {scene.background} {of(_BACKGROUND_WORDS)}"
    return text


#: Every word of a caption of the nouns that the conventional model knows.
CAPTION_WORDS = (
    *PLACES,
    *SIZES,
    *COLOURS,
    *NOUNS[:DEFAULT_NOUNS],
    "on",
    *sorted(set(BACKGROUNDS) - set(COLOURS)),
)


def write_caption(scene: Scene) -> str:
    """A completed scene said in full, in the one way that conventional models are trained on: "west small red cat east big
    blue car on white". Of each icon `CAPTION_WORDS_PER_ICON` words, place, size, colour and noun, then the background.
    """
    words = [f"{PLACES[i.window]} {i.size} {i.colour} {i.noun}" for i in icons(scene)]
    return " ".join([*words, f"on {scene.background}"])


#: Words that a caption has of each icon; the noun is the last.
CAPTION_WORDS_PER_ICON = 4
