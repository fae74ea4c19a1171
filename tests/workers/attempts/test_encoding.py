"""A part of a batch is encoded in one call, and every image gets its own outcome in its own place."""

import io

import numpy as np
import pytest
from PIL import Image

from millijoule.kernels import jpeg, png, webp
from millijoule.workers.attempts.encoding import DrawnImage, Encoders, parts_of
from millijoule.workers.errors import NodeError, RowError
from millijoule.workers.generators.protocol import GeneratorInfo
from millijoule.workers.images import encode
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.images.readers import read_provenance
from millijoule.workers.schemas import ImageRequest, ImageRow

INFO = GeneratorInfo(
    name="stand-in", sha256="ab" * 32, width=64, height=64, num_inference_steps=7, batch_size=8
)


def drawn(index: int, *size: int, steps: int | None = None) -> DrawnImage:
    request = ImageRequest(f"p{index}", index, f"prompt {index}", index)
    if not size:
        return DrawnImage((index, 0), ImageRow(request, "quarantined", error="no"))
    image = np.random.default_rng(index).integers(0, 256, (*size, 3), np.uint8)
    return DrawnImage((index, 0), ImageRow(request, "ok", num_inference_steps=steps), image)


@pytest.fixture
def encoders(request):
    encoders = Encoders(2, getattr(request, "param", ImageFormat()), INFO)
    yield encoders
    encoders.close()


def test_images_and_gaps_keep_their_places(encoders):
    part = [drawn(0, 5, 6), drawn(1), drawn(2, 64, 64, steps=3), drawn(3), drawn(4, 5, 6)]
    outcome = encoders.begin(part).result()
    assert [file is None for file in outcome] == [one.image is None for one in part]
    for one, file in zip(part, outcome, strict=True):
        if file is not None:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), one.image)
            _, record = read_provenance(file)
            assert (record["prompt_id"], record["model"]) == (one.row.request.prompt_id, "stand-in")
            assert record["num_inference_steps"] == (one.row.num_inference_steps or 7)


@pytest.mark.parametrize(
    "encoders",
    [ImageFormat(), ImageFormat("jpeg", 80), ImageFormat("webp", 80)],
    indirect=True,
    ids=["png", "jpeg", "webp"],
)
def test_a_part_is_one_call(encoders, monkeypatch):
    calls = []
    for module, name in ((png, "encode_pngs"), (jpeg, "encode_jpegs"), (webp, "encode_webps")):
        plain = getattr(module, name)

        def counted(images, *others, plain=plain, **more):
            calls.append(len(images))
            return plain(images, *others, **more)

        monkeypatch.setattr(f"millijoule.workers.images.{module.__name__.split('.')[-1]}.{name}", counted)
    parts = list(parts_of([drawn(i, 64, 64) for i in range(350)]))
    for part in parts:
        encoders.begin(part).result()
    assert calls == [len(part) for part in parts] == [342, 8]


@pytest.mark.parametrize("encoders", [ImageFormat("webp", 80)], indirect=True)
def test_an_image_that_the_format_does_not_hold_is_its_own_rows_fault(encoders):
    small, wide, none, last = encoders.begin(
        [drawn(0, 5, 6), drawn(1, 1, 16_384), drawn(2), drawn(3, 2, 2)]
    ).result()
    assert isinstance(small, bytes)
    assert isinstance(wide, RowError)
    assert none is None
    assert isinstance(last, bytes)


@pytest.mark.parametrize(
    "encoders",
    [ImageFormat(), ImageFormat("jpeg", 80), ImageFormat("webp", 80)],
    indirect=True,
    ids=["png", "jpeg", "webp"],
)
def test_no_memory_is_the_nodes_fault(encoders, monkeypatch):
    def fail(*arguments):
        raise MemoryError

    for encoder in (encode.png, encode.jpeg, encode.webp):
        monkeypatch.setattr(encoder, "encode_with_provenance", fail)
    with pytest.raises(NodeError, match="no memory to encode"):
        encoders.begin([drawn(0, 5, 6)]).result()


def test_a_part_without_images_is_encoded_into_none(encoders):
    assert encoders.begin([drawn(0), drawn(1)]).result() == [None, None]


def test_an_image_that_alone_cannot_be_encoded_is_its_row_s_fault(encoders, monkeypatch):
    plain = encode.png.encode_with_provenance

    def choosy(images, provenances):
        if any(image.shape[:2] == (7, 7) for image in images):
            raise AttributeError("seven")
        return plain(images, provenances)

    monkeypatch.setattr(encode.png, "encode_with_provenance", choosy)
    first, bad, last = encoders.begin([drawn(0, 5, 6), drawn(1, 7, 7), drawn(2, 8, 8)]).result()
    assert isinstance(bad, RowError)
    assert "seven" in str(bad)
    assert isinstance(first, bytes)
    assert isinstance(last, bytes)


def test_a_worker_that_encodes_nothing_blames_no_row(encoders, monkeypatch):
    def broken(images, provenances):
        raise AttributeError("undefined symbol: millijoule_encode_pngs")

    monkeypatch.setattr(encode.png, "encode_with_provenance", broken)
    with pytest.raises(NodeError, match="no image can be encoded here: AttributeError: undefined symbol"):
        encoders.begin([drawn(0, 5, 6), drawn(1, 7, 7)]).result()
