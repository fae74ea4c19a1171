"""Many scenes settled at once are those that `complete` settles one by one."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    RELATIONS,
    SIZES,
    Group,
    Scene,
    complete,
    sample_scene,
    scene_tokens,
)
from millijoule.workers.scenes.settle import scene_row, settle
from millijoule.workers.scenes.vocabulary import NOUNS

colours, sizes = (st.none() | st.sampled_from(names) for names in (COLOURS, SIZES))


def group(most):
    return st.builds(Group, st.sampled_from(NOUNS), colours, sizes, st.integers(1, most))


scenes = st.builds(
    Scene,
    st.just(()) | st.tuples(group(4)) | st.tuples(group(2), group(2)),
    st.none() | st.sampled_from(RELATIONS),
    st.none() | st.sampled_from(BACKGROUNDS),
    st.sampled_from([None, 0, 1]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(scenes, st.integers(0, 2**64 - 1)), min_size=1, max_size=30))
def test_any_scene_and_seed(asked):
    one_by_one = scene_tokens([complete(scene, seed) for scene, seed in asked])
    at_once = settle(
        [scene_row(scene) for scene, _ in asked], np.array([seed for _, seed in asked], np.uint64)
    )
    assert np.array_equal(at_once, one_by_one)


def test_prompts_as_people_write_them():
    prompts = [
        "",
        "a red fox",
        "two cats",
        "fox left of a big blue dog",
        "foxes and cats",
        "3 tiny stars on a gray background",
    ]
    read = [parse_prompt(prompt)[0] for prompt in prompts * 50]
    one_by_one = scene_tokens([complete(scene, seed) for seed, scene in enumerate(read)])
    at_once = settle([scene_row(scene) for scene in read], np.arange(len(read), dtype=np.uint64))
    assert np.array_equal(at_once, one_by_one)


def test_scenes_of_the_suites():
    rng = np.random.default_rng(0)
    sampled = [sample_scene(FAMILIES[i % 6], rng) for i in range(600)]
    one_by_one = scene_tokens([complete(scene, 7 * i) for i, scene in enumerate(sampled)])
    at_once = settle([scene_row(scene) for scene in sampled], 7 * np.arange(600, dtype=np.uint64))
    assert np.array_equal(at_once, one_by_one)
    assert settle([], np.zeros(0, np.uint64)).shape == one_by_one[:0].shape
