"""The verifier: its shipped weights read true renders, and do not see what is not there."""

import numpy as np
import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.judging.quality import judge
from millijoule.workers.judging.verifier import Verifier
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import FAMILIES, complete, icons, sample_scene

VERIFIER = Verifier.load()


@pytest.fixture(scope="module")
def renders():
    """Held-out scenes of all families and fresh renders of them, from seeds that training never used."""
    rng = np.random.default_rng(2**33)
    scenes = [sample_scene(FAMILIES[i % 6], rng, held_out=True) for i in range(600)]
    whole = [complete(scene, int(rng.integers(2**63))) for scene in scenes]
    return scenes, whole, render_scenes(whole, 1, 2**40)[:, 0]


@pytest.mark.long
def test_it_reads_whole_scenes(renders):
    scenes, whole, images = renders
    right = {name: [] for name in ("scene", "noun", "colour", "count", "background")}
    for k, (scene, read) in enumerate(zip(whole, VERIFIER.read(images), strict=True)):
        expected = sorted((i.noun, i.colour) for i in icons(scene))
        found = sorted((i.noun, i.colour) for i in read.icons)
        right["noun"].append([n for n, _ in expected] == [n for n, _ in found])
        right["colour"].append([c for _, c in expected] == [c for _, c in found])
        right["count"].append(len(expected) == len(found))
        right["background"].append(scene.background == read.background)
        right["scene"].append(judge(scenes[k], FAMILIES[k % 6], read).strict)
    for name, values in right.items():
        assert np.mean(values) >= 0.97, name


def test_it_finds_nothing_in_noise_and_blur(renders):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (50, 64, 64, 3), dtype=np.uint8)
    flat = np.broadcast_to(rng.integers(0, 256, (50, 1, 1, 3), dtype=np.uint8), noise.shape).copy()
    pixels = torch.from_numpy(renders[2][:50]).permute(0, 3, 1, 2).float()
    small = torch.nn.functional.avg_pool2d(pixels, 16)
    blurred = torch.nn.functional.interpolate(small, size=64, mode="bilinear")
    blurred = blurred.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()
    for images in (noise, flat, blurred):
        found = [len(reading.icons) for reading in VERIFIER.read(images)]
        assert np.mean(found) < 0.1


def test_features_depend_on_place_and_content_and_on_nothing_else(renders):
    images = renders[2][:40]
    features = VERIFIER.features(images)
    assert features.shape[0] == 40
    assert np.array_equal(features, VERIFIER.features(images))
    for other in (images[:, ::-1], 255 - images):
        assert np.abs(VERIFIER.features(np.ascontiguousarray(other)) - features).max() > 0.1


def test_wrong_images_and_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="uint8"):
        VERIFIER.read(np.zeros((1, 32, 32, 3), np.uint8))
    (tmp_path / "v.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"v\.safetensors"):
        Verifier.load(tmp_path / "v.safetensors")
