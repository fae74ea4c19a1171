"""`millijoule bench encode`: every encoder is measured on the same images, figures are of the blocks, wrong pixels stop it."""

import io
import json
import statistics
import zlib

import numpy as np
import pytest
from PIL import Image

from millijoule.jobs.bench import main
from millijoule.jobs.bench.cpu import encode
from millijoule.jobs.bench.gpu import scene_requests
from millijoule.workers.images.encode import Drawn, encode_image
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.images.readers import read_provenance


def images(count: int) -> list[Drawn]:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (9, 3), np.uint8)
    return [
        Drawn(palette[np.kron(rng.integers(0, 9, (6, 5)), np.ones((4, 4), int))], request, 10)
        for request in scene_requests(count)
    ]


def test_all_are_measured_on_icons_and_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_icons", images)
    path = tmp_path / "result.json"
    assert main(["encode", str(path), "--icons", "3", "--rounds", "2", "--photographs", "20"]) == 0
    result = json.loads(path.read_text())
    for kind, many in (("icons", 3), ("sheet of icons 512", 1), ("photographs 20", 86)):
        found = result["kinds"][kind]
        assert found["images"] == many
        assert {encode.BEFORE, "pillow", "pillow optimize", "reference", "jpeg", "webp"} <= set(
            found["forms"]
        )
        for form in found["forms"].values():
            us = form["blocks_us"]
            assert len(us) == 4
            assert form["us_per_image"] == pytest.approx([statistics.median(us), min(us), max(us)], abs=0.02)
    icons = result["kinds"]["icons"]["forms"]
    drawn = images(3)
    files = [
        encode_image(
            ImageFormat(),
            d.image,
            d.request,
            steps=10,
            model_name=encode.MODEL_NAME,
            model_sha256=encode.MODEL_SHA256,
        )
        for d in drawn
    ]
    assert icons[encode._best()]["bytes_per_image"] == pytest.approx(sum(map(len, files)) / 3, abs=0.1)
    tried = {(s["rows"], s["encoder"]): s["bytes_per_image"] for s in result["strategies"]}
    levels = {
        (rows, f"zlib {level}") for rows in ("rgb", "rgb, up", "palette") for level in ["rle", "1", "6", "9"]
    }
    assert set(tried) == levels | {("as it chooses", "kernels.png")}
    rows = [b"".join(b"\0" + line.tobytes() for line in d.image) for d in drawn]
    assert tried["rgb", "zlib 9"] == pytest.approx(sum(len(zlib.compress(r, 9)) for r in rows) / 3, abs=0.1)


def test_all_encoders_say_the_same_and_those_of_png_hold_the_same_pixels():
    (one,) = images(1)
    said = set()
    for name, encoder in encode.all_encoders().items():
        (file,) = encoder([one])
        parameters, record = read_provenance(file)
        said.add((parameters, json.dumps(record)))
        if not name.startswith(encode.LOSSY):
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), one.image)
    assert len(said) == 1


def test_an_encoder_that_loses_a_pixel_is_no_result():
    def lossy(drawn):
        changed = [Drawn(one.image ^ 1, one.request, one.steps) for one in drawn]
        return encode.all_encoders()["reference"](changed)

    with pytest.raises(RuntimeError, match="lossy: image 0 has other pixels"):
        encode.compare({"lossy": lossy}, images(2), 1)


def test_nothing_to_measure_is_refused(capsys):
    assert main(["encode", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
