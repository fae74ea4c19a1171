"""Icon scenes: what they hold, what is settled by a seed, and what training never sees."""

import hashlib
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    MAX_COUNT,
    MIN_NOUNS,
    NUM_TOKENS,
    RELATIONS,
    SIZES,
    WINDOWS,
    Choices,
    Group,
    Scene,
    complete,
    icons,
    is_held_out,
    is_held_out_colour,
    is_held_out_pair,
    sample_scene,
    sample_training_scenes,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUN_NUMBER, NOUNS


def test_the_domain_is_as_large_as_promised():
    assert len(NOUNS) >= 1000
    assert len(COLOURS) >= 10
    assert len(BACKGROUNDS) >= 3
    assert MAX_COUNT == 4
    assert len(FAMILIES) == 6


def test_a_tenth_of_colours_and_of_pairs_is_held_out():
    colours = [is_held_out_colour(n, c) for n in NOUNS for c in COLOURS]
    pairs = [is_held_out_pair(a, b) for a, b in combinations(NOUNS, 2)]
    assert np.mean(colours) >= 0.1
    assert np.mean(pairs) >= 0.1
    assert all(is_held_out_pair(a, b) == is_held_out_pair(b, a) for a, b in combinations(NOUNS, 2))
    per_noun = np.reshape(colours, (len(NOUNS), -1)).sum(1)
    assert (per_noun == 1).all()  # every noun is seen in most colours


def test_training_never_shows_what_is_held_out():
    for said, completed in sample_training_scenes(np.random.default_rng(0), 3000):
        assert not is_held_out(completed)
        for said_group, group in zip(said.groups, completed.groups, strict=True):
            assert said_group.colour in (None, group.colour)
            assert (said_group.noun, said_group.count) == (group.noun, group.count)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_draw_held_out_combinations_where_they_name_any(family):
    rng = np.random.default_rng(1)
    for held_out in (False, True):
        for scene in (sample_scene(family, rng, held_out=held_out) for _ in range(200)):
            named = family not in ("single object", "counting")
            assert is_held_out(scene) == (held_out and named)


def test_scenes_are_of_the_first_nouns_and_of_all_of_these():
    rng = np.random.default_rng(2)
    drawn = {
        nouns: [
            *(sample_scene(f, rng, held_out=h, nouns=nouns) for f in FAMILIES for h in (False, True)),
            *(said for said, _ in sample_training_scenes(rng, 2000, nouns)),
        ]
        for nouns in (2 * DEFAULT_NOUNS, len(NOUNS))
    }
    for nouns, scenes in drawn.items():
        numbers = {NOUN_NUMBER[g.noun] for scene in scenes for g in scene.groups}
        assert max(numbers) < nouns
        assert len(numbers) > 0.85 * nouns


def test_scenes_of_the_first_80_nouns_are_drawn_as_ever():
    """The fingerprints were taken when there were no other nouns: suites and trainings of these go on as they began."""

    def fingerprint(values: object) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:16]

    rng = np.random.default_rng(14)
    drawn = [sample_scene(f, rng, held_out=h) for f in FAMILIES for h in (False, True) for _ in range(50)]
    assert fingerprint(drawn) == "7aef803f1b9a8871"
    pairs = sample_training_scenes(rng, 300)
    assert fingerprint(pairs) == "36d97f6655e5a1e4"
    tokens = scene_tokens([completed for _, completed in pairs])
    assert hashlib.sha256(tokens.tobytes()).hexdigest()[:16] == "347d2d8b459af761"


scenes = st.builds(
    lambda groups, relation, background: Scene(
        tuple(groups), relation if len(groups) == 2 else None, background
    ),
    st.one_of(
        st.lists(
            st.builds(
                Group,
                st.sampled_from(NOUNS),
                st.sampled_from([None, *COLOURS]),
                st.sampled_from([None, *SIZES]),
                st.integers(1, 2),
            ),
            max_size=2,
        ),
        st.lists(st.builds(Group, st.sampled_from(NOUNS), count=st.integers(1, 4)), max_size=1),
    ),
    st.sampled_from([None, *RELATIONS]),
    st.sampled_from([None, *BACKGROUNDS]),
)


@given(scenes, st.integers(0, 2**64 - 1))
def test_completion_settles_everything_and_changes_nothing_said(scene, seed):
    whole = complete(scene, seed)
    assert whole == complete(scene, seed)
    assert complete(whole, seed + 1) == whole
    found = icons(whole)
    assert len(found) == sum(g.count for g in scene.groups)
    covered = np.zeros((8, 8), int)
    for icon in found:
        x, y, side = WINDOWS[icon.window]
        covered[y : y + side, x : x + side] += 1
        assert icon.colour in COLOURS
        assert icon.size in SIZES
    assert covered.max(initial=0) <= 1  # icons do not overlap
    for said, group in zip(scene.groups, whole.groups, strict=True):
        assert replace(group, colour=said.colour, size=said.size) == said
        assert said.colour is not None or group.colour != whole.background
    if scene.background:
        assert whole.background == scene.background


@given(st.sampled_from(RELATIONS), st.integers(1, 2), st.integers(1, 2))
def test_relations_hold_between_all_icons(relation, count, other_count):
    scene = complete(Scene((Group("cat", count=count), Group("dog", count=other_count)), relation), 0)
    centre = {n: [] for n in ("cat", "dog")}
    for icon in icons(scene):
        x, y, side = WINDOWS[icon.window]
        centre[icon.noun].append((x + side / 2, y + side / 2))
    axis = 0 if relation in ("left of", "right of") else 1
    first, second = ([c[axis] for c in centre[n]] for n in ("cat", "dog"))
    if relation in ("left of", "above"):
        assert max(first) < min(second)
    else:
        assert min(first) > max(second)


def test_an_open_scene_has_no_icons_yet():
    for scene in (Scene((Group("cat"),)), Scene((Group("cat", "red", "big"), Group("dog", "red", "big")))):
        with pytest.raises(ValueError, match="open"):
            icons(scene)


def test_choices_are_splitmix64_and_uniform():
    counts = np.bincount([Choices(seed).of(range(10)) for seed in range(5000)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 30  # chi-squared, 9 degrees of freedom, p about 4e-4
    assert (
        Choices(0x5CE4E5C0FFEE).of(range(2**32)) == 0xE220A839
    )  # of 0xE220A8397B1DCDAF, published for seed 0


def test_tokens_tell_scenes_apart():
    completed = {completed for _, completed in sample_training_scenes(np.random.default_rng(3), 500)}
    shown = {(icons(s), s.background) for s in completed}
    tokens = scene_tokens(list(completed))
    assert tokens.shape == (len(completed), NUM_TOKENS)
    assert len(np.unique(tokens, axis=0)) == len(shown)


def test_too_few_nouns_for_pairs_that_are_held_out_are_refused():
    rng = np.random.default_rng(0)
    assert sample_scene("two objects", rng, held_out=True, nouns=MIN_NOUNS).groups
    with pytest.raises(ValueError, match="at least 6"):
        sample_scene("two objects", rng, held_out=True, nouns=MIN_NOUNS - 1)
