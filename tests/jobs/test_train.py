"""`millijoule train`: recipes are checked, a run leaves weights that draw, and can be continued."""

import json

import pytest

from millijoule.jobs import train
from millijoule.jobs.recipe import load_recipe, recipe_names
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

TINY = """
kind = "icons"
name = "tiny"

[training]
steps = 4
half = 2
whole = 2
model = { code = 8, hidden = 8, channels = 4, rank = 2, width = 8, mix = 8, coupling = "COUPLING" }
"""


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name):
    if name == "baseline":
        pytest.importorskip("diffusers")
    assert load_recipe(name, {"steps": 7}).training.steps == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind = 3", r"\$\.kind"),
        ('kind = "icons"\nsteps = 3', "no field is named 'steps'"),
        ('kind = "icons"\n[training]\nstep = 3', "no field is named 'step'"),
        ('kind = "icons"\n[training]\nsteps = "many"', r"got `str` - at `\$\.steps`"),
        ('kind = "icons"\n[training]\nmodel = { width = 1.5 }', r"got `float` - at `\$\.model\.width`"),
        ('kind = "icons"\n[training]\nmodel = { coupling = 3 }', r"Expected `str`.*\$\.model\.coupling"),
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
    generator = load_generator(str(out / "model.safetensors"))
    assert generator.generate([ImageRequest("a", 0, "a red cat", 1)]).images.shape == (1, 64, 64, 3)
    other = ["--output", str(tmp_path / "further"), "--start-from", str(out / "float.safetensors")]
    assert run(tmp_path, "--sample-every", "0", *other) == 0
    assert run(tmp_path, "--seed", "3", "--resume") == 1
    assert "other settings (seed)" in capsys.readouterr().err


@pytest.mark.parametrize("coupling", ["none", "trained", "frozen", "mlp"])
def test_every_form_but_the_mlp_leaves_a_model_that_draws(tmp_path, coupling):
    assert run(tmp_path, "--sample-every", "0", coupling=coupling) == 0
    model = tmp_path / "out" / "model.safetensors"
    assert model.exists() == (coupling != "mlp")
    if coupling != "mlp":
        counted = load_generator(str(model)).operations_of([ImageRequest("a", 0, "a red cat", 1)])
        assert all(operations > 0 for (operations,) in counted.values())
    with pytest.raises(InputError, match="oscillator model"):  # what training goes on from draws nothing
        load_generator(str(tmp_path / "out" / "float.safetensors"))


@pytest.mark.parametrize("option", ["steps", "threads"])
def test_no_training_is_no_training(tmp_path, capsys, option):
    assert train.main(["--recipe", "icons", "--output", str(tmp_path / "run"), f"--{option}", "0"]) == 2
    assert f"--{option} 0: at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    recipe = tmp_path / "r.toml"
    recipe.write_text(TINY.replace("COUPLING", "none"))
    output = tmp_path / "file" / "run"
    assert train.main(["--recipe", str(recipe), "--output", str(output)]) == 1
    assert f"millijoule train: {output}: Not a directory" in capsys.readouterr().err
