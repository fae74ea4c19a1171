"""Quality metrics against cases whose answers are known."""

import numpy as np
import pytest

from millijoule.workers.judging.quality import (
    duplicate_rates,
    family_means,
    frechet_distance,
    holds,
    judge,
    precision_recall,
)
from millijoule.workers.judging.verifier import IconReading, SceneReading
from millijoule.workers.scenes.scenes import Group, Scene


def icon(noun: str, colour: str = "red", x: float = 32, y: float = 32, size: str = "medium") -> IconReading:
    return IconReading(noun, colour, size, x, y, 1.0)


def reading(*icons: IconReading, background: str = "white") -> SceneReading:
    return SceneReading(icons, background)


CAT_DOG = Scene((Group("cat"), Group("dog")), "left of")
COLOURED = Scene((Group("cat", "red"), Group("dog", "blue")))


@pytest.mark.parametrize(
    ("scene", "family", "read", "correct", "strict"),
    [
        (Scene((Group("cat"),)), "single object", reading(icon("cat")), True, True),
        (Scene((Group("cat"),)), "single object", reading(icon("cat"), icon("dog")), True, False),
        (Scene((Group("cat"),)), "single object", reading(), False, False),
        (Scene((Group("cat", count=3),)), "counting", reading(*[icon("cat")] * 3), True, True),
        (Scene((Group("cat", count=3),)), "counting", reading(*[icon("cat")] * 4), False, False),
        (Scene((Group("cat", count=3),)), "counting", reading(*[icon("cat")] * 3, icon("dog")), True, False),
        (Scene((Group("cat", "red"),)), "colours", reading(icon("cat", "blue")), False, False),
        (Scene((Group("cat", "red"),), None, "blue"), "colours", reading(icon("cat")), True, False),
        (CAT_DOG, "position", reading(icon("cat", x=16), icon("dog", x=48)), True, True),
        (CAT_DOG, "position", reading(icon("cat", x=48), icon("dog", x=16)), False, False),
        (CAT_DOG, "position", reading(icon("cat", y=16), icon("dog", y=48)), False, False),
        (COLOURED, "colour attribution", reading(icon("cat"), icon("dog", "blue")), True, True),
        (COLOURED, "colour attribution", reading(icon("cat", "blue"), icon("dog", "red")), False, False),
    ],
)
def test_families_are_judged_by_their_rules(scene, family, read, correct, strict):
    verdict = judge(scene, family, read)
    assert (verdict.correct, verdict.strict) == (correct, strict)


def test_groups_side_by_side_satisfy_the_strict_rule():
    scene = Scene((Group("cat", count=2), Group("dog")), "above")
    read = reading(icon("cat", x=16, y=16), icon("cat", x=48, y=16), icon("dog", x=32, y=48))
    assert judge(scene, "position", read).strict


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_relations_are_antisymmetric(relation):
    rng = np.random.default_rng(0)
    for x, y, u, v in rng.uniform(0, 64, (200, 4)):
        a, b = icon("cat", x=x, y=y), icon("dog", x=u, y=v)
        assert not (holds(relation, a, b) and holds(relation, b, a))


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 3)) * [1.0, 2.0, 0.5]
    b = rng.normal(size=(200_000, 3)) * [1.5, 2.0, 1.0] + [1.0, 0.0, 2.0]
    expected = 1 + 4 + 0.5**2 + 0 + 0.5**2  # |m|^2 + sum of squared differences of deviations
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_precision_and_recall_tell_lost_modes_from_bad_samples():
    rng = np.random.default_rng(0)
    true = np.concatenate([rng.normal(size=(400, 4)), rng.normal(size=(400, 4)) + 20])
    assert min(precision_recall(true + 1e-6, true)) == 1.0
    collapsed = rng.normal(size=(800, 4)) * 0.5
    precision, recall = precision_recall(collapsed, true)
    assert precision > 0.9
    assert recall < 0.5
    scattered = rng.uniform(-100, 100, (800, 4))
    assert precision_recall(scattered, true)[0] < 0.05


def test_duplicates_are_found_within_a_prompt_only():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    images[1] = images[0]
    images[3] = np.clip(images[2].astype(int) + 1, 0, 255)
    images[5] = images[4]
    exact, near = duplicate_rates(images, ["a", "a", "b", "b", "c", "d"])
    assert (exact, near) == (2 / 6, 4 / 6)


def test_intervals_cover_the_truth_and_shrink():
    """Over repeated experiments, about 95 % of the intervals hold the true share."""
    covered, widths = [], {20: [], 200: []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for prompts in widths:
            correct = rng.random(prompts) < 0.7
            names = np.array([f"p{i}" for i in range(prompts)])
            _, low, high = family_means(correct, np.full(prompts, "x"), names, resamples=400)["mean"]
            widths[prompts].append(high - low)
            if prompts == 200:
                covered.append(low <= 0.7 <= high)
    assert np.mean(covered) > 0.85
    assert np.mean(widths[200]) < 0.5 * np.mean(widths[20])


def test_images_of_one_prompt_are_resampled_together():
    """Ten copies of each of ten prompts are no more certain than ten prompts."""
    correct = np.repeat(np.arange(10) < 5, 10)
    names = np.repeat([f"p{i}" for i in range(10)], 10)
    _, low, high = family_means(correct, np.full(100, "x"), names)["x"]
    assert high - low > 0.4
