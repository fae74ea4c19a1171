"""`millijoule bench controls`: forms trained alike, at equal steps and at equal operations; a run that is complete is kept."""

import json

import pytest

from millijoule.jobs.bench import controls, main
from millijoule.workers.errors import InputError

SMALL = ("--nouns", "80", "--steps", "2", "--half", "6", "--whole", "2", "--prompts-per-family", "2")


def bench(folder, *more):
    return main(["controls", str(folder / "result.json"), "--output", str(folder / "runs"), *SMALL, *more])


def test_forms_differ_in_the_model_alone():
    options = controls.BenchOptions(nouns=80)
    configs = {form: vars(controls.training_config(form, 7, options)) for form in ("none", "wide", "trained")}
    models = {form: vars(config.pop("model")) for form, config in configs.items()}
    assert configs["none"] == configs["wide"] == configs["trained"]
    assert configs["none"]["seed"] == 7
    assert {k for k, v in models["none"].items() if models["trained"][k] != v} == {"coupling"}
    assert {k for k, v in models["none"].items() if models["wide"][k] != v} == {"width"}


@pytest.mark.long
def test_runs_are_judged_kept_and_summed_up(tmp_path, capsys):
    assert bench(tmp_path, "--runs", "2", "--forms", "none", "wide", "trained", "mlp") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(r["form"], r["seed"]) for r in result["runs"]] == [
        (form, seed) for seed in (0, 1) for form in ("none", "wide", "trained", "mlp")
    ]
    of = {r["form"]: r for r in result["runs"]}
    assert of["wide"]["operations_per_image"] == pytest.approx(
        of["trained"]["operations_per_image"], rel=0.01
    )
    assert of["none"]["operations_per_image"] < of["trained"]["operations_per_image"]
    assert of["trained"]["parameters"] - of["none"]["parameters"] == 32 * 5 * 32 + 2 * 512 * 32
    assert of["trained"]["images"] == 24
    assert set(of["trained"]["coupling_removed"]) == {"overlap", "score"}
    first, second = (r["overlap"] for r in result["runs"] if r["form"] == "none")
    mean, low, high = result["summary"]["none"]["overlap"]
    assert mean == pytest.approx((first + second) / 2, abs=1e-4)
    assert high - mean == pytest.approx(12.706 * abs(first - second) / 2, rel=0.01, abs=1e-4)
    assert mean - low == pytest.approx(high - mean, abs=1e-4)
    capsys.readouterr()

    def no_training(*_):
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(controls, "_trained", no_training)
        assert bench(tmp_path, "--runs", "2", "--forms", "none", "wide", "trained", "mlp") == 0
    assert json.loads((tmp_path / "result.json").read_text())["runs"] == result["runs"]
    assert bench(tmp_path, "--runs", "2", "--forms", "none", "--seed-of-nothing", "1") == 2
    assert bench(tmp_path, "--runs", "1", "--forms", "none", "--steps", "3") == 1
    assert "other settings" in capsys.readouterr().err


def test_no_runs_are_refused():
    with pytest.raises(InputError, match="at least 1"):
        controls.run(controls.BenchOptions(runs=0))


def test_a_form_twice_is_refused():
    with pytest.raises(InputError, match="each once"):
        controls.run(controls.BenchOptions(forms=("none", "none")))
