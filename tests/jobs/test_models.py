"""`millijoule models`: right about a model whose numbers can be had otherwise, and plain about what will not work."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.tiny_pipelines import change_json, tiny_pipeline

from millijoule.jobs.models import main
from millijoule.workers.generators.registry import PACKAGED, load_generator
from millijoule.workers.schemas import ImageRequest

pytest.importorskip("diffusers")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "quality"


def describe(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_pipeline("sdxl"), tmp_path / "sdxl")


@pytest.mark.long
def test_parts_are_those_of_the_files(folder, capsys):
    code, said = describe(capsys, folder)
    assert code == 0
    parts = {part["name"]: part for part in said["parts"]}
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / name).glob("*.safetensors")
        tensors = load_file(file).values()
        assert parts[name]["parameters"] == sum(t.numel() for t in tensors)
        assert parts[name]["size_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
        assert parts[name]["dtype"] == "F32"
    assert parts["scheduler"]["class_name"] == "EulerDiscreteScheduler"
    assert (said["width"], said["height"], said["num_inference_steps"]) == (64, 64, 50)
    assert said["loras"] is True
    assert said["gpu_weight_bytes_estimate"] < said["weight_bytes"]  # half the bytes of float32


@pytest.mark.long
@pytest.mark.parametrize("family", ["sdxl", "sd3", "pixart_sigma", "sana"])
def test_operations_are_those_of_the_loaded_model(family, capsys):
    _, said = describe(capsys, tiny_pipeline(family))
    counted = load_generator(str(tiny_pipeline(family))).operations_of([ImageRequest("p", 0, "a red cat", 1)])
    assert said["operations_per_image"] == {part: int(n) for part, (n,) in counted.items()}


@pytest.mark.long
def test_what_cannot_be_counted_says_why(capsys):
    code, said = describe(capsys, tiny_pipeline("qwen_image"))
    assert (code, said["operations_per_image"]) == (0, None)
    assert "nonzero" in said["operations_not_counted"]


def test_a_models_size_decides_nothing_about_the_time_or_memory(folder, capsys):
    """A denoiser of three billion parameters by its configuration, which its small file does not have."""
    unet = folder / "unet"
    change_json(unet / "config.json", block_out_channels=[2560, 5120])
    code, said = describe(capsys, folder)
    assert said["gpu_weight_bytes_estimate"] > 5e9
    assert code == 1
    (problem,) = said["problems"]
    assert "unet/diffusion_pytorch_model.safetensors: " in problem
    assert "config.json makes it [" in problem


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            lambda f: change_json(f / "model_index.json", _class_name="NoSuchPipeline"),
            (),
            "has no NoSuchPipeline",
        ),
        (lambda f: (f / "vae/config.json").unlink(), (), r"vae/config\.json: no such file"),
        (lambda f: (f / "unet/run.py").write_text("1"), (), r"unet/run\.py: code .* never run"),
        (lambda f: None, ("--scheduler", "Nothing"), "--scheduler Nothing: .*in its place can be"),
        (lambda f: None, ("--variant", "fp16"), "--variant fp16"),
        (lambda f: None, ("--config", "x"), "--config: .* is a folder with its own configurations"),
    ],
)
def test_what_will_not_work_is_a_problem(folder, capsys, damage, arguments, message):
    damage(folder)
    code, said = describe(capsys, folder, *arguments)
    assert code == 1
    (problem,) = said["problems"]
    import re

    assert re.search(message, problem)


def test_for_people_it_is_lines(folder, capsys):
    assert main([str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "kind        StableDiffusionXLPipeline" in shown
    assert "options     --lora: yes; --long-prompts: truncate, reject, chunk" in shown
    assert "(an estimate: " in shown


@pytest.mark.parametrize("model", ["default", "baseline", "python:support.models:plain"])
def test_packaged_models_and_functions(model, capsys):
    code, said = describe(capsys, model)
    assert (code, said["problems"]) == (0, [])
    if model == "default":
        assert (said["width"], said["weight_bytes"]) == (64, PACKAGED["default"].stat().st_size)
        evaluated = json.loads((RESULTS / "default.json").read_text())["model"]["operations_per_image"]
        assert said["operations_per_image"] == pytest.approx(evaluated, rel=0.1)


def test_a_model_that_is_nowhere(capsys):
    code, said = describe(capsys, "nothing.safetensors")
    assert (code, said["problems"]) == (1, ["--model nothing.safetensors: no such file or directory"])


def test_a_checkpoint_is_told_by_its_parts(tmp_path, capsys):
    from support.single_files import save_as_one_file

    folder = tiny_pipeline("sd15")
    path = save_as_one_file(folder, tmp_path / "mine.safetensors")
    _, said = describe(capsys, path, "--config", folder)
    _, of_folder = describe(capsys, folder)
    assert said["operations_per_image"] == of_folder["operations_per_image"]
    parameters = {p["name"]: p["parameters"] for p in said["parts"]}
    assert parameters == {p["name"]: p["parameters"] for p in of_folder["parts"]}
    save_file(
        {"double_blocks.0.img_attn.norm.key_norm.scale": load_file(path)["model.diffusion_model.out.2.bias"]},
        path,
    )
    code, said = describe(capsys, path)
    assert code == 1
    assert "a checkpoint of FLUX.1" in said["problems"][0]
