"""`millijoule train`: recipes are checked, a run leaves weights that draw, and can be continued."""

import json

import pytest

from millijoule.jobs import train
from millijoule.jobs.recipe import load_recipe, recipe_names
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

TINY = """
kind = "oscillator"
name = "tiny"

[training]
steps = 4
scenes = 2
model = { channels = 4, driven = 4, read = 4, noise_channels = 4, rank = 2, hidden = 16, widths = [8, 8, 8], mix = 8, coupling = "COUPLING" }
"""


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    if name == "baseline":
        pytest.importorskip("diffusers")
    assert load_recipe(name, {"steps": 7}).training.steps == 7


def test_controls_differ_from_the_model_they_control_in_the_coupling_alone():
    trained, *others = (
        load_recipe(f"control-{c}", {}).training for c in ("trained", "frozen", "none", "mlp")
    )
    for other in others:
        assert other.model.coupling != trained.model.coupling
        assert {**vars(other), "model": 0} == {**vars(trained), "model": 0}
        assert {**vars(other.model), "coupling": 0} == {**vars(trained.model), "coupling": 0}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = 3", r"\$\.kind"),
        ('kind = "oscillator"\nsteps = 3', "no field is named 'steps'"),
        ('kind = "oscillator"\n[training]\nstep = 3', "no field is named 'step'"),
        ('kind = "oscillator"\n[training]\nsteps = "many"', r"got `str` - at `\$\.steps`"),
        ('kind = "oscillator"\n[training]\nmodel = { grid = 1.5 }', r"got `float` - at `\$\.model\.grid`"),
        ('kind = "oscillator"\n[training]\nmodel = { widths = 3 }', r"Expected `array`.*\$\.model\.widths"),
        ("kind =", "Invalid value"),
    ],
)
def test_bad_recipes_are_refused_with_the_place(tmp_path, text, words):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=words) as refused:
        load_recipe(str(path), {})
    assert str(path) in str(refused.value)


def run(tmp_path, *more, coupling="trained"):
    recipe = tmp_path / f"{coupling}.toml"
    recipe.write_text(TINY.replace("COUPLING", coupling))
    return train.main(["--recipe", str(recipe), "--output", str(tmp_path / "out"), "--device", "cpu", *more])


@pytest.mark.long
def test_a_run_is_continued_and_leaves_weights_that_draw(tmp_path, capsys):
    assert run(tmp_path, "--minutes", "0", "--sample-every", "1") == 0
    assert "after 1 of 4 steps" in capsys.readouterr().out
    assert run(tmp_path) == 1
    assert "--resume" in capsys.readouterr().err
    assert run(tmp_path, "--resume", "--sample-every", "2") == 0
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 4]
    assert (out / "samples-000002.png").exists()
    for name in ("model", "float"):
        generator = load_generator(str(out / f"{name}.safetensors"))
        assert generator.generate([ImageRequest("a", 0, "a red cat", 1)]).images.shape == (1, 64, 64, 3)
    assert run(tmp_path, "--seed", "3", "--resume") == 1
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.parametrize("coupling", ["none", "mlp"])
def test_controls_without_coupling_have_a_float_form_only(tmp_path, coupling):
    assert run(tmp_path, "--sample-every", "0", coupling=coupling) == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert load_generator(str(tmp_path / "out" / "float.safetensors")).count_operations()["decoder"] > 0


@pytest.mark.parametrize("option", ["steps", "threads"])
def test_no_training_is_no_training(tmp_path, capsys, option):
    assert train.main(["--recipe", "oscillator", "--output", str(tmp_path / "run"), f"--{option}", "0"]) == 1
    assert f"--{option} 0: at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    recipe = tmp_path / "r.toml"
    recipe.write_text(TINY.replace("COUPLING", "none"))
    output = tmp_path / "file" / "run"
    assert train.main(["--recipe", str(recipe), "--output", str(output)]) == 1
    assert f"millijoule train: {output}: Not a directory" in capsys.readouterr().err
