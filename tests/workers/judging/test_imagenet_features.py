"""Features of ImageNet's network: as another implementation makes them, and they see what is wrong with a set of images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from millijoule.workers.errors import InputError
from millijoule.workers.judging.imagenet_features import WEIGHTS, ImageNetFeatures
from millijoule.workers.judging.quality import frechet_distance, precision_recall
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene

NETWORK = ImageNetFeatures.load()
#: Made by `infra/features/expected_features.py` from the code in which the weights were published.
EXPECTED = np.load(Path(__file__).with_name("efficientnet-lite0.npz"), allow_pickle=False)
SCENES = 48


def test_features_are_those_of_the_published_code():
    found = NETWORK.features(EXPECTED["images"])
    assert found.shape == (8, 1280)
    assert np.abs(found - EXPECTED["packaged"]).max() < 1e-4
    assert EXPECTED["packaged"].std() > 0.1


def test_rounded_weights_change_the_published_features_little():
    found, published = NETWORK.features(EXPECTED["images"]), EXPECTED["published"]
    cosines = (found * published).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(published, axis=1)
    assert cosines.min() > 0.995
    assert np.linalg.norm(found - published) < 0.1 * np.linalg.norm(published - published.mean(0))


def test_an_image_has_the_same_features_in_any_company():
    images = EXPECTED["images"]
    assert np.array_equal(NETWORK.features(images)[3:5], NETWORK.features(images[3:5]))
    assert NETWORK.features(images[:0]).shape == (0, 1280)


def test_wrong_images_and_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="64, 64"):
        NETWORK.features(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="no such file"):
        ImageNetFeatures.load(tmp_path / "missing.safetensors")
    other = tmp_path / "other.safetensors"
    save_file(load_file(WEIGHTS), other, {"format": "something", "version": "1"})
    with pytest.raises(InputError, match=r"other\.safetensors"):
        ImageNetFeatures.load(other)
    tensors = load_file(WEIGHTS)
    del tensors["blocks.9.project.weight"]
    save_file(tensors, other, {"format": "millijoule-features", "version": "1"})
    with pytest.raises(InputError, match=r"other\.safetensors"):
        ImageNetFeatures.load(other)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(2**33 + 1)
    return [
        complete(sample_scene(FAMILIES[i % 6], rng, held_out=True), int(rng.integers(2**63)))
        for i in range(SCENES)
    ]


@pytest.fixture(scope="module")
def true(scenes):
    return NETWORK.features(draw(scenes, seed=1))


@pytest.fixture(scope="module")
def right(scenes):
    """Images that are as they should be: other renders of the same scenes."""
    return draw(scenes, seed=2)


@pytest.fixture(scope="module")
def right_features(right):
    return NETWORK.features(right)


@pytest.fixture(scope="module")
def nearest(right_features, true):
    """The distance of two sets of true renders."""
    return frechet_distance(right_features, true)


def draw(scenes, seed):
    return render_scenes(scenes, 1, 2**41 + seed)[:, 0]


def with_groups(scene, **changes):
    return replace(scene, groups=tuple(replace(group, **changes) for group in scene.groups))


def blurred(images, radius):
    return np.stack([Image.fromarray(i).filter(ImageFilter.GaussianBlur(radius)) for i in images])


def distances_by_share(wrong, right_features, true):
    """Distances from the true images where a quarter, a half and all of the right ones are replaced by `wrong` ones."""
    wrong_features = NETWORK.features(wrong)
    counts = (SCENES // 4, SCENES // 2, SCENES)
    return [frechet_distance(np.r_[wrong_features[:n], right_features[n:]], true) for n in counts]


@pytest.mark.long
def test_true_renders_are_near_each_other(right, right_features, nearest, true):
    assert nearest < 0.15 * np.trace(np.cov(true, rowvar=False))
    assert nearest < 0.3 * frechet_distance(NETWORK.features(255 - right), true)
    assert precision_recall(right_features, true)[1] > 0.9


@pytest.mark.long
def test_the_distance_grows_with_blur(right, nearest, true):
    found = [frechet_distance(NETWORK.features(blurred(right, radius)), true) for radius in (0.5, 1, 2)]
    assert 1.5 * nearest < found[0] < found[1] < found[2]


@pytest.mark.long
@pytest.mark.parametrize("changes", [{"colour": "red"}, {"noun": "cat"}], ids=["colours", "nouns"])
def test_the_distance_grows_with_wrong(changes, scenes, right_features, nearest, true):
    wrong = draw([with_groups(scene, **changes) for scene in scenes], seed=2)
    found = distances_by_share(wrong, right_features, true)
    assert nearest < found[0] < found[1] < found[2]
    assert found[2] > 2 * nearest
