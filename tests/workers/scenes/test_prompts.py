"""Prompts: words to scenes and back, and nothing that is not understood goes unsaid."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.workers.scenes.prompts import CAPTION_WORDS, parse_prompt, write_caption, write_prompt
from millijoule.workers.scenes.scenes import (
    FAMILIES,
    NUM_TOKENS,
    Group,
    Scene,
    complete,
    sample_scene,
    scene_tokens,
)
from millijoule.workers.scenes.scenes import sample_training_scenes as sample
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, ENTRIES, NOUNS

ALL = len(NOUNS)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red cat", Scene((Group("cat", "red"),))),
        ("Big RED kitten, grey background!", Scene((Group("cat", "red", "big"),), None, "gray")),
        ("a photo of a cat", Scene((Group("cat"),))),
        ("three tiny violet bunnies", Scene((Group("rabbit", "purple", "small", 3),))),
        ("a pair of keys", Scene((Group("key", count=2),))),
        ("a cat and a cat", Scene((Group("cat", count=2),))),
        (
            "two red cats above a blue car on a white background",
            Scene((Group("cat", "red", count=2), Group("car", "blue")), "above", "white"),
        ),
        (
            "a star to the right of a tiny moon",
            Scene((Group("star"), Group("moon", size="small")), "right of"),
        ),
        ("a pine tree next to a rocket ship", Scene((Group("tree"), Group("rocket")))),
    ],
)
def test_prompts_are_read(prompt, scene):
    assert parse_prompt(prompt) == (scene, ())


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a red zorgon", "unknown word: 'zorgon'"),
        ("a red zebra", "drew 'horse' for 'zebra'"),
        ("a photo of a cat driving", "driving"),
        ("a turquoise fish", "turquoise"),
        ("seven cats", "only 4 of 7"),
        ("three cats above a dog", "only 2 of 3"),
        ("a cat, a dog and a fish", "'fish' is left out"),
        ("a cat on a green background", "unknown background"),
        ("a white cat on a white background", "hardly be seen"),
        ("a gray cat", "only be a background"),
    ],
)
def test_what_is_not_drawn_is_named(prompt, word):
    assert any(word in warning for warning in parse_prompt(prompt)[1])


@pytest.mark.parametrize(
    ("prompt", "groups"),
    [
        ("a red fire truck", (Group("fire truck", "red"),)),
        ("a palm tree next to a tree", (Group("palm tree"), Group("tree"))),
        ("a pine tree, a rocket ship", (Group("tree"), Group("rocket"))),
        ("scissors", (Group("scissors"),)),
        ("a pair of small scissors", (Group("scissors", None, "small"),)),
        ("two pairs of scissors", (Group("scissors", count=2),)),
        ("a pair of keys", (Group("key", count=2),)),
        ("three sheep", (Group("sheep", count=3),)),
        ("eyeglasses", (Group("spectacles"),)),
    ],
)
def test_names_of_two_words_and_words_without_a_singular_are_read(prompt, groups):
    scene, warnings = parse_prompt(prompt, ALL)
    assert (scene.groups, warnings) == (groups, ())


def test_a_model_knows_its_own_nouns_only():
    truck, warnings = parse_prompt("a fire truck")
    assert truck.groups == (Group("truck"),)
    assert warnings == ("unknown word: 'fire'",)
    name = NOUNS[-1]
    assert parse_prompt(name, ALL) == (Scene((Group(name),)), ())
    assert name not in [g.noun for g in parse_prompt(name, ALL - 1)[0].groups]


@pytest.mark.parametrize(
    ("prompt", "nouns", "groups", "warnings"),
    [
        ("a red vixen", DEFAULT_NOUNS, (Group("dog", "red"),), ["drew 'dog' for 'vixen'"]),
        ("two poodles", DEFAULT_NOUNS, (Group("dog", count=2),), ["drew 'dog' for 'poodles'"]),
        ("a bear", ALL, (Group("panda"),), ["drew 'panda' for 'bear'"]),
        # what would be drawn for it is a noun that this model does not know
        ("a bear and a car", DEFAULT_NOUNS, (Group("car"),), ["unknown word: 'bear'"]),
        # nothing that the prompt names gives way to a substitute
        ("a vixen, a car and a key", ALL, (Group("car"), Group("key")), ["unknown word: 'vixen'"]),
        (
            "a vixen, a bear and a key",
            ALL,
            (Group("dog"), Group("key")),
            ["drew 'dog' for 'vixen'", "unknown word: 'bear'"],
        ),
        # words that describe something are no things
        ("a peach cat", ALL, (Group("cat"),), ["unknown word: 'peach'"]),
        ("a salmon vixen", ALL, (Group("dog"),), ["drew 'dog' for 'vixen'", "unknown word: 'salmon'"]),
        ("a key, salmon background", ALL, (Group("key"),), ["unknown word: 'salmon'"]),
        ("a peach and a cat", ALL, (Group("apple"), Group("cat")), ["drew 'apple' for 'peach'"]),
        # words of the grammar are never replaced
        ("a gold key on a gray background", ALL, (Group("key", "yellow"),), []),
    ],
)
def test_a_word_that_is_not_known_is_replaced_by_a_similar_one(prompt, nouns, groups, warnings):
    scene, said = parse_prompt(prompt, nouns)
    assert scene.groups == groups
    assert list(said) == warnings


def test_every_word_of_every_noun_is_read_as_that_noun():
    for entry in ENTRIES:
        for word in (entry.noun, *entry.aliases):
            plural = entry.plural_of(word)
            read = Scene((Group(entry.noun, "red"),)), Scene((Group(entry.noun, None, "big", 3),))
            assert (parse_prompt(f"a red {word}", ALL), parse_prompt(f"3 big {plural}", ALL)) == (
                (read[0], ()),
                (read[1], ()),
            ), word


any_group = st.builds(
    Group,
    st.sampled_from(NOUNS),
    st.sampled_from([None, "red", "orange", "white"]),
    st.sampled_from([None, "small", "big"]),
    st.integers(1, 2),
)


@given(any_group, any_group, st.sampled_from([None, "left of", "below"]), st.integers(0, 2**32))
def test_written_prompts_of_all_nouns_are_read_back(group, other, relation, seed):
    scene = Scene((group, other), relation, "blue")
    prompt = write_prompt(scene, np.random.default_rng(seed))
    expected = (scene, ())
    if relation is None and group == other and group.count == 1:
        expected = (Scene((Group(group.noun, group.colour, group.size, 2),), None, "blue"), ())
    assert parse_prompt(prompt, ALL) == expected, prompt


def test_every_noun_is_written_and_read_back_in_all_its_ways():
    rng = np.random.default_rng(3)
    for noun in NOUNS:
        for scene in (Scene((Group(noun),)), Scene((Group(noun, "red"),)), Scene((Group(noun, count=3),))):
            for prompt in {write_prompt(scene, rng) for _ in range(6)}:
                assert parse_prompt(prompt, ALL) == (scene, ()), prompt


@pytest.mark.parametrize(
    ("noun", "ways", "never"),
    [
        ("scissors", {"scissors", "a pair of scissors"}, " a scissors"),
        ("crossed swords", {"crossed swords"}, " a crossed swords"),
        ("rice", {"rice", "a rice bowl"}, " a rice"),
        ("sheep", {"a sheep", "sheep", "a lamb"}, " an sheep"),
        ("hourglass", {"an hourglass"}, " a hourglass"),
        ("unicorn", {"a unicorn"}, " an unicorn"),
    ],
)
def test_nouns_have_the_articles_that_they_have(noun, ways, never):
    rng = np.random.default_rng(0)
    prompts = {write_prompt(Scene((Group(noun),)), rng) for _ in range(200)}
    assert ways <= prompts
    assert not any(f" {prompt}".endswith(never) for prompt in prompts)


def test_prompts_of_the_first_80_nouns_are_written_and_read_as_ever():
    """The fingerprints were taken when there were no other nouns."""
    rng = np.random.default_rng(14)
    scenes = [sample_scene(f, rng, held_out=h) for f in FAMILIES for h in (False, True) for _ in range(50)]
    scenes += [said for said, _ in sample(rng, 300)]
    prompts = [write_prompt(scene, rng) for scene in scenes]
    read = [parse_prompt(prompt) for prompt in prompts]
    found = [hashlib.sha256(repr(x).encode()).hexdigest()[:16] for x in (prompts, read, CAPTION_WORDS)]
    assert found == ["9ab96f867d864a4e", "af8ac4df44fc385b", "05330be3b6d1d185"]


@pytest.mark.parametrize(
    ("prompt", "groups", "said"),
    [
        ("two small red zorgons and a dog", [("dog", None, None, 1)], "'two small red' belongs to no icon"),
        ("a rose and a cat", [("cat", None, None, 1)], "'rose' belongs to no icon"),
        ("three oranges above a cat", [("cat", None, None, 1)], "'three' belongs to no icon"),
        ("the cat is red", [("cat", None, None, 1)], "'red' belongs to no icon"),
        ("a red blue cat", [("cat", "blue", None, 1)], "'red' gives way to 'blue'"),
        ("a large small cat", [("cat", None, "small", 1)], "'large' gives way to 'small'"),
        ("vixen, kitten", [("dog", None, None, 1), ("cat", None, None, 1)], "drew 'dog' for 'vixen'"),
        ("a big, red cat", [("cat", "red", "big", 1)], None),
        ("two small red striped cats", [("cat", "red", "small", 2)], "unknown word: 'striped'"),
        (
            "a cat above and below a dog",
            [("cat", None, None, 1), ("dog", None, None, 1)],
            "'above' gives way to 'below'",
        ),
        ("a cat on a black background on a white background", [("cat", None, None, 1)], "not 'black'"),
        ("\N{CAT FACE} and a dog", [("dog", None, None, 1)], "unknown word: '\N{CAT FACE}'"),
        ("\uff43\uff41\uff54", [("cat", None, None, 1)], None),
        ("c\u0301at", [], "unknown word: '\u0107at'"),
    ],
)
def test_what_is_said_of_one_icon_is_not_said_of_another_and_nothing_is_lost_in_silence(prompt, groups, said):
    scene, warnings = parse_prompt(prompt)
    assert [(g.noun, g.colour, g.size, g.count) for g in scene.groups] == groups
    assert any(said in warning for warning in warnings) if said else not warnings


def test_any_text_is_read_without_failing():
    for text in (
        "",
        " ",
        "pairs of",
        "pair",
        "\x00",
        "🐱" * 100,
        "and and above",
        "two",
        "a" * 10_000,
        "left left of right",
    ):
        scene, warnings = parse_prompt(text)
        assert scene_tokens([complete(scene, 0)]).shape == (1, NUM_TOKENS)
        assert warnings


def test_written_prompts_are_read_back():
    rng = np.random.default_rng(0)
    scenes = [said for said, _ in sample(rng, 1500)]
    scenes += [sample_scene(f, rng, held_out=h) for f in FAMILIES for h in (False, True) for _ in range(100)]
    for scene in scenes:
        prompt = write_prompt(scene, rng)
        read, warnings = parse_prompt(prompt)
        assert read == scene, prompt
        assert not warnings or not scene.groups, prompt


def test_one_scene_is_said_in_many_ways():
    rng = np.random.default_rng(0)
    scene = Scene((Group("cat", "red"), Group("dog")), "left of", "blue")
    assert len({write_prompt(scene, rng) for _ in range(200)}) > 30


def test_a_caption_says_every_icon_in_full():
    scene = Scene((Group("cat", "red", "small", 2), Group("car", "blue", "big")), "left of", "white", 0)
    assert write_caption(scene) == (
        "northwest small red cat east big blue car southwest small red cat on white"
    )
    assert write_caption(Scene((), None, "gray")) == "on gray"


def test_captions_differ_where_scenes_do():
    scenes = [scene for _, scene in sample(np.random.default_rng(0), 2000)]
    captions = [write_caption(scene) for scene in scenes]
    assert set(" ".join(captions).split()) <= set(CAPTION_WORDS)
    tokens = [scene_tokens([scene]).tobytes() for scene in scenes]
    assert len(set(captions)) == len(set(tokens))
