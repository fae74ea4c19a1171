"""JPEG files are those that Pillow writes over libjpeg-turbo, byte for byte, whatever the image, the quality and the form."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features
from support.pixels import images_of

from millijoule.kernels import jpeg as module
from millijoule.kernels.jpeg import encode_jpegs, encode_jpegs_reference
from millijoule.kernels.native_library import forms_here, only

HERE = forms_here()
compiled = pytest.mark.skipif(not HERE, reason="no compiler was there when the package was installed")
turbo = pytest.mark.skipif(not features.check("libjpeg_turbo"), reason="this Pillow has another libjpeg")


def by_pillow(image, quality, halved, **more):
    buffer = io.BytesIO()
    subsampling = "4:2:0" if halved else "4:4:4"
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=subsampling, **more)
    return buffer.getvalue()


@compiled
@turbo
@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 50), st.integers(1, 50), st.integers(1, 100), st.booleans(), st.integers(0, 2**32 - 1)),
    st.sampled_from(HERE or ("none",)),
)
def test_the_files_are_pillows(height, width, quality, halved, seed, form):
    images = images_of(height, width, seed)
    with only(form):
        files = encode_jpegs(images, [b""] * len(images), quality, halved=halved)
    assert files == [by_pillow(image, quality, halved) for image in images]


@compiled
@turbo
@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("quality", [1, 50, 95, 100])
def test_extreme_blocks_survive(quality, halved):
    """The largest steps between means, and the basis patterns themselves at full contrast."""
    y, x = np.mgrid[:8, :8]
    images = [np.kron(np.indices((4, 6)).sum(0) % 2, np.ones((8, 8)))[..., None].repeat(3, 2) * 255]
    for u, v in [(0, 1), (1, 0), (7, 7), (4, 4), (3, 6), (7, 1)]:
        wave = np.cos((2 * x + 1) * u * np.pi / 16) * np.cos((2 * y + 1) * v * np.pi / 16)
        tile = np.where(wave >= 0, 255, 0)
        images.append(np.tile(tile, (3, 3))[..., None].repeat(3, 2))
    images = [image.astype(np.uint8) for image in images]
    for form in HERE:
        with only(form):
            files = encode_jpegs(images, [b""] * len(images), quality, halved=halved)
        assert files == [by_pillow(image, quality, halved) for image in images]


@compiled
@turbo
def test_segments_stand_where_pillow_puts_exif_and_images_of_all_sizes_go_in_one_call():
    sizes = [(1, 1), (8, 8), (17, 33), (64, 64), (9, 120)]
    images = [images_of(*size, seed=i)[i % 5] for i, size in enumerate(sizes)]
    exifs = [b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08" + bytes(10 + i) for i in range(len(images))]
    segments = [b"\xff\xe1" + (2 + len(exif)).to_bytes(2, "big") + exif for exif in exifs]
    files = encode_jpegs(images, segments, 90, halved=True)
    assert files == [by_pillow(i, 90, True, exif=e) for i, e in zip(images, exifs, strict=True)]
    assert files == encode_jpegs_reference(images, segments, 90, halved=True)
    views = [np.flipud(np.flipud(images[3])), np.asfortranarray(images[3])]
    assert encode_jpegs(views, [segments[3]] * 2, 90, halved=True) == [files[3]] * 2


@compiled
def test_very_large_images_are_left_to_pillow(monkeypatch):
    image = images_of(20, 20, 0)[3]
    ours = encode_jpegs([image, image[:8]], [b"", b""], 80, halved=False)
    monkeypatch.setattr(module, "MAX_COMPILED_BYTES", image.nbytes - 1)
    monkeypatch.setattr(module, "encode_jpegs_reference", lambda images, *_, **__: [b"pillow"] * len(images))
    assert encode_jpegs([image, image[:8]], [b"", b""], 80, halved=False) == [b"pillow", ours[1]]


def test_without_compiled_code_pillow_encodes():
    image = images_of(20, 20, 0)[3]
    with only("reference"):
        assert encode_jpegs([image], [b""], 80, halved=True) == [by_pillow(image, 80, True)]


@pytest.mark.parametrize("form", ["reference", *HERE[-1:]])
@pytest.mark.parametrize(
    ("image", "segments", "quality", "words"),
    [
        (np.zeros((4, 4, 3), np.int64), [b""], 90, "uint8"),
        (np.zeros((4, 4), np.uint8), [b""], 90, "height, width, 3"),
        (np.zeros((0, 4, 3), np.uint8), [b""], 90, "with pixels"),
        (np.zeros((1, 65_501, 3), np.uint8), [b""], 90, "65500 pixels a side"),
        (np.zeros((4, 4, 3), np.uint8), [], 90, "one for each"),
        (np.zeros((4, 4, 3), np.uint8), [b""], 0, "from 1 to 100"),
    ],
)
def test_what_cannot_be_encoded_is_refused(image, segments, quality, words, form):
    with only(form), pytest.raises(ValueError, match=words):
        encode_jpegs([image], segments, quality, halved=False)


def test_no_images_are_no_files():
    assert encode_jpegs([], [], 90, halved=False) == []
