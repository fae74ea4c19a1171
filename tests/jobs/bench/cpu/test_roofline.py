"""`millijoule bench roofline`: floors follow from the peaks of the run, and the picture shows every form."""

import io
import json

import pytest
from PIL import Image

from millijoule.jobs.bench import main
from millijoule.jobs.bench.cpu.roofline import Case, measure
from millijoule.kernels.native_library import forms_here


def test_floors_are_of_the_peaks_of_the_run(tmp_path):
    result, picture = tmp_path / "roofline.json", tmp_path / "roofline.png"
    words = ["--images", "3", "--rounds", "1", "--oscillators", "128", "--picture", str(picture)]
    assert main(["roofline", str(result), *words]) == 0
    found = json.loads(result.read_text())
    peak = max(value for name, value in found["peaks"].items() if name != "copy")
    assert {"float32", "int8", "copy"} <= set(found["peaks"])
    kernels = {case["kernel"] for case in found["cases"]}
    assert kernels == {"image", "dense coupling", "png"}
    for case in found["cases"]:
        floor = max(case["operations"] / peak, case["bytes_moved"] / found["peaks"]["copy"])
        assert case["floor_s"] == pytest.approx(floor)
        for form in case["forms"].values():
            assert form["share_of_floor"] == pytest.approx(floor / form["cpu_s"])
    image = next(case for case in found["cases"] if case["kernel"] == "image")
    assert set(image["forms"]) == {"pytorch", *forms_here()}
    png = found["cases"][-1]
    assert set(png["forms"]) == {"zlib", *forms_here()}
    files = int(png["shape"].split()[-4])
    assert 0 < files < 3 * 64 * 64 * 3
    assert png["operations"] == png["bytes_moved"] == 3 * 64 * 64 * 3 + files
    assert png["floor_s"] == pytest.approx(
        png["bytes_moved"] / found["peaks"]["copy"]
    )  # nothing is multiplied
    with Image.open(io.BytesIO(picture.read_bytes())) as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 10


def test_copying_binds_where_little_is_computed():
    case = Case("k", "s", operations=10, bytes_moved=1000, forms={"f": lambda: None})
    assert measure(case, {"int8": 1e9, "float32": 1e8, "copy": 1e6}, 1)["floor_s"] == pytest.approx(1e-3)
    assert measure(case, {"int8": 1e3, "float32": 1e2, "copy": 1e6}, 1)["floor_s"] == pytest.approx(1e-2)


def test_nothing_to_measure_is_refused(capsys):
    assert main(["roofline", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
