"""`millijoule bench image`: every form drew the same pixels, those of the generator; figures are of the blocks."""

import hashlib
import json
import statistics

import pytest
import torch

from millijoule.jobs.bench import main
from millijoule.jobs.bench.gpu import scene_requests
from millijoule.kernels.native_library import forms_here
from millijoule.workers.generators.registry import load_generator

FORMS = ["pytorch-float32", "pytorch-int8", *forms_here()]


def test_forms_draw_the_same_and_are_timed(tmp_path):
    path = tmp_path / "result.json"
    assert main(["image", str(path), "--images", "6", "--rounds", "2", "--models", "default"]) == 0
    found = json.loads(path.read_text())["models"]["default"]
    assert [b["form"] for b in found["blocks"]] == [*FORMS, *reversed(FORMS)] * 2
    pixels = load_generator("default").generate(scene_requests(6)).images.tobytes()
    assert {b["pixels_sha256"] for b in found["blocks"]} == {hashlib.sha256(pixels).hexdigest()}
    assert set(found["cpu_ms_per_image"]) == set(FORMS)
    medians = {}
    for form, (median, least, most) in found["cpu_ms_per_image"].items():
        used = [1000 * b["cpu_s"] / 6 for b in found["blocks"] if b["form"] == form]
        medians[form] = statistics.median(used)
        assert median == pytest.approx(medians[form], abs=1e-3)
        assert (least, most) == (pytest.approx(min(used), abs=1e-3), pytest.approx(max(used), abs=1e-3))
    for form, times in found["times_faster"].items():
        assert times == pytest.approx(medians["pytorch-float32"] / medians[form], abs=0.01)


def test_a_form_that_is_not_exact_is_named_and_not_timed(tmp_path, monkeypatch):
    exact = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: exact(a, b).clamp(-2000, 2000))
    path = tmp_path / "result.json"
    assert main(["image", str(path), "--images", "2", "--rounds", "1", "--models", "default"]) == 0
    found = json.loads(path.read_text())["models"]["default"]
    assert found["not_exact_here"] == ["pytorch-int8"]
    assert set(found["cpu_ms_per_image"]) == set(FORMS) - {"pytorch-int8"}


def test_nothing_to_measure_is_refused(capsys):
    assert main(["image", "--images", "0"]) == 2
    assert "--images" in capsys.readouterr().err
