"""The nouns of icon scenes, and the words that stand for them: one list, of which a model knows the first N.

The list (`nouns.json`) changes at its end only, so what a model learned of its first nouns stays true. Words that no noun has
are looked up in `similar_words.tsv.xz`, "poodle" -> "dog", which is opened when the first such word comes. Nothing here
reads prompts; that is `prompts`.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from millijoule.workers import records

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Noun:
    """One noun.

    Attributes:
        noun: its name, one word or two.
        glyph: name of its glyph in Material Design Icons 6.
        plural: the plural of `noun`.
        aliases: further words for it.
        alias_plurals: plurals of aliases that do more than add an s.
        pairs: those of its words that are said in pairs: "a pair of scissors".
        bare: those of its words that have no article: "rice", "crossed swords".
    """

    noun: str
    glyph: str
    plural: str
    aliases: tuple[str, ...] = ()
    alias_plurals: Mapping[str, str] | None = None
    pairs: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()

    def plural_of(self, word: str) -> str:
        """The plural of `noun` or of one of `aliases`."""
        return self.plural if word == self.noun else (self.alias_plurals or {}).get(word, word + "s")

    @property
    def words(self) -> tuple[str, ...]:
        """Every word that is read as this noun, plurals after what they are plurals of."""
        singular = (self.noun, *self.aliases)
        return tuple(dict.fromkeys(form for word in singular for form in (word, self.plural_of(word))))


ENTRIES = records.decode(tuple[Noun, ...], (_FOLDER / "nouns.json").read_bytes())
NOUNS = tuple(entry.noun for entry in ENTRIES)
NOUN_NUMBER = {noun: n for n, noun in enumerate(NOUNS)}

#: Nouns that the baseline knows, and models that do not say how many: the first of `NOUNS`.
DEFAULT_NOUNS = 80
#: Named parts of the list, by how many of its first nouns they have, the smallest first. "icons-1000" is all of it.
VOCABULARIES = {"icons-80": DEFAULT_NOUNS, "icons-1000": len(NOUNS)}

#: word, or two words -> the number of its noun
WORD_NUMBER = {word: n for n, entry in enumerate(ENTRIES) for word in entry.words} | {
    word: NOUN_NUMBER[noun]  # longer names, read but not written: "pine tree" is one tree
    for noun, words in {
        "tree": ("pine tree", "pine trees", "fir tree", "fir trees"),
        "rocket": ("rocket ship", "rocket ships"),
    }.items()
    for word in words
}


def check_count(nouns: int) -> int:
    """`nouns`, if the list has so many.

    Raises:
        ValueError: it has not.
    """
    if not 1 <= nouns <= len(NOUNS):
        raise ValueError(f"{nouns} nouns: there are 1 to {len(NOUNS)}")
    return nouns


def similar_noun(word: str, nouns: int = DEFAULT_NOUNS) -> str | None:
    """What to draw for a word that is no noun's, of the first `nouns`; None where nothing among them is near enough."""
    noun = _similar_words().get(word)
    return noun if noun is not None and NOUN_NUMBER[noun] < nouns else None


@cache
def _similar_words() -> dict[str, str]:
    """word -> noun; without those whose noun the list has not."""
    lines = lzma.decompress((_FOLDER / "similar_words.tsv.xz").read_bytes()).decode().splitlines()
    return {word: noun for word, noun in (line.split("\t") for line in lines) if noun in NOUN_NUMBER}
