"""`millijoule bench coupling`: scores with and without K, and events, of a model file; an uncoupled model is refused."""

import json

import pytest
from support.tiny_oscillators import painter_of, tiny_oscillators

from millijoule.jobs.bench import main
from millijoule.workers.oscillators.model_file import save_model


@pytest.mark.long
def test_a_coupled_model_is_judged_twice_and_its_events_are_counted(tmp_path):
    model, result = tmp_path / "model.safetensors", tmp_path / "result.json"
    save_model(painter_of(tiny_oscillators("trained")), model, "tiny")
    assert main(["coupling", str(result), "--model", str(model), "--prompts-per-family", "2"]) == 0
    found = json.loads(result.read_text())
    assert found["images"] == 24
    assert set(found["score"]) == set(found["score_coupling_removed"]) > {"mean", "counting"}
    assert len(found["events"]["unchanged"]) == len(found["events"]["at_rest"]) == 10
    assert all(0 <= share <= 1 for share in found["events"]["unchanged"])


def test_an_uncoupled_model_is_refused(capsys):
    assert main(["coupling", "--model", "default", "--prompts-per-family", "1"]) == 1
    assert "no coupling" in capsys.readouterr().err
