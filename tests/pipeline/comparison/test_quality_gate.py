"""The gate lets equals pass, notices worse images, and fails wherever something is missing."""

import dataclasses

import numpy as np
import pytest

from millijoule.pipeline.comparison.acceptance import find_repeats, is_blank, parse_icons, shows_scene
from millijoule.pipeline.comparison.quality_gate import ArmImages, accepted_spread, judge_gate
from millijoule.pipeline.comparison.registration import Gate, Metric, Request
from millijoule.workers.scenes.scenes import FAMILIES

GATE = Gate(
    "judge",
    "0" * 64,
    score_margin=0.05,
    frechet_margin=0.2,
    min_images=100,
    resamples=300,
    frechet_resamples=50,
    metrics=(Metric("clip", "1" * 64, 0.1),),
)
REQUESTS = [Request(f"family {i % 3}", f"prompt {i // 2}", i) for i in range(600)]


def images(share, seed=0, shift=0.0, **changes):
    rng = np.random.default_rng(seed)
    n = len(REQUESTS)
    values = {
        "accepted": list(map(bool, rng.random(n) < share)),
        "blank": [False] * n,
        "repeated": [False] * n,
        "features": rng.standard_normal((n, 4)).astype(np.float32) + np.float32(shift),
        "metrics": {"clip": list(rng.standard_normal(n) * 0.3 - shift)},
    }
    return ArmImages(**{**values, **changes})


REFERENCE = np.random.default_rng(9).standard_normal((600, 4)) + 0.5


def judged(a, b, gate=GATE, reference=REFERENCE, requests=REQUESTS):
    return judge_gate(gate, 0.95, requests, {"A": a, "B": b}, reference)


def test_a_better_model_passes():
    result = judged(images(0.9, 1, shift=0.4), images(0.7, 2), gate=dataclasses.replace(GATE, metrics=()))
    assert result.failures == ()
    assert result.passed
    assert result.checks["score"]["difference"] == pytest.approx(0.2, abs=0.06)
    assert result.checks["frechet"]["a"] < result.checks["frechet"]["b"]


def test_the_same_images_pass():
    result = judged(images(0.8), images(0.8))
    assert result.passed
    assert result.checks["score"]["high"] == 0.0
    assert result.checks["score"]["low"] == pytest.approx(-3.69 / 600, rel=0.01)


def test_agreement_on_few_prompts_does_not_show_a_narrow_margin():
    narrow = dataclasses.replace(GATE, score_margin=0.005)
    assert judged(images(0.8), images(0.8), gate=narrow).failures == ("score",)


@pytest.mark.parametrize(
    ("a", "failure"),
    [
        (images(0.7, 1), "score"),
        (images(0.8, shift=-0.5), "frechet"),
        (images(0.8, metrics={"clip": [-1.0] * 600}), "metric clip"),
    ],
)
def test_worse_images_fail_by_the_metric_that_sees_it(a, failure):
    result = judged(a, images(0.8))
    assert not result.passed
    assert failure in result.failures


def test_equal_means_with_too_few_prompts_to_be_sure_fail():
    requests = REQUESTS[:120]

    def few(arm):
        return dataclasses.replace(
            arm,
            accepted=arm.accepted[:120],
            blank=arm.blank[:120],
            repeated=arm.repeated[:120],
            features=arm.features[:120],
            metrics={"clip": arm.metrics["clip"][:120]},
        )

    result = judged(few(images(0.5, 1)), few(images(0.5, 2)), requests=requests)
    assert "score" in result.failures


def replaced(values, value, rows=(0,)):
    values = list(values)
    for row in rows:
        values[row] = value
    return values


GOOD = images(0.8)
NAN = GOOD.features.copy()
NAN[3, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({"accepted": replaced(GOOD.accepted, None)}, "images A"),
        ({"blank": replaced(GOOD.blank, None)}, "images A"),
        ({"blank": replaced(GOOD.blank, True, range(10))}, "blank A"),
        ({"repeated": replaced(GOOD.repeated, True, range(10))}, "repeated A"),
        ({"features": None}, "frechet"),
        ({"features": NAN}, "frechet"),
        ({"features": GOOD.features[:, :3]}, "frechet"),
        ({"metrics": {}}, "metric clip"),
        ({"metrics": {"clip": replaced(GOOD.metrics["clip"], float("nan"))}}, "metric clip"),
        ({"metrics": {"clip": replaced(GOOD.metrics["clip"], None)}}, "metric clip"),
        ({"metrics": {"clip": GOOD.metrics["clip"][:-1]}}, "metric clip"),
    ],
)
def test_what_is_missing_fails(changes, failure):
    result = judged(dataclasses.replace(GOOD, **changes), GOOD)
    assert not result.passed
    assert failure in result.failures
    if failure.endswith(" A"):  # a broken baseline is no baseline
        other = judged(GOOD, dataclasses.replace(GOOD, **changes))
        assert failure.replace(" A", " B") in other.failures


