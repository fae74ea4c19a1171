"""Folders that hold weights several times, in shards, or not for every part: what is loaded is what is hashed, and nothing else."""

import inspect
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_pipelines import FAMILIES, tiny_pipeline

from millijoule.workers.diffusion.pipeline_folder import OWN_STEPS, read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, ModelPart
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.pipeline_parts.weight_variants import choose_weights
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import obtain_model

pytest.importorskip("diffusers")

ASKED = [ImageRequest("p", 0, "a red cat", 1, num_inference_steps=2)]
WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_pipeline("sd15"), tmp_path / "sd15")


def draw(folder, **options):
    return load_generator(str(folder), options=GeneratorOptions(**options)).generate(ASKED).images


def rename_weights(folder, variant):
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))


def save_variant(folder, name, change):
    file = folder / "unet" / f"{WEIGHTS}.safetensors"
    save_file(
        {n: change(t) for n, t in load_file(file).items()}, file.with_name(f"{WEIGHTS}.{name}.safetensors")
    )


def shard(component, index_name, shard_name):
    """Split the weights of a component into two files with an index."""
    (file,) = component.glob("*.safetensors")
    tensors = load_file(file)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: tensors[n] for n in part}, component / shard_name.format(i))
        weight_map |= dict.fromkeys(part, shard_name.format(i))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (component / index_name).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    file.unlink()


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_that_are_only_there_as_a_variant_are_found(folder, variant):
    expected = draw(folder)
    rename_weights(folder, variant)
    assert np.array_equal(draw(folder), expected)
    assert np.array_equal(draw(folder, variant=variant), expected)


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (f"{WEIGHTS}.safetensors.index.json", WEIGHTS + "-0000{}-of-00002.safetensors"),
        (f"{WEIGHTS}.safetensors.index.fp16.json", WEIGHTS + ".fp16-0000{}-of-00002.safetensors"),
        (f"{WEIGHTS}.fp16.safetensors.index.json", WEIGHTS + "-0000{}-of-00002.fp16.safetensors"),
    ],
)
def test_shards_are_found_under_all_spellings_of_a_variant(folder, index, shards):
    expected = draw(folder)
    shard(folder / "unet", index, shards)
    assert np.array_equal(draw(folder), expected)
    (folder / "unet" / shards.format(2)).unlink()
    with pytest.raises(InputError, match=shards.format(2).replace(".", r"\.") + ": no such file"):
        describe_model(str(folder))


def test_of_several_the_fullest_is_taken_and_the_log_says_so(folder, caplog):
    expected = draw(folder)
    before = describe_model(str(folder))
    save_variant(folder, "fp16", lambda t: t.half())
    save_variant(folder, "ema", lambda t: t * 0.5)
    caplog.set_level("INFO")
    assert np.array_equal(draw(folder), expected)
    assert (
        "unet: weights without a variant; besides weights of variant ema, weights of variant fp16"
        in caplog.text
    )
    assert describe_model(str(folder)) == before  # what is not loaded is not in the hash
    ema = describe_model(str(folder), GeneratorOptions(variant="ema"))
    assert ema.sha256 not in (
        before.sha256,
        describe_model(str(folder), GeneratorOptions(variant="fp16")).sha256,
    )
    assert not np.array_equal(draw(folder, variant="ema"), expected)


def test_a_part_without_the_variant_is_loaded_in_full_and_said(folder, caplog):
    save_variant(folder, "fp16", lambda t: t.half())
    assert read_pipeline(folder, variant="fp16").variants == {
        "text_encoder": None,
        "unet": "fp16",
        "vae": None,
    }
    assert "vae: has no variant fp16, weights without a variant are loaded" in caplog.text


def test_a_variant_that_is_nowhere_is_refused_with_those_that_are(folder):
    save_variant(folder, "fp16", lambda t: t.half())
    save_variant(folder, "bf16", lambda t: t.bfloat16())
    with pytest.raises(
        InputError, match=r"--variant fp8: .*sd15 has no weights of that variant; its variants: bf16, fp16"
    ):
        describe_model(str(folder), GeneratorOptions(variant="fp8"))


@pytest.mark.parametrize(
    ("names", "library", "chosen"),
    [
        (["model.fp16.safetensors", "model.fp32.safetensors"], "transformers", "model.fp32.safetensors"),
        (["model.fp8_e4m3.safetensors", "model.bf16.safetensors"], "transformers", "model.bf16.safetensors"),
        (["model.safetensors", f"{WEIGHTS}.safetensors"], "transformers", "model.safetensors"),
        (["model.safetensors", f"{WEIGHTS}.safetensors"], "diffusers", f"{WEIGHTS}.safetensors"),
        (["model.safetensors", "pytorch_model.bin"], "stable_diffusion", "model.safetensors"),
    ],
)
def test_names_alone_decide(names, library, chosen):
    choice = choose_weights(names, library, None)
    assert choice is not None
    assert choice.files == (chosen,)


@pytest.mark.parametrize(
    "names", [[], ["pytorch_model.bin"], ["model-00001-of-00002.safetensors"], ["x.safetensors"]]
)
def test_what_no_loader_finds_is_nothing(names):
    assert choose_weights(names, "transformers", None) is None


