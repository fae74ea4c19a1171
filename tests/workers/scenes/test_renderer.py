"""Renders: they show what the scene says, and the same seed gives the same pixels."""

import hashlib

import numpy as np
import pytest
import torch

from millijoule.workers.scenes.renderer import (
    ICON_PIXELS,
    SceneRenderer,
    draw_variation,
    icon_cover,
    icon_mask,
    icon_masks,
    render_scenes,
)
from millijoule.workers.scenes.scenes import (
    COLOURS,
    IMAGE_SIZE,
    PALETTE,
    SIZES,
    WINDOWS,
    Group,
    Scene,
    complete,
    icons,
    sample_training_scenes,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUN_NUMBER, NOUNS

#: Making every icon takes seconds: the first ones, and one in twenty of the others.
SOME_NOUNS = (*NOUNS[:DEFAULT_NOUNS], *NOUNS[DEFAULT_NOUNS::20])


def scenes(count: int, seed: int = 0):
    return [completed for _, completed in sample_training_scenes(np.random.default_rng(seed), count)]


def test_icons_and_background_have_their_colours():
    chosen = scenes(40)
    images = render_scenes(chosen, 5, seed=1).astype(float)
    assert images.shape == (40, 5, IMAGE_SIZE, IMAGE_SIZE, 3)
    for scene, renders in zip(chosen, images, strict=True):
        cover = icon_cover(scene)
        bare = cover.sum(0) == 0
        for axis in (0, 1):  # pixels beside an icon may be covered after jitter
            bare &= np.roll(bare, 1, axis) & np.roll(bare, -1, axis)
        assert np.abs(renders[:, bare] - PALETTE[scene.background]).max() <= 15
        for icon, mask in zip(icons(scene), cover, strict=True):
            inner = mask == 1
            for axis in (0, 1):
                inner &= np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
            if inner.any():
                assert np.abs(renders[:, inner] - PALETTE[icon.colour]).max() <= 15


def test_icons_are_as_large_as_they_should_be_and_inside_their_windows():
    for noun in SOME_NOUNS:
        for size in SIZES:
            for count in (1, 4):
                scene = Scene((Group(noun, "red", size, count),), None, "white", 0)
                for icon, mask in zip(icons(scene), icon_cover(scene), strict=True):
                    x, y, side = WINDOWS[icon.window]
                    rows, columns = np.nonzero(mask > 0.5)
                    extent = max(np.ptp(rows), np.ptp(columns)) + 1
                    assert 0.5 < extent / ICON_PIXELS[side][SIZES.index(size)] <= 1, noun
                    outside = mask.copy()
                    outside[8 * y + 1 : 8 * (y + side) - 1, 8 * x + 1 : 8 * (x + side) - 1] = 0
                    assert outside.sum() == 0  # so that jitter cuts nothing off


def test_nouns_differ_even_when_small():
    nouns = NOUNS[:DEFAULT_NOUNS]
    masks = np.stack([icon_cover(Scene((Group(n, "red", "small", 4),), None, "white", 0))[0] for n in nouns])
    flat = masks.reshape(len(nouns), -1)
    gaps = np.square(flat[:, None] - flat).sum(-1) + 1e9 * np.eye(len(nouns))
    assert gaps.min() > 10  # squared, in pixels; bottle and carrot are the closest


@pytest.mark.long
def test_all_nouns_differ_even_when_small():
    small = icon_masks(len(NOUNS))[:, 0, 0].reshape(len(NOUNS), -1) / 255.0
    squares = np.square(small).sum(1)
    gaps = squares[:, None] + squares - 2 * small @ small.T + 1e9 * np.eye(len(NOUNS))
    assert gaps.min() > 7  # squared, in pixels; nail and screw are the closest
    assert np.array_equal(icon_masks(), icon_masks(len(NOUNS))[:DEFAULT_NOUNS])


def test_icons_of_the_first_nouns_are_drawn_as_ever():
    """The fingerprint was taken when there were no other nouns."""
    assert hashlib.sha256(icon_masks().tobytes()).hexdigest()[:16] == "882ff627653a2c5b"


def test_any_noun_is_rendered_without_those_before_it():
    last = complete(Scene((Group(NOUNS[-1]), Group(NOUNS[3]))), 5)
    made = draw_variation(1, 2, 9)
    alone = render_scenes([last], 2, 9)
    for r in range(2):
        drawn = drawn_plainly(last, made["shade"][0, r].numpy(), made["jitter"][0, r].numpy())
        assert np.array_equal(alone[0, r], drawn)


def test_the_same_seed_gives_the_same_pixels_whatever_else_is_drawn():
    chosen = scenes(16)
    images = render_scenes(chosen, 3, seed=7)
    assert np.array_equal(images, render_scenes(chosen, 3, seed=7))
    assert not np.array_equal(images, render_scenes(chosen, 3, seed=8))


def test_renders_of_a_scene_differ_in_place_and_shade():
    scene = complete(Scene((Group("star"),)), 3)
    renders = render_scenes([scene], 30, seed=0)[0]
    assert len({r.tobytes() for r in renders}) > 25


def test_every_colour_is_told_from_every_other():
    colours = np.array([PALETTE[c] for c in COLOURS], float)
    gaps = np.linalg.norm(colours[:, None] - colours, axis=-1) + 1e9 * np.eye(len(colours))
    assert gaps.min() > 60  # levels; shades move by at most 14 each


def drawn_plainly(scene: Scene, shade: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    """One render, icon after icon."""
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), int) + np.clip(PALETTE[scene.background] + shade[0], 0, 255)
    for k, icon in enumerate(icons(scene)):
        x, y, side = (8 * cells for cells in WINDOWS[icon.window])
        mask = icon_mask(NOUN_NUMBER[icon.noun])[side // 64, SIZES.index(icon.size)].astype(int)
        left, top = (len(mask) - side) // 2 - jitter[k]
        cover = mask[top : top + side, left : left + side, None]
        paint = np.clip(PALETTE[icon.colour] + shade[1 + k], 0, 255)
        under = image[y : y + side, x : x + side]
        under[:] = (under * (255 - cover) + paint * cover + 127) // 255
    return image


@pytest.mark.long
def test_renders_are_those_of_plain_pasting():
    chosen = scenes(100)
    variation = draw_variation(100, 3, 7)
    found = SceneRenderer().render(torch.from_numpy(scene_tokens(chosen)), **variation)
    shade, jitter = variation["shade"].numpy(), variation["jitter"].numpy()
    for s, scene in enumerate(chosen):
        for r in range(3):
            assert np.array_equal(
                found[s, r].permute(1, 2, 0), drawn_plainly(scene, shade[s, r], jitter[s, r])
            )
    assert np.array_equal(found.permute(0, 1, 3, 4, 2), render_scenes(chosen, 3, 7))
