"""What images say of themselves is, to the byte, what `json` and Pillow's EXIF writer make of it."""

import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from millijoule.workers.images.encode import Drawn, encode_images
from millijoule.workers.images.exif import exif_of
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.images.provenance import ModelProvenance, Provenance
from millijoule.workers.images.readers import read_provenance
from millijoule.workers.schemas import ImageRequest

IMAGE = np.zeros((3, 5, 3), np.uint8)
SHA256 = "0123456789abcdef" * 4
any_text = st.text(st.characters(exclude_categories=()), max_size=40)
HOSTILE = [
    "\x00",
    "\ud800",
    "🚲\udc00",
    '"\\\n\r\t\x7f\x80',
    "é\u2028</script>",
    "x" * 1_000_000,
    "赤" * 350_000,
]


def as_json(request: ImageRequest, model: str, steps: int) -> str:
    record = {
        "schema_version": 1, "prompt_id": request.prompt_id, "image_index": request.image_index, "seed": request.seed,
        "prompt": request.prompt, "negative_prompt": request.negative_prompt, "width": 5, "height": 3,
        "num_inference_steps": steps, "guidance_scale": request.guidance_scale, "model": model, "model_sha256": SHA256,
    }  # fmt: skip
    return json.dumps(record, separators=(",", ":"))


@settings(max_examples=200, deadline=None)
@given(
    texts=st.tuples(any_text, any_text, st.none() | any_text, any_text),
    seed=st.integers(0, 2**64 - 1),
    scale=st.none() | st.floats() | st.integers(0, 30),
    steps=st.integers(1, 1000),
)
@example(texts=("", "", None, ""), seed=0, scale=-0.0, steps=1)
def test_the_record_is_what_json_writes(texts, seed, scale, steps):
    prompt_id, prompt, negative, model = texts
    request = ImageRequest(prompt_id, 3, prompt, seed, negative_prompt=negative, guidance_scale=scale)
    assert ModelProvenance(model, SHA256).of(IMAGE, request, steps).record == as_json(request, model, steps)


@pytest.mark.parametrize("prompt", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_prompts_stay_exact_in_every_format(prompt):
    request = ImageRequest(prompt, 0, prompt, 1, negative_prompt=prompt)
    model = ModelProvenance("m", SHA256)
    wanted = as_json(request, "m", 9)
    for image_format in (ImageFormat(), ImageFormat("webp", 90)):
        (encoded,) = encode_images(image_format, [Drawn(IMAGE, request, 9)], model)
        assert wanted.encode("ascii") in encoded
    (jpeg,) = encode_images(ImageFormat("jpeg", 90), [Drawn(IMAGE, request, 9)], model)
    assert read_provenance(jpeg)[1] == json.loads(wanted)
    (png,) = encode_images(ImageFormat(), [Drawn(IMAGE, request, 9)], model)
    shown = (
        f"{prompt}\nNegative prompt: {prompt}\nSteps: 9, Seed: 1, Size: 5x3, Model: m, Model hash: 0123456789"
    )
    shown = shown.replace("\x00", "")
    try:
        chunk = b"tEXtparameters\x00" + shown.encode("latin-1")
    except UnicodeEncodeError:
        chunk = b"iTXtparameters\x00\x00\x00\x00\x00" + shown.encode("utf-8", "replace")
    assert (len(chunk) - 4).to_bytes(4, "big") + chunk in png


def by_pillow(provenance: Provenance, with_record: bool, most: int | None) -> bytes:
    exif = Image.Exif()
    comment = provenance.parameters.replace("\x00", "").encode("utf-16-be", "replace")[:most]
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\x00" + comment
    if with_record:
        exif[0x010E] = provenance.record
    return exif.tobytes()


@settings(max_examples=100, deadline=None)
@given(
    parameters=any_text,
    record=st.text("abc", min_size=4, max_size=30),
    with_record=st.booleans(),
    most=st.none() | st.integers(0, 20),
)
def test_exif_is_what_pillow_writes(parameters, record, with_record, most):
    provenance = Provenance(parameters, record)
    most = most and 2 * most
    found = exif_of(provenance, with_record=with_record, most_comment_bytes=most)
    assert found == by_pillow(provenance, with_record, most)


def test_jpeg_and_webp_read_it_back():
    request = ImageRequest("p", 0, "赤い自転車", 1)
    for image_format in (ImageFormat("jpeg", 90), ImageFormat("webp", 90)):
        (encoded,) = encode_images(image_format, [Drawn(IMAGE, request, 9)], ModelProvenance("m", SHA256))
        assert Image.open(io.BytesIO(encoded)).getexif()[0x010E] == as_json(request, "m", 9)
