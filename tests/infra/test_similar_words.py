"""The table of similar words is made from WordNet, embeddings and choices by hand; here from a WordNet of a few synsets."""

import importlib.util
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest

from millijoule.workers.scenes.prompts import GRAMMAR_WORDS
from millijoule.workers.scenes.vocabulary import ENTRIES, NOUN_NUMBER, NOUNS, WORD_NUMBER

SCRIPT = Path(__file__).parents[2] / "infra/vocabulary/similar_words.py"
spec = importlib.util.spec_from_file_location("similar_words", SCRIPT)
similar_words = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = similar_words
spec.loader.exec_module(similar_words)

#: lemma -> synset, lexicographer file, what it is a kind of, what it is one of, gloss
SYNSETS = {
    "entity": ("00000001", 3, (), (), "all there is"),
    "thing": ("00000002", 6, ("entity",), (), "a thing"),
    "being": ("00000003", 5, ("entity",), (), "a living thing"),
    "person": ("00000004", 18, ("being",), (), "a human being"),
    "dog": ("00000005", 5, ("being",), (), "an animal that barks"),
    "poodle": ("00000006", 5, ("dog",), (), "a curly dog"),
    "city": ("00000007", 15, ("entity",), (), "a large settlement"),
    "leeds": ("00000008", 15, (), ("city",), "a city in England"),
    "tribune": ("00000009", 18, ("person",), (), "one who speaks for others"),
    "cad": ("00000010", 18, ("person",), (), "a term of abuse"),
    "gadget": ("00000011", 6, ("thing",), (), "a device"),
}


@pytest.fixture
def wordnet(tmp_path):
    """A folder in the format of WordNet's database."""
    data, index = ["  1 a licence"], ["  1 a licence"]
    for word, (synset, file, kinds, classes, gloss) in SYNSETS.items():
        pointers = [("@", k) for k in kinds] + [("@i", c) for c in classes]
        up = "".join(f"{sign} {SYNSETS[target][0]} n 0000 " for sign, target in pointers)
        data.append(f'{synset} {file:02} n 01 {word} 0 {len(pointers):03} {up}| {gloss}; "an example"')
        index.append(f"{word} n 1 0 1 0 {synset}")
    (tmp_path / "data.noun").write_text("\n".join(data))
    (tmp_path / "index.noun").write_text("\n".join(index))
    (tmp_path / "index.adj").write_text("  1 a licence\ncurly a 1 0 1 0 00000012")
    (tmp_path / "noun.exc").write_text("gadgeten gadget\n")
    (tmp_path / "cntlist.rev").write_text("poodle%1:05:00:: 1 3\n")
    return tmp_path


#: What the sentence encoder finds of words; of all others that they are like nothing.
VECTORS = {"gadget": (1, 0), "robot": (1, 0), "poodle": (0, 1), "dog": (0, 0.5)}


@pytest.fixture
def made(wordnet, tmp_path, monkeypatch):
    """The table, by the rules themselves."""

    def embed_with_gloss(pairs, encoder):
        return np.array([VECTORS.get(word, (0, 0)) for word, _ in pairs], np.float32)

    monkeypatch.setattr(similar_words, "embed_with_gloss", embed_with_gloss)
    words = tmp_path / "frequent.txt"
    names = [*SYNSETS, "poodles", "gadgets", "gadgeten", "red", "unheard", "tiger", "tigers"]
    words.write_text("\n".join(f"{word} 7" for word in names))
    options = similar_words.Options(wordnet, tmp_path, words)
    return similar_words.make_table(options)


def test_words_become_what_they_are_a_kind_of_or_are_alike_to(made):
    assert made["gadget"].noun == "robot"
    assert made["gadget"].reason == "alike"
    assert (made["poodle"].noun, made["poodle"].reason) == ("dog", "hypernym 1")
    assert made["leeds"].noun == "city"
    assert made["tribune"].noun == "person"


def test_known_words_insults_and_words_of_the_grammar_have_no_substitute(made):
    assert not made.keys() & {"dog", "person", "cad", "red", "unheard"}


def test_choices_by_hand_come_before_rules_and_plurals_follow(made):
    assert made["tiger"].noun == made["tigers"].noun == "cat"
    assert made["gadgets"].noun == made["gadgeten"].noun == "robot"


def test_choices_are_of_words_that_there_are():
    choices = similar_words.Choices()
    aliases = {alias for entry in ENTRIES for alias in entry.aliases}
    assert choices.not_by_alias <= aliases
    assert choices.not_targets | choices.places | choices.senses.keys() <= set(NOUNS)
    assert {noun for noun in choices.by_hand.values() if noun} <= NOUN_NUMBER.keys()
    assert not choices.by_hand.keys() & (WORD_NUMBER.keys() | GRAMMAR_WORDS)


def test_the_shipped_table_has_the_choices_by_hand():
    packed = SCRIPT.parents[2] / "workers/scenes/similar_words.tsv.xz"
    table = dict(line.split("\t") for line in lzma.decompress(packed.read_bytes()).decode().splitlines())
    for word, noun in similar_words.Choices().by_hand.items():
        assert table.get(word) == noun
