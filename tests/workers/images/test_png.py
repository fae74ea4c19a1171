import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from millijoule.workers.images.encode import encode_image
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.schemas import ImageRequest

MODEL = {"model_name": "icon-scenes-32", "model_sha256": "0123456789abcdef" * 4}


def draw(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def request(prompt="two red cats", **fields):
    return ImageRequest(prompt_id="p1", image_index=0, prompt=prompt, seed=7, **fields)


def encode(image, req, **changes):
    return encode_image(ImageFormat(), image, req, **{"steps": 16, **MODEL, **changes})


def opened(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (32, 32), (33, 65)])
def test_the_pixels_survive(size):
    image = draw(*size)
    np.testing.assert_array_equal(np.asarray(opened(encode(image, request()))), image)


def test_a_view_that_is_not_contiguous_is_encoded_as_it_looks():
    image = draw(64, 64)[::2, ::-2]
    np.testing.assert_array_equal(np.asarray(opened(encode(image, request()))), image)


def test_the_same_image_and_request_give_the_same_bytes():
    assert encode(draw(), request()) == encode(draw(), request())


def test_parameters_read_as_a1111_writes_them():
    text = opened(encode(draw(), request(negative_prompt="blurry", guidance_scale=7.5))).text["parameters"]
    assert text == (
        "two red cats\nNegative prompt: blurry\n"
        "Steps: 16, CFG scale: 7.5, Seed: 7, Size: 32x32, Model: icon-scenes-32, Model hash: 0123456789"
    )


def test_a_model_name_with_commas_is_quoted():
    text = opened(encode(draw(), request(), model_name="a, b: c")).text["parameters"]
    assert 'Model: "a, b: c", Model hash' in text


def test_what_was_not_asked_for_is_not_claimed():
    text = opened(encode(draw(), request())).text["parameters"]
    assert "Negative" not in text
    assert "CFG" not in text


def test_a_prompt_outside_latin_1_is_written_as_itxt():
    png = encode(draw(), request("ein rotes Fahrrad é"))
    assert b"iTXt" not in png
    png = encode(draw(), request("赤い自転車 🚲"))
    assert b"iTXtparameters" in png
    assert opened(png).text["parameters"].startswith("赤い自転車 🚲\n")


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60), st.integers(0, 2**64 - 1))
def test_any_text_gives_a_valid_png_and_an_exact_record(prompt, seed):
    req = ImageRequest(
        prompt_id="\x00" + prompt, image_index=3, prompt=prompt, seed=seed, negative_prompt=prompt
    )
    image = opened(encode(draw(2, 2), req))
    record = json.loads(image.text["millijoule"])
    assert (record["prompt_id"], record["image_index"], record["seed"]) == ("\x00" + prompt, 3, seed)
    assert record["prompt"] == prompt
    assert record["model_sha256"] == MODEL["model_sha256"]
    assert record["schema_version"] == 1
    assert "\x00" not in image.text["parameters"]


@pytest.mark.parametrize(
    "bad", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3))]
)
def test_an_array_that_is_not_an_rgb_image_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="prompt 'p1', image 0: expected uint8"):
        encode(bad, request())