def test_too_few_images_or_no_reference_fail():
    assert "images A" in judged(GOOD, GOOD, gate=dataclasses.replace(GATE, min_images=601)).failures
    assert judged(GOOD, GOOD, reference=None).failures == ("frechet",)
    assert judged(GOOD, GOOD, reference=REFERENCE[:4]).failures == ("frechet",)
    one_prompt = [dataclasses.replace(r, prompt=r.family) for r in REQUESTS]
    assert "prompts" in judged(GOOD, GOOD, requests=one_prompt).failures


def test_blank_and_repeated_images_are_not_accepted():
    arm = ArmImages([True] * 4, [False, True, False, False], [False, False, True, False], None, {})
    assert arm.counted() == [True, False, False, True]


def test_the_spread_over_prompts_is_that_of_the_accepted_shares():
    spread = accepted_spread(GATE, 0.95, REQUESTS, {"A": images(0.9, 1), "B": images(0.3, 2)})
    expected = 1.96 * np.sqrt((1 - 0.9) / 0.9 / 600 + (1 - 0.3) / 0.3 / 600)
    assert spread == pytest.approx(expected, rel=0.25)
    none = images(0.0)
    assert accepted_spread(GATE, 0.95, REQUESTS, {"A": GOOD, "B": none}) is None


# ---- the rule of acceptance --------------------------------------------------------------------------------------


def test_blank_is_an_even_surface():
    image = np.full((8, 8, 3), 100, np.uint8)
    image[..., 1] = 7
    assert is_blank(image)
    image[0, 0, 0] += 3
    assert not is_blank(image)


def test_repeats_are_found_within_a_prompt_only():
    assert find_repeats(["a", "a", "b", "a"], ["1", "1", "1", None]) == [False, True, False, False]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[["cat","red","big",1]]', '[["cat","red","big",1,NaN]]'])
def test_readings_that_are_none_are_refused(text):
    with pytest.raises(ValueError):
        parse_icons(text)


def test_prompts_without_a_scene_are_refused():
    for prompt, family in (("hello", "counting"), ("a red cat", "position"), ("a red cat", "other")):
        with pytest.raises(ValueError):
            shows_scene(prompt, family, [], 80)


@pytest.mark.long
def test_the_rule_agrees_with_the_judge():
    """On scenes as drawn, and with icons moved, recoloured, dropped and doubled."""
    from millijoule.workers.judging.quality import judge
    from millijoule.workers.judging.verifier import IconReading, SceneReading
    from millijoule.workers.scenes.prompts import parse_prompt, write_prompt
    from millijoule.workers.scenes.scenes import COLOURS, sample_scene

    outcomes = {family: set() for family in FAMILIES}
    for trial in range(1200):
        rng = np.random.default_rng(trial)
        family = FAMILIES[trial % len(FAMILIES)]
        nouns = (80, 1040)[trial // len(FAMILIES) % 2]
        scene = sample_scene(family, rng, held_out=bool(trial % 2), nouns=nouns)
        prompt = write_prompt(scene, rng)
        icons = [
            (
                group.noun,
                group.colour if group.colour and rng.random() < 0.8 else COLOURS[rng.integers(10)],
                group.size or "big",
                float(rng.integers(64)),
                float(rng.integers(64)),
            )
            for group in scene.groups
            for _ in range(group.count + int(rng.integers(-1, 2) if rng.random() < 0.3 else 0))
        ]
        reading = SceneReading(tuple(IconReading(*icon, probability=1.0) for icon in icons), "white")
        expected = judge(parse_prompt(prompt, nouns)[0], family, reading).correct
        assert shows_scene(prompt, family, icons, nouns) == expected, (prompt, icons)
        outcomes[family].add(expected)
    assert all(found == {True, False} for found in outcomes.values())