def test_parts_that_are_left_out_are_absent(tmp_path):
    """Stable Diffusion 3 without its largest text encoder."""
    folder = shutil.copytree(tiny_pipeline("sd3"), tmp_path / "sd3")
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    generator = load_generator(str(folder))
    assert generator.pipeline.text_encoder_3 is None
    assert generator.generate(ASKED).images.std() > 0


def test_files_that_no_loader_reads_are_not_in_the_hash(folder):
    before = describe_model(str(folder))
    (folder / "unet/README.md").write_text("words")
    (folder / "unet/weights.onnx").write_bytes(b"onnx")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    assert describe_model(str(folder)) == before
    (folder / "tokenizer/more.json").write_text("{}")
    assert describe_model(str(folder)) != before


def test_steps_are_the_pipelines_own_where_no_file_says_them():
    """The table is read against diffusers: every class in it, and every text-to-image class that has been tried."""
    diffusers = pytest.importorskip("diffusers")

    def in_diffusers(name):
        return inspect.signature(getattr(diffusers, name).__call__).parameters["num_inference_steps"].default

    assert {name: in_diffusers(name) for name in OWN_STEPS} == OWN_STEPS
    for family in FAMILIES:
        pipeline = read_pipeline(tiny_pipeline(family))
        assert pipeline.num_inference_steps == in_diffusers(pipeline.class_name), family


def test_what_a_file_says_of_steps_comes_first_and_makes_another_model(tmp_path):
    folder = shutil.copytree(tiny_pipeline("lcm"), tmp_path / "lcm")
    own = load_generator(str(folder)).info
    (folder / "millijoule.json").write_text('{"num_inference_steps": 6}')
    told = load_generator(str(folder)).info
    assert (own.num_inference_steps, told.num_inference_steps) == (4, 6)
    assert own.sha256 != told.sha256


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae"])
def test_weights_that_are_missing_are_not_made_up(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith(("fc2.weight", "conv_in.weight")))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{component}: weights are missing: .*{name}"):
        load_generator(str(folder))


# a decoder and a scheduler in the place of the pipeline's own


def test_another_decoder_changes_the_image_and_the_job(folder, tmp_path):
    vae = shutil.copytree(folder / "vae", tmp_path / "decoder")
    file = vae / f"{WEIGHTS}.safetensors"
    plain = obtain_model(str(folder), GeneratorOptions(vae=ModelPart(str(vae))))
    assert np.array_equal(
        load_generator(plain.model, options=plain.options).generate(ASKED).images, draw(folder)
    )
    save_file({n: t * 1.1 for n, t in load_file(file).items()}, file)
    got = obtain_model(str(folder), GeneratorOptions(vae=ModelPart(str(vae))))
    images = load_generator(got.model, options=got.options).generate(ASKED).images
    assert not np.array_equal(images, draw(folder))
    assert got.options.identity() != plain.options.identity()
    alone = obtain_model(str(folder), GeneratorOptions(vae=ModelPart(str(file))))
    assert np.array_equal(load_generator(alone.model, options=alone.options).generate(ASKED).images, images)


def test_a_folder_that_is_no_decoder_is_refused(folder):
    with pytest.raises(InputError, match=r"--vae .*unet: is a UNet2DConditionModel, not an autoencoder"):
        obtain_model(str(folder), GeneratorOptions(vae=ModelPart(str(folder / "unet"))))


def test_another_scheduler_with_settings(folder):
    name = "DPMSolverMultistepScheduler:use_karras_sigmas=true,solver_order=3"
    generator = load_generator(str(folder), options=GeneratorOptions(scheduler=name))
    config = generator.pipeline.scheduler.config
    assert type(generator.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert (config.use_karras_sigmas, config.solver_order, config.beta_end) == (True, 3, 0.012)
    assert not np.array_equal(generator.generate(ASKED).images, draw(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "EulerScheduler",
            r"did you mean \w*Euler\w*\? this pipeline's own is PNDMScheduler, in its place can be .*DDIM",
        ),
        ("FlowMatchEulerDiscreteScheduler", "in its place can be"),
        ("DDIMScheduler:karras=true", r"DDIMScheduler has no setting karras; it has .*beta_end"),
        ("DDIMScheduler:beta_end", r"write NAME or NAME:SETTING=VALUE"),
        ("os.system", r"'os\.system' is not the name of a scheduler"),
    ],
)
def test_schedulers_that_cannot_be_are_refused_before_the_job(folder, text, message):
    with pytest.raises(InputError, match=f"--scheduler .*{message}"):
        obtain_model(str(folder), GeneratorOptions(scheduler=text))


def test_float16_weights_of_a_variant_count_as_float16(folder):
    save_variant(folder, "fp16", lambda t: t.half() if t.dtype == torch.float32 else t)
    assert read_pipeline(folder, variant="fp16").weight_dtypes(("unet",)) == {"F16"}
    assert read_pipeline(folder).weight_dtypes(("unet",)) == {"F32"}
