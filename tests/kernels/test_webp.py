"""WebP files are those that Pillow writes, byte for byte: the same libwebp makes both."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.pixels import images_of

from millijoule.kernels import webp as module
from millijoule.kernels.native_library import forms_here, only
from millijoule.kernels.webp import encode_webps

compiled = pytest.mark.skipif(not forms_here(), reason="no compiler was there when the package was installed")
HEAD = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08"


def by_pillow(image, exif, quality, method):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", quality=quality, method=method, exif=exif)
    return buffer.getvalue()


@pytest.fixture
def no_pillow(monkeypatch):
    def fail(*arguments):
        raise AssertionError("Pillow was asked")

    if module._libwebp() is None:
        pytest.skip("this Pillow's libwebp cannot be called")
    monkeypatch.setattr(module, "encode_webps_reference", fail)


@compiled
@pytest.mark.usefixtures("no_pillow")
def test_images_of_all_sizes_in_one_call_are_pillows_files():
    images = [
        image for i, size in enumerate([(1, 1), (16, 16), (17, 33), (40, 9)]) for image in images_of(*size, i)
    ]
    exifs = [HEAD + bytes(i) for i in range(len(images))]
    for quality, method in ((1, 2), (90, 2), (100, 0), (75, 4)):
        files = encode_webps(images, exifs, quality, method)
        assert files == [by_pillow(i, e, quality, method) for i, e in zip(images, exifs, strict=True)]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100), st.binary(max_size=40))
def test_every_form_gives_the_same_bytes(height, width, quality, rest):
    images = images_of(height, width, quality)
    exifs = [HEAD + rest] * len(images)
    with only("reference"):
        expected = encode_webps(images, exifs, quality, 2)
    assert encode_webps(images, exifs, quality, 2) == expected


@compiled
def test_a_libwebp_that_refuses_leaves_it_to_pillow(monkeypatch):
    library = module.native_library()

    class Refusing:
        millijoule_free_webps = library.millijoule_free_webps

        @staticmethod
        def millijoule_encode_webps(*arguments):
            return -2

    image = images_of(8, 8, 0)[3]
    monkeypatch.setattr(module, "native_library", lambda: Refusing)
    monkeypatch.setattr(module, "_declare", lambda library: None)
    assert encode_webps([image], [HEAD], 90, 2) == [by_pillow(image, HEAD, 90, 2)]


@compiled
@pytest.mark.usefixtures("no_pillow")
def test_memory_that_ends_is_no_images_fault(monkeypatch):
    monkeypatch.setattr(module, "native_library", lambda: NoMemory)
    monkeypatch.setattr(module, "_declare", lambda library: None)
    with pytest.raises(MemoryError):
        encode_webps([images_of(8, 8, 0)[3]], [HEAD], 90, 2)


class NoMemory:
    @staticmethod
    def millijoule_encode_webps(*arguments):
        return -1


@pytest.mark.parametrize(
    ("image", "exifs", "words"),
    [
        (np.zeros((4, 4, 3), np.float32), [HEAD], "uint8"),
        (np.zeros((4, 4, 4), np.uint8), [HEAD], "height, width, 3"),
        (np.zeros((16_384, 1, 3), np.uint8), [HEAD], "16383 pixels a side"),
        (np.zeros((4, 4, 3), np.uint8), [], "one for each"),
    ],
)
def test_what_cannot_be_encoded_is_refused(image, exifs, words):
    with pytest.raises(ValueError, match=words):
        encode_webps([image], exifs, 90, 2)
