"""An image does not depend on what else is in its batch: each family, beside short and long prompts, at any batch size."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.workers.diffusion.families import FIXED_LENGTH, LEVELS, PIXELS
from millijoule.workers.schemas import ImageRequest

SHORT, MIDDLE = "a red dog", "a blue cat on the moon and a house with a tree"
LONG = "a very big old red house and " * 30
PROMPTS = (SHORT, MIDDLE, LONG, SHORT, MIDDLE, "the moon", LONG, "a green heart")

#: Those of the most different manners; the others take seconds all together.
FAMILIES = ["sd15", "sdxl", "sd3", "flux", "qwen_image", "z_image"]
MORE = [
    *("lcm", "pixart_sigma", "pixart_alpha", "sana", "chroma", "deepfloyd_if", "hunyuan_dit", "aura_flow"),
    *("lumina2", "kandinsky22", "wuerstchen"),
]
ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.long) for family in MORE)]


def apart(a, b):
    """Largest difference in levels, and the share of values that differ."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return difference.max(), (difference > 0).mean()


def assert_same(a, b, what):
    levels, share = apart(a, b)
    assert levels <= LEVELS, (what, levels)
    assert share <= PIXELS, (what, share)


def requests(family, texts, **fields):
    side = SIZES[family]
    return [
        ImageRequest("p", i, text, seed=i, width=side, height=side, num_inference_steps=2, **fields)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("family", ALL)
def test_a_neighbour_changes_nothing(tiny, family):
    generator = tiny(family)
    asked = requests(family, PROMPTS if family != "wuerstchen" else PROMPTS[:3])
    together = generator.generate(asked).images
    short, long = (generator.generate([asked[i]]).images[0] for i in (0, 2))
    assert_same(together[0], short, "in the whole batch")
    assert_same(together[2], long, "in the whole batch")
    assert apart(short, long)[0] > LEVELS or family == "wuerstchen"  # else the test could not fail
    turned = generator.generate([asked[2], asked[1], asked[0]]).images
    assert_same(turned[2], short, "beside a long one, in another place")
    assert_same(turned[0], long, "beside a short one, in another place")


@pytest.mark.parametrize("family", [f for f in ALL if "lcm" not in str(f)])  # which reads no negative prompt
def test_a_long_negative_prompt_among_short_ones_changes_nothing(tiny, family):
    generator = tiny(family)
    negatives = ("ugly", "very ugly and blurry " * 30, "")
    asked = [
        replace(request, negative_prompt=negative)
        for request, negative in zip(requests(family, (MIDDLE, MIDDLE, SHORT)), negatives, strict=True)
    ]
    together = generator.generate(asked).images
    for i in (0, 1):
        assert_same(together[i], generator.generate([asked[i]]).images[0], negatives[i])


def test_pipelines_that_nobody_tried_share_batches_by_length_only(tiny, caplog, monkeypatch):
    generator = tiny("sd15")
    calls = []
    draw = generator.call.draw
    monkeypatch.setattr(
        generator.call, "draw", lambda rows, *a, **k: calls.append(len(rows)) or draw(rows, *a, **k)
    )
    texts = ("a red dog", "a blue cat", "a very big dog", "the old moon")
    known = generator.generate(requests("sd15", texts)).images
    assert calls == [4]
    monkeypatch.setattr(generator, "family", replace(generator.family, fixed_length=False))
    with caplog.at_level("INFO", logger="millijoule.workers.diffusion.generator"):
        apart_by_length = generator.generate(requests("sd15", texts)).images
        generator.generate(requests("sd15", texts))
    assert calls[1:3] == [3, 1]  # three words are as many tokens, four words are more
    assert caplog.text.count("share a batch") == 1
    for a, b in zip(known, apart_by_length, strict=True):
        assert_same(a, b, "whatever shares its batch")


@pytest.mark.long
def test_every_pipeline_that_batches_freely_is_tried_here():
    classes = {
        json.loads((tiny_pipeline(family) / "model_index.json").read_text())["_class_name"]
        for family in (*FAMILIES, *MORE)
    }
    assert classes >= FIXED_LENGTH
