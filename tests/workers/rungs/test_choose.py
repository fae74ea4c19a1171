"""From a command's words to rungs: presets, files and single switches; what cannot be is refused by name, before torch."""

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiny_loras import save_lora
from support.tiny_pipelines import tiny_pipeline

from millijoule.jobs.options.model import ModelOptions
from millijoule.workers.diffusion.pipeline_folder import read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.rungs.check import check_rungs
from millijoule.workers.rungs.choose import choose_rungs
from millijoule.workers.rungs.families import family_of
from millijoule.workers.rungs.preset_file import FORMAT, PresetFile, read_preset, write_preset
from millijoule.workers.rungs.presets import PRESET_NAMES, preset
from millijoule.workers.rungs.rungs import Rungs

FAMILIES = {
    "sd15": "sd",
    "sdxl": "sdxl",
    "sd3": "sd3",
    "pixart_sigma": "pixart",
    "sana": "sana",
    "flux": "flux",
}
FAMILIES |= {"qwen_image": "qwen-image", "z_image": "other"}


def test_nothing_asked_for_is_nothing_changed():
    assert ModelOptions().obtain("baseline").options == GeneratorOptions()
    assert GeneratorOptions().identity() == {}
    assert Rungs().words() == "none"


def test_only_what_was_asked_for_is_in_a_jobs_identity():
    options = ModelOptions(guidance_until=0.6, steps=10).obtain("baseline").options
    assert options.identity() == {"rungs": {"steps": 10, "guidance_until": 0.6}}
    assert options.rungs.words() == "--steps 10 --guidance-until 0.6"


def test_a_switch_stands_over_a_preset():
    chosen = ModelOptions(optimize="max", steps=33).obtain("baseline").options.rungs
    assert chosen.steps == 33
    assert chosen.guidance_until == preset("max", read_pipeline(PACKAGED["baseline"])).guidance_until < 1


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_every_preset_is_one_that_its_family_can_take(name, family):
    folder = read_pipeline(tiny_pipeline(name))
    assert family_of(folder) == family
    for wanted in PRESET_NAMES:
        rungs = preset(wanted, folder)
        check_rungs(rungs, folder, on_gpu=False)
        check_rungs(rungs, folder, on_gpu=True)
        assert (rungs == Rungs()) == (wanted == "none")


def test_the_packaged_baseline_is_a_family_of_its_own():
    assert family_of(read_pipeline(PACKAGED["baseline"])) == "icon-unet"


def test_a_model_made_for_few_steps_keeps_them_and_its_solver(tmp_path):
    import shutil

    folder = shutil.copytree(tiny_pipeline("sd15"), tmp_path / "turbo")
    (folder / "millijoule.json").write_text(json.dumps({"num_inference_steps": 4}))
    found = preset("max", read_pipeline(folder))
    assert (found.steps, found.scheduler) == (None, None)


REFUSED = [
    (
        "sd3",
        {"step_cache": "deep"},
        None,
        "--step-cache deep: .*SD3Transformer2DModel.* pyramid and taylorseer",
    ),
    (
        "sd15",
        {"step_cache": "taylorseer"},
        None,
        "--step-cache taylorseer: .*UNet2DConditionModel.*deep and pyramid",
    ),
    ("qwen_image", {"step_cache": "pyramid"}, None, "--step-cache pyramid"),
    (
        "sd3",
        {"step_cache": "pyramid", "guidance_until": 0.5},
        None,
        "--guidance-until and --step-cache pyramid",
    ),
    ("z_image", {"guidance_until": 0.5}, None, "--guidance-until 0.5: .*ZImageTransformer2DModel"),
    ("sd3", {"scheduler": "DDIMScheduler"}, None, "--scheduler DDIMScheduler: .*flow matching"),
    ("sd15", {"precision": "float16"}, False, "--precision float16: needs a GPU"),
    ("sd15", {"quantize": "fp8"}, False, "--quantize fp8: needs a GPU"),
    ("sd15", {"sparsity": "2:4"}, False, "--sparsity 2:4: needs a GPU"),
    ("sd15", {"sparsity": "2:4", "quantize": "int8"}, None, "--sparsity and --quantize"),
    ("sd15", {"guidance_until": 1.5}, None, "--guidance-until 1.5: Expected `float` <= 1.0$"),
    ("sd15", {"steps": 0}, None, "--steps 0"),
    ("sd15", {"step_cache_interval": 1}, None, "--step-cache-interval 1"),
]


@pytest.mark.parametrize(("family", "switches", "on_gpu", "message"), REFUSED)
def test_what_a_pipeline_cannot_do_is_refused_by_name(family, switches, on_gpu, message):
    folder = read_pipeline(tiny_pipeline(family))
    with pytest.raises(InputError, match=message):
        choose_rungs("none", switches, "m", folder, on_gpu=on_gpu)


