"""The vocabulary: every word means one noun, and a model's nouns are the first of the list."""

import importlib.util
import re
import subprocess
import sys

import pytest

from millijoule.workers.scenes import vocabulary
from millijoule.workers.scenes.prompts import GRAMMAR_WORDS
from millijoule.workers.scenes.vocabulary import (
    DEFAULT_NOUNS,
    ENTRIES,
    NOUNS,
    VOCABULARIES,
    WORD_NUMBER,
    check_count,
    similar_noun,
)


def test_every_word_is_of_one_noun_and_none_is_the_grammars():
    owner = {}
    for entry in ENTRIES:
        assert entry.noun in entry.words
        for word in entry.words:
            assert re.fullmatch(r"[a-z]+( [a-z]+)?", word), word
            assert not GRAMMAR_WORDS & set(word.split()), word
            assert owner.setdefault(word, entry.noun) == entry.noun, word
    assert {word: NOUNS[n] for word, n in WORD_NUMBER.items()}.items() >= owner.items()


def test_forms_are_of_the_nouns_own_words():
    for entry in ENTRIES:
        own = (entry.noun, *entry.aliases)
        assert len(set(own)) == len(own)
        assert {*entry.pairs, *entry.bare, *(entry.alias_plurals or {})} <= set(own), entry.noun
        assert all(entry.plural_of(word) == word for word in entry.pairs)


def test_every_noun_has_a_glyph_of_its_own_in_the_font():
    if importlib.util.find_spec("qtawesome") is None:
        pytest.skip("needs the icon font")
    from millijoule.workers.scenes.renderer import find_icon_font

    code_points = find_icon_font().code_points
    assert len({code_points[entry.glyph] for entry in ENTRIES}) == len(ENTRIES)


def test_named_vocabularies_are_the_first_nouns():
    assert VOCABULARIES["icons-80"] == DEFAULT_NOUNS == 80
    assert VOCABULARIES["icons-1000"] == len(NOUNS) >= 1000
    assert list(VOCABULARIES.values()) == sorted(VOCABULARIES.values())
    assert NOUNS[:3] == ("airplane", "anchor", "apple")
    assert NOUNS[79] == "umbrella"


def test_counts_that_the_list_has_not_are_refused():
    assert check_count(len(NOUNS)) == len(NOUNS)
    for nouns in (0, -1, len(NOUNS) + 1):
        with pytest.raises(ValueError, match=f"{nouns} nouns"):
            check_count(nouns)


def test_similar_words_lead_to_nouns_of_the_vocabulary():
    table = vocabulary._similar_words()
    assert len(table) > 9000
    assert set(table.values()) <= set(NOUNS)
    assert not table.keys() & (WORD_NUMBER.keys() | GRAMMAR_WORDS)
    assert similar_noun("vixen") == "dog"
    assert similar_noun("bear", len(NOUNS)) == "panda"
    assert similar_noun("bear") is None  # the panda is not among the first
    assert similar_noun("zorgon", len(NOUNS)) is None


def test_similar_words_are_read_only_when_a_word_is_not_known():
    code = (
        "from millijoule.workers.scenes.prompts import parse_prompt\n"
        "from millijoule.workers.scenes.vocabulary import _similar_words\n"
        "parse_prompt('a red cat above two small dogs')\n"
        "assert _similar_words.cache_info().currsize == 0\n"
        "parse_prompt('a vixen')\n"
        "assert _similar_words.cache_info().currsize == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
