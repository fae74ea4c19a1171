"""Prompts: words to scenes and back, and nothing that is not understood goes unsaid."""

import numpy as np
import pytest

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
    if "ship" in prompt:
        assert parse_prompt(prompt)[0].groups[0] == Group("tree")
        return
    assert parse_prompt(prompt) == (scene, ())


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a red zebra", "zebra"),
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


def test_any_text_is_read_without_failing():
    for text in ("", " ", "\x00", "🐱" * 100, "and and above", "two", "a" * 10_000, "left left of right"):
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