def test_models_without_rungs_say_so():
    with pytest.raises(InputError, match="--optimize max: default is no diffusers pipeline"):
        ModelOptions(optimize="max").obtain("default")
    with pytest.raises(InputError, match="--guidance-until: default is no diffusers pipeline"):
        ModelOptions(guidance_until=0.5).obtain("default")
    with pytest.raises(InputError, match="neither none, lossless, balanced, max nor a file"):
        ModelOptions(optimize="fastest").obtain("baseline")


def test_what_an_engine_cannot_bear_is_refused():
    for options, message in (
        (ModelOptions(step_cache="deep", engine="compile"), "--step-cache deep and --engine compile"),
        (ModelOptions(step_cache="deep", cuda_graphs=True), "--step-cache deep and --cuda-graphs"),
        (ModelOptions(quantize="int8", offload_weights=True), "--offload-weights: not with --quantize"),
    ):
        with pytest.raises(InputError, match=message):
            options.obtain("baseline")


def test_a_lora_and_layers_that_are_not_as_they_were_saved_exclude_each_other(tmp_path):
    lora = str(save_lora(tiny_pipeline("sd15"), tmp_path / "ink.safetensors", 2))
    with pytest.raises(InputError, match="--lora and --fuse-qkv"):
        ModelOptions(lora=(lora,), fuse_qkv=True).obtain(str(tiny_pipeline("sd15")))


def test_refusals_need_no_torch():
    program = (
        "import sys\nfrom millijoule.jobs.options.model import ModelOptions\n"
        "try: ModelOptions(optimize='max', step_cache='taylorseer').obtain('baseline')\n"
        "except Exception as error: print(type(error).__name__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["InputError", "False"]


# -- preset files ------------------------------------------------------------------------------------------------------

SOME = st.fixed_dictionaries(
    {},
    optional={
        "precision": st.sampled_from(["float32", "bfloat16", "half"]),
        "channels_last": st.booleans(),
        "steps": st.integers(1, 1000),
        "guidance_until": st.floats(0, 1),
        "step_cache": st.sampled_from(["deep", "pyramid", "taylorseer"]),
        "step_cache_interval": st.integers(2, 100),
        "scheduler": st.just("DDIMScheduler"),
    },
)


@given(SOME, st.sampled_from([None, "eager", "compile"]), st.none() | st.integers(1, 999))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_a_preset_that_was_written_is_read_back(tmp_path, rungs, engine, batch_size):
    made = PresetFile(
        FORMAT, Rungs(**rungs), engine=engine, batch_size=batch_size, model="m", measured={"a": 1}
    )
    write_preset(tmp_path / "p.json", made)
    assert read_preset(tmp_path / "p.json") == made


def test_a_preset_in_toml_says_only_what_differs(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'format = "millijoule-rungs"\nengine = "eager"\n[rungs]\nsteps = 12\nguidance_until = 0.5\n'
    )
    options = ModelOptions(optimize=str(path)).obtain("baseline").options
    assert options == GeneratorOptions(engine="eager", rungs=Rungs(steps=12, guidance_until=0.5))


DAMAGED = {
    "unknown rung": ({"rungs": {"speed": 1}}, "speed"),
    "unknown key": ({"rungs": {}, "note": ""}, "note"),
    "wrong type": ({"rungs": {"steps": "ten"}}, "steps"),
    "out of range": ({"rungs": {"steps": 0}}, "steps"),
    "no such choice": ({"rungs": {"step_cache": "magic"}}, "step_cache"),
    "a path for a class": ({"rungs": {"scheduler": "os.system"}}, "scheduler"),
    "other format": ({"rungs": {}, "format": "x"}, "format"),
    "no rungs": ({}, "rungs"),
    "of another version": ({"rungs": {}, "format_version": 2}, "format_version"),
}


@pytest.mark.parametrize(("change", "named"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_preset_that_is_not_one_is_refused_by_file_and_field(tmp_path, change, named):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"format": FORMAT, **change}))
    with pytest.raises(InputError, match=rf"--optimize .*p\.json: .*{named}"):
        ModelOptions(optimize=str(path)).obtain("baseline")


@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda t: ('{"format":' + t).encode()),
    st.sampled_from(["json", "toml"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_other_bytes_are_refused_in_words(tmp_path, data, ending):
    path = tmp_path / f"p.{ending}"
    path.write_bytes(data)
    with pytest.raises(InputError, match="--optimize"):
        read_preset(path)


def test_a_preset_measured_on_another_model_is_taken_with_a_warning(tmp_path, caplog):
    path = tmp_path / "p.json"
    write_preset(path, PresetFile(FORMAT, Rungs(steps=9), model="other", model_sha256="0" * 64))
    with caplog.at_level(logging.WARNING):
        assert ModelOptions(optimize=str(path)).obtain("baseline").options.rungs.steps == 9
    assert "measured on other" in caplog.text
