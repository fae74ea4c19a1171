"""Warnings are counted by kind, whatever words of prompts they hold, at bounded memory."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.closing import warning_kinds
from millijoule.pipeline.closing.warning_kinds import OTHER, WarningCounts, kind_of


@pytest.mark.parametrize(
    ("warning", "kind"),
    [
        ("unknown word: 'zorgon'", "unknown word"),
        ("drew 'dog' for 'vixen'", "drew '...' for '...'"),
        ("only 4 of 7 are drawn: 'cat'", "only N of N are drawn"),
        ("'red' can only be a background", "'...' can only be a background"),
        (
            "the prompt is 1,042 tokens long, this model reads the first 77",
            "the prompt is N tokens long, this model reads the first N",
        ),
        ("guidance_scale is not used by this model", "guidance_scale is not used by this model"),
        (": nothing before it", OTHER),
        ("", OTHER),
    ],
)
def test_a_kind_is_a_warning_without_what_is_of_one_request(warning, kind):
    assert kind_of(warning) == kind


IMAGES = st.lists(
    st.none() | st.lists(st.sampled_from(["a: 1", "a: 2", "b is 3", "b is 4", "c"]), max_size=3), max_size=30
)


@given(st.lists(IMAGES, max_size=3))
def test_images_texts_and_kinds_are_counted(blocks):
    counts = WarningCounts()
    for block in blocks:
        counts.add(pa.chunked_array([pa.array(block, pa.list_(pa.string()))]))
    images = [warnings for block in blocks for warnings in block if warnings]
    assert counts.images == len(images)
    assert counts.texts == Counter(w for warnings in images for w in warnings)
    kind = {"a: 1": "a", "a: 2": "a", "b is 3": "b is N", "b is 4": "b is N", "c": "c"}
    assert counts.kinds == Counter(k for warnings in images for k in {kind[w] for w in warnings})


def test_prompts_cannot_make_more_kinds_than_are_held(monkeypatch):
    monkeypatch.setattr(warning_kinds, "MAX_KINDS", 3)
    counts = WarningCounts()
    counts.add(pa.array([[f"kind {c}: x"] for c in "abcde"] + [["kind a: y"]], pa.list_(pa.string())))
    assert counts.kinds == {"kind a": 2, "kind b": 1, "kind c": 1, OTHER: 2}
    assert sum(counts.texts.values()) == 6
    assert len(counts.texts) == 4
