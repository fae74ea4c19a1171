"""A checkpoint in one file draws what its folder draws, and says what it lacks."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.single_files import save_as_one_file
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.schemas import ImageRequest

pytest.importorskip("diffusers")

ASKED = [
    ImageRequest("p", i, p, i, num_inference_steps=2) for i, p in enumerate(("a red cat", "a big blue star"))
]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def made(request, tmp_path_factory):
    """(folder, checkpoint)."""
    folder = tiny_pipeline(request.param)
    if request.param == "sdxl":
        folder = shutil.copytree(folder, tmp_path_factory.mktemp("sdxl") / "sdxl")
        _widen_second_encoder(folder)
    return folder, save_as_one_file(folder, tmp_path_factory.mktemp("one") / "mine.safetensors")


def _widen_second_encoder(folder):
    """Its two encoders are told apart by their width."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = json.loads((folder / "text_encoder_2/config.json").read_text())
    for name in ("hidden_size", "intermediate_size", "projection_dim"):
        config[name] = 64
    torch.manual_seed(1)
    shutil.rmtree(folder / "text_encoder_2")
    CLIPTextModelWithProjection(CLIPTextConfig(**config)).save_pretrained(folder / "text_encoder_2")
    from diffusers import UNet2DConditionModel

    unet = json.loads((folder / "unet/config.json").read_text())
    unet |= {"cross_attention_dim": 32 + 64, "projection_class_embeddings_input_dim": 6 * 8 + 64}
    shutil.rmtree(folder / "unet")
    UNet2DConditionModel.from_config(unet).save_pretrained(folder / "unet")


@pytest.fixture
def config(made, tmp_path):
    """The folder without its weights."""
    folder = shutil.copytree(made[0], tmp_path / "config")
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


def test_the_images_are_those_of_the_folder_bit_for_bit(made, config):
    folder, checkpoint = made
    one = load_generator(str(checkpoint), options=GeneratorOptions(config=str(config)))
    assert np.array_equal(one.generate(ASKED).images, load_generator(str(folder)).generate(ASKED).images)
    assert one.info.name == "mine"


def test_its_identity_is_of_its_weights_and_the_configurations(made, config):
    options = GeneratorOptions(config=str(config))
    before = describe_model(str(made[1]), options)
    assert describe_model(str(made[1]), GeneratorOptions(config=str(made[0]))).sha256 == before.sha256
    scheduler = config / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.02}))
    assert describe_model(str(made[1]), options).sha256 != before.sha256


def test_without_configurations_it_says_where_they_come_from(made):
    with pytest.raises(
        InputError, match=r"a checkpoint of Stable Diffusion .*holds weights alone.*--config [\w-]+/"
    ):
        describe_model(str(made[1]))


def test_weights_that_it_lacks_come_from_the_folder_or_are_named(made, config, tmp_path):
    folder, checkpoint = made
    tensors = {n: t for n, t in load_file(checkpoint).items() if not n.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "no-vae.safetensors")
    with pytest.raises(
        InputError, match=r"no-vae\.safetensors: has no weights of vae, and neither has --config"
    ):
        describe_model(str(tmp_path / "no-vae.safetensors"), GeneratorOptions(config=str(config)))
    shutil.copytree(folder / "vae", config / "vae", dirs_exist_ok=True)
    both = load_generator(str(tmp_path / "no-vae.safetensors"), options=GeneratorOptions(config=str(config)))
    assert np.array_equal(both.generate(ASKED).images, load_generator(str(folder)).generate(ASKED).images)


def test_a_folder_of_another_family_is_refused(made):
    with pytest.raises(
        InputError, match=r"model_index\.json: a FluxPipeline, but .* is a checkpoint of Stable Diffusion"
    ):
        describe_model(str(made[1]), GeneratorOptions(config=str(tiny_pipeline("flux"))))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["unet.down.lora_A.weight"], "not a checkpoint in one of the usual layouts"),
        (["double_blocks.0.img_attn.norm.key_norm.scale", "a.scale_weight"], "weights of 8 bits with scales"),
    ],
)
def test_other_files_are_refused_with_what_they_might_be(tmp_path, names, message):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        describe_model(str(tmp_path / "x.safetensors"))
