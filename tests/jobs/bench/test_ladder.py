"""`bench ladder` and `bench clocks` as commands, with real processes that draw, at toy size."""

import json
import shutil

import pytest
from PIL import Image
from support.tiny_pipelines import tiny_pipeline

from millijoule.jobs.bench import main
from millijoule.jobs.options.model import ModelOptions
from millijoule.workers.rungs.preset_file import read_preset


@pytest.fixture
def sdxl(tmp_path):
    """A tiny SDXL of few steps; its native size is what it was built with."""
    folder = shutil.copytree(tiny_pipeline("sdxl"), tmp_path / "sdxl")
    (folder / "millijoule.json").write_text(json.dumps({"num_inference_steps": 6}))
    return folder


@pytest.mark.long
def test_a_ladder_of_any_pipeline_gives_rows_pictures_and_a_preset(sdxl, tmp_path, capsys):
    output = tmp_path / "out"
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red cat\na blue star\n")
    command = ["ladder", str(sdxl), "--output", str(output), "--prompts", str(prompts), "--images", "2"]
    command += ["--block-seconds", "0", "--threads", "1", "--min-psnr", "1", "--device", "cpu"]
    assert main([*command, "--rungs", "steps-3"]) == 0
    result = json.loads((output / "ladder.json").read_text())
    rung = result["rows"][0]
    assert rung["rung"] == "steps-3"
    assert result["cost"] in ("cpu_seconds", "joules")
    assert result["environment"]["commit"]
    assert 0 < rung["cost_ratio"] < 1.2
    assert rung["psnr_db"] > 1
    assert rung["score"] is None
    for name in ("ladder.png", "sheet.png"):
        assert Image.open(output / name).width > 100
    if rung["kept"]:  # three steps of six cost less, unless the machine was too busy to tell
        assert result["rows"][1]["rung"] == "top: steps-3"
        preset = read_preset(output / "preset.json")
        assert preset.rungs.steps == 3
        assert ModelOptions(optimize=str(output / "preset.json")).obtain(str(sdxl)).options.rungs.steps == 3
    assert "steps-3" in capsys.readouterr().out
    assert main(["ladder", str(sdxl), *command[2:], "--images", "4"]) == 1
    assert "other options" in capsys.readouterr().err


def test_what_has_no_rungs_is_refused(tmp_path, capsys):
    assert main(["ladder", "default", "--output", str(tmp_path / "out")]) == 1
    assert "no diffusion pipeline" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_sweep_of_clocks_finds_the_clock_of_fewest_joules_on_a_stand_in(tmp_path):
    result = tmp_path / "clocks.json"
    command = [
        "clocks",
        "default",
        str(result),
        "--stand-in",
        "--clocks",
        "2",
        "--seconds",
        "0.5",
        "--pause",
        "0",
    ]
    assert main([*command, "--power-limits", "250"]) == 0
    found = json.loads(result.read_text())
    assert [(b["sm_mhz"], b["power_limit_mw"]) for b in found["blocks"][:4]] == [
        (None, None),
        (1980, None),
        (990, None),
        (None, 250_000),
    ]
    assert found["blocks"][4:] != found["blocks"][:4]
    # the CPU that draws does not slow down with the stand-in's clock: fewer watts are fewer joules
    assert found["settings"][0]["sm_mhz"] == 990
    best = found["settings"][0]
    assert best["joules_per_accepted_image"] == pytest.approx(
        best["joules_per_image"] / found["accepted_share"]
    )
