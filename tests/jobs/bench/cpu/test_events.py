"""`millijoule bench events`: exactly the share that was asked for rests, ratios are of the times, and the model's events are those that
its trajectory has."""

import json

import pytest
import torch
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.jobs.bench import main
from millijoule.jobs.bench.cpu.events import break_even
from millijoule.jobs.bench.cpu.events.problems import SHAPES, made_up
from millijoule.kernels.native_library import forms_here
from millijoule.kernels.oscillator import relax_reference
from millijoule.kernels.phase import sin_cos
from millijoule.workers.oscillators.config import VARIANTS
from millijoule.workers.oscillators.events import count_events
from millijoule.workers.oscillators.model_file import save_model

needs_compiled = pytest.mark.skipif(not forms_here(), reason="the compiled kernels are not built")


@pytest.fixture
def tiny(tmp_path):
    network = painter_of(tiny_oscillators("trained")).network
    save_model(painter_of(tiny_oscillators("trained")), tmp_path / "model.safetensors", "tiny")
    return network, str(tmp_path / "model.safetensors")


@needs_compiled
def test_every_form_is_measured_at_every_share(tiny, tmp_path):
    network, model = tiny
    result = tmp_path / "result.json"
    options = ["--shapes", "1", "--rounds", "1", "--quiet", "0.5", "1", "--model", model]
    assert main(["events", str(result), *options]) == 0
    found = json.loads(result.read_text())
    assert [row["form"] for row in found["couplings"]] == list(reversed(forms_here()))
    for row in found["couplings"]:
        assert (row["n"], row["rank"]) == (512, 32)
        assert [(r["quiet"], r["changed_share"]) for r in row["shares"]] == [(0.5, 0.5), (1, 0)]
        assert [r["images_left"] for r in row["shares"]] == [0, row["images"]]
        for share in row["shares"]:
            used = share["cpu_ms"]
            for name, ratio in share["over_dense"].items():
                assert ratio == pytest.approx(used[name] / used["dense"], rel=0.02)
    noun, variant = torch.arange(NOUNS).repeat_interleave(VARIANTS), torch.arange(VARIANTS).repeat(NOUNS)
    counted = count_events(network, noun, variant)
    assert found["model"]["icons"] == NOUNS * VARIANTS
    assert found["model"]["quiet_by_step"] == [
        0,
        *(pytest.approx(x, abs=1e-5) for x in counted.unchanged[:-1]),
    ]
    assert set(found["model"]["forms"]) == set(forms_here())


@pytest.mark.parametrize("shape", [SHAPES[0], (1, 96, 1)])
@pytest.mark.parametrize("quiet", [0.0, 0.37, 1.0])
def test_exactly_that_share_rests(shape, quiet):
    phases, coupling, drive = made_up(shape, 3, quiet)
    after = relax_reference(phases, coupling, drive, 1)
    changed = (torch.stack(sin_cos(phases)) != torch.stack(sin_cos(after))).any(0)
    assert int((phases == after).sum()) == round(quiet * phases.numel()) == int((~changed).sum())


def test_where_the_ratio_falls_to_one_for_good():
    assert break_even([(0.0, 3.0), (0.5, 2.0), (1.0, 0.0)]) == 0.75
    assert break_even([(0.0, 0.9), (0.5, 1.2), (0.9, 0.8), (1.0, 0.5)]) == 0.7
    assert break_even([(0.0, 0.9), (1.0, 0.5)]) == 0.0
    assert break_even([(0.0, 3.0), (1.0, 1.1)]) is None


@pytest.mark.parametrize(
    "options", [["--rounds", "0"], ["--shapes", "9"], ["--quiet", "0.5", "0.2"], ["--quiet", "2"]]
)
def test_what_cannot_be_measured_is_refused(options, capsys):
    assert main(["events", *options]) == 2
    assert options[0] in capsys.readouterr().err


@needs_compiled
def test_a_model_without_a_coupling_is_refused(capsys):
    assert main(["events", "--model", "default", "--shapes", "1", "--rounds", "1", "--quiet", "1"]) == 1
    assert "no coupling" in capsys.readouterr().err
