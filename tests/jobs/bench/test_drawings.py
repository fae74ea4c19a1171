"""`millijoule bench drawings`: forms differ in what settles a drawing; runs are scored and shown."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from millijoule.jobs.bench import drawings, main
from millijoule.workers.errors import InputError


def test_forms_differ_in_coupling_noise_and_decoder_alone():
    options = drawings.BenchOptions()
    coupled, *others = (drawings.training_config(form, 3, options) for form in drawings.FORMS)
    assert coupled.seed == 3
    for other in others:
        model = replace(other.model, coupling=coupled.model.coupling)
        assert replace(other, noise=coupled.noise, decoder=coupled.decoder, model=model) == coupled


@pytest.mark.long
def test_runs_are_scored_and_shown(tmp_path):
    arguments = ["--steps", "2", "--runs", "1", "--samples", "13", "--output", str(tmp_path / "runs")]
    forms = ["--forms", "coupled", "uncoupled"]
    assert main(["drawings", str(tmp_path / "result.json"), *arguments, *forms]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    coupled, uncoupled = result["runs"]
    assert coupled["form"] == "coupled"
    assert set(coupled["coupling_removed"]) == {"one_drawing", "overlap", "evenness"}
    assert "coupling_removed" not in uncoupled
    for row in (coupled, uncoupled):
        assert 0 <= row["one_drawing"] <= 1
        assert 0 < row["overlap"] < 1  # of nothing but grey
        assert result["summary"][row["form"]]["overlap"] == [pytest.approx(row["overlap"], abs=1e-5)]
    with Image.open(tmp_path / "runs" / "coupled-0" / "sheet.png") as sheet:
        assert sheet.size == ((4 + 12) * 32, 13 * 32)
        assert sheet.convert("L").crop((0, 0, 128, 32)).getextrema() == (0, 255)


def test_a_form_twice_is_refused():
    with pytest.raises(InputError, match="each once"):
        drawings.run(drawings.BenchOptions(forms=("coupled", "coupled")))
