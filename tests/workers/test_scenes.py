"""Icon scenes: words to scenes and back, and renders that show what was said."""

import numpy as np
import pytest

from millijoule.workers.scenes import (
    NUM_TOKENS,
    PALETTE,
    VOCABULARY,
    Scene,
    SceneObject,
    SceneRenderer,
    is_held_out,
    parse_prompt,
    sample_scenes,
    scene_tokens,
    write_prompt,
)


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red cat", Scene((SceneObject("cat", "red"),))),
        ("Big RED kitten, grey background!", Scene((SceneObject("cat", "red", "big"),), None, "gray")),
        (
            "a red cat above a blue car on a yellow background",
            Scene((SceneObject("cat", "red"), SceneObject("car", "blue")), "above", "yellow"),
        ),
        (
            "a star to the right of a tiny moon",
            Scene((SceneObject("star"), SceneObject("moon", "black", "small")), "right of"),
        ),
        ("two green stars", Scene((SceneObject("star", "green"),) * 2, "left of")),
    ],
)
def test_prompts_are_read(prompt, scene):
    assert parse_prompt(prompt) == (scene, ())


@pytest.mark.parametrize(
    ("prompt", "word"),
    [("a red zebra", "zebra"), ("a photo of a cat driving", "driving"), ("a pink fish", "pink")],
)
def test_unknown_words_are_named(prompt, word):
    assert any(word in warning for warning in parse_prompt(prompt)[1])


def test_any_text_is_read_without_failing():
    for text in ("", " ", "\x00", "🐱" * 100, "and and above", "two", "a" * 10_000):
        scene, warnings = parse_prompt(text)
        assert scene_tokens([scene]).shape == (1, NUM_TOKENS)
        assert warnings


def test_written_prompts_are_read_back():
    rng = np.random.default_rng(0)
    for scene in sample_scenes(rng, 500):
        prompt = write_prompt(scene, rng)
        read, _ = parse_prompt(prompt)
        assert read == scene, prompt


def test_held_out_pairs_never_occur_in_training():
    scenes = sample_scenes(np.random.default_rng(1), 2000)
    assert not any(is_held_out(o.noun, o.colour) for s in scenes for o in s.objects)
    held = sample_scenes(np.random.default_rng(1), 50, held_out=True)
    assert all(is_held_out(s.objects[0].noun, s.objects[0].colour) for s in held)


def test_tokens_tell_scenes_apart():
    scenes = list(dict.fromkeys(sample_scenes(np.random.default_rng(2), 500)))
    tokens = scene_tokens(scenes)
    assert len(np.unique(tokens, axis=0)) == len(scenes)
    assert tokens.min() >= 0
    assert tokens.max() < len(VOCABULARY)


def test_renders_are_deterministic_and_show_the_colours():
    renderer = SceneRenderer()
    scene = Scene((SceneObject("heart", "red", "big"),), None, "blue")
    images = renderer.render([scene], 4, seed=3)
    assert np.array_equal(images, renderer.render([scene], 4, seed=3))
    assert not np.array_equal(images, renderer.render([scene], 4, seed=4))
    corner, middle = images[0, :, 0, 0].mean(0), images[0, :, 16, 16].mean(0)
    assert np.abs(corner - PALETTE["blue"]).max() < 25
    assert np.abs(middle - PALETTE["red"]).max() < 25
