"""JPEG and WebP: pixels nearly the same, provenance exactly the same, and read back whatever the prompt is."""

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from millijoule.workers.errors import InputError, RowError
from millijoule.workers.images.encode import encode_image
from millijoule.workers.images.formats import ImageFormat, read_image_format
from millijoule.workers.images.readers import read_provenance
from millijoule.workers.schemas import ImageRequest

MODEL = {"steps": 16, "model_name": "icon-scenes-32", "model_sha256": "0123456789abcdef" * 4}
FORMATS = [ImageFormat(), ImageFormat("jpeg", 95), ImageFormat("webp", 90)]
LOSSY = FORMATS[1:]


def by_name(image_format):
    return image_format.name


def smooth(height=64, width=48):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 255 // width], axis=2).astype(np.uint8)


def request(prompt="two red cats", **fields):
    return ImageRequest(prompt_id="p1", image_index=0, prompt=prompt, seed=7, **fields)


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("image_format", LOSSY, ids=by_name)
def test_the_pixels_are_nearly_the_same(image_format):
    image = smooth()
    encoded = encode_image(image_format, image, request(), **MODEL)
    assert Image.open(io.BytesIO(encoded)).format == image_format.name.upper()
    assert pixels(encoded).shape == image.shape
    assert np.abs(pixels(encoded).astype(int) - image).mean() < 2


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_less_quality_makes_smaller_files(name):
    noisy = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sizes = [len(encode_image(ImageFormat(name, q), noisy, request(), **MODEL)) for q in (10, 50, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("image_format", FORMATS, ids=by_name)
def test_the_same_image_and_request_give_the_same_bytes(image_format):
    image = smooth()
    first, second = (
        encode_image(image_format, view, request(), **MODEL) for view in (image, image[::-1][::-1])
    )
    assert first == second


@pytest.mark.parametrize("image_format", FORMATS, ids=by_name)
def test_every_format_says_the_same_of_itself(image_format):
    asked = request("ein rotes Fahrrad 🚲", negative_prompt="blurry", guidance_scale=7.5)
    parameters, record = read_provenance(encode_image(image_format, smooth(), asked, **MODEL))
    assert parameters == (
        "ein rotes Fahrrad 🚲\nNegative prompt: blurry\n"
        "Steps: 16, CFG scale: 7.5, Seed: 7, Size: 48x64, Model: icon-scenes-32, Model hash: 0123456789"
    )
    assert (record["prompt"], record["negative_prompt"]) == ("ein rotes Fahrrad 🚲", "blurry")
    assert (record["seed"], record["width"], record["height"], record["num_inference_steps"]) == (
        7,
        48,
        64,
        16,
    )
    assert record["model_sha256"] == MODEL["model_sha256"]


@pytest.mark.parametrize("image_format", LOSSY, ids=by_name)
def test_other_programs_find_the_parameters_where_a1111_puts_them(image_format):
    """EXIF UserComment, "UNICODE" and UTF-16 with the high byte first, as piexif writes and reads it."""
    encoded = encode_image(image_format, smooth(), request("赤い自転車"), **MODEL)
    exif = Image.open(io.BytesIO(encoded)).getexif()
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\x00"
    assert comment[8:].decode("utf-16-be").startswith("赤い自転車\nSteps: 16")
    assert json.loads(exif[0x010E])["prompt"] == "赤い自転車"


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(exclude_categories=()), max_size=60),
    st.integers(0, 2**64 - 1),
    st.sampled_from(LOSSY),
)
def test_any_text_gives_a_readable_image_and_an_exact_record(prompt, seed, image_format):
    asked = ImageRequest("\x00" + prompt, 3, prompt, seed, negative_prompt=prompt)
    _, record = read_provenance(encode_image(image_format, smooth(2, 2), asked, **MODEL))
    assert (record["prompt_id"], record["image_index"], record["seed"]) == ("\x00" + prompt, 3, seed)
    assert (record["prompt"], record["negative_prompt"]) == (prompt, prompt)


@pytest.mark.parametrize(
    "prompt", ["x" * 40_000, "🚲" * 40_000, "é" * 11_000], ids=["long", "huge", "between"]
)
@pytest.mark.parametrize("image_format", FORMATS, ids=by_name)
def test_a_record_longer_than_a_segment_of_jpeg_stays_whole(image_format, prompt):
    encoded = encode_image(image_format, smooth(), request(prompt, negative_prompt="y" + prompt), **MODEL)
    parameters, record = read_provenance(encoded)
    assert (record["prompt"], record["negative_prompt"]) == (prompt, "y" + prompt)
    assert parameters[:10_000] == f"{prompt}\nNegative prompt: y{prompt}\nSteps"[:10_000]
    assert pixels(encoded).shape == (64, 48, 3)


def test_what_is_no_image_of_a_job_has_no_record():
    plain = io.BytesIO()
    Image.fromarray(smooth()).save(plain, "JPEG")
    for data in (b"", b"junk", plain.getvalue()):
        with pytest.raises(InputError, match="not an image of a job"):
            read_provenance(data)


def test_an_image_too_wide_for_the_format_is_its_rows_fault():
    wide = np.zeros((1, 16_384, 3), np.uint8)
    with pytest.raises(RowError, match="16384x1: webp has at most 16383 pixels a side; --image-format png"):
        encode_image(ImageFormat("webp", 90), wide, request(), **MODEL)
    assert pixels(encode_image(ImageFormat("jpeg", 95), wide, request(), **MODEL)).shape == wide.shape


def test_options_are_read_into_a_format():
    assert read_image_format("png", None) == ImageFormat()
    assert read_image_format("jpeg", None) == ImageFormat("jpeg", 95)
    assert read_image_format("webp", None) == ImageFormat("webp", 90)
    assert read_image_format("webp", 1).quality == 1
    assert [f.suffix for f in FORMATS] == ["png", "jpg", "webp"]


@pytest.mark.parametrize(("name", "quality"), [("png", 90), ("jpeg", 0), ("webp", 101)])
def test_a_quality_that_means_nothing_is_refused(name, quality):
    with pytest.raises(InputError, match=f"--quality {quality}: "):
        read_image_format(name, quality)
