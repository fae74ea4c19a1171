"""A hub's models: asked for once, only what is loaded, and what is wrong is said with the id and what to do."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.stand_in_hub import StandInHub
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import obtain_model

pytest.importorskip("diffusers")

ID = "someone/small"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def folder(tmp_path):
    """A pipeline as repositories hold it: with weights twice, pickled ones, pictures and a program beside it."""
    folder = shutil.copytree(tiny_pipeline("sd15"), tmp_path / "repository")
    unet = folder / "unet"
    shutil.copy(
        unet / "diffusion_pytorch_model.safetensors", unet / "diffusion_pytorch_model.fp16.safetensors"
    )
    (unet / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04 pickled")
    (folder / "README.md").write_text("# a model")
    (folder / "image.png").write_bytes(b"png")
    (folder / "run.py").write_text("raise SystemExit")
    (folder / "sd15.safetensors").write_bytes(b"the same in one file")
    return folder


def test_only_what_is_loaded_is_fetched_and_each_file_once(hub, folder):
    hub.add(ID, folder)
    got = obtain_model(ID)
    assert hub.fetched() == sorted(
        [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/config.json",
            "text_encoder/model.safetensors",
            *(f"tokenizer/{p.name}" for p in (folder / "tokenizer").iterdir()),
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/config.json",
            "vae/diffusion_pytorch_model.safetensors",
        ]
    )
    commit = hub.repositories[ID].commit
    assert (got.commit, got.identity.name) == (commit, f"{ID}@{commit[:12]}")


def test_the_model_is_what_its_files_are_wherever_they_lie(hub, folder):
    hub.add(ID, folder)
    got = obtain_model(ID)
    assert got.identity.sha256 == describe_model(str(folder)).sha256
    request = ImageRequest("p", 0, "a red cat", 1, num_inference_steps=2)
    here, there = load_generator(str(folder)), load_generator(got.model, options=got.options)
    assert np.array_equal(here.generate([request]).images, there.generate([request]).images)
    assert there.info.name == got.identity.name


def test_a_variant_is_fetched_alone(hub, folder):
    hub.add(ID, folder)
    obtain_model(ID, GeneratorOptions(variant="fp16"))
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.fetched()
    assert "unet/diffusion_pytorch_model.safetensors" not in hub.fetched()
    with pytest.raises(InputError, match=r"--variant fp8: someone/small has no weights.*its variants: fp16"):
        obtain_model(ID, GeneratorOptions(variant="fp8"))


def test_a_commit_that_the_cache_has_needs_no_hub_and_a_branch_is_asked_for_again(hub, folder, tmp_path):
    first = hub.add(ID, folder)
    obtain_model(ID)
    hub.requests.clear()
    again = obtain_model(ID, revision=first.commit)
    assert (again.commit, hub.requests) == (first.commit, [])
    newer = shutil.copytree(folder, tmp_path / "newer")
    shutil.copytree(tiny_pipeline("lcm") / "unet", newer / "unet", dirs_exist_ok=True)
    hub.add(ID, newer)
    assert obtain_model(ID).commit == hub.repositories[ID].commit != first.commit
    assert obtain_model(ID, revision=first.commit).identity == again.identity


def test_without_a_hub_the_cache_counts(hub, folder, monkeypatch):
    hub.add(ID, folder)
    online = obtain_model(ID)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert obtain_model(ID).identity == online.identity
    assert hub.requests == []
    with pytest.raises(InputError, match=r"someone/other: is not in the cache .*HF_HUB_OFFLINE"):
        obtain_model("someone/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.away = True
    assert obtain_model(ID).identity == online.identity
    with pytest.raises(
        InputError, match=r"someone/other: no such file or directory here, and http://.*does not answer"
    ):
        obtain_model("someone/other")


def test_a_file_that_is_gone_from_the_cache_is_fetched_again(hub, folder):
    hub.add(ID, folder)
    got = obtain_model(ID)
    link = Path(got.model, "vae/config.json")
    link.resolve().unlink()
    link.unlink()
    hub.requests.clear()
    assert obtain_model(ID).identity == got.identity
    assert hub.fetched() == ["vae/config.json"]


def test_a_damaged_cache_is_said_with_the_file(hub, folder):
    hub.add(ID, folder)
    weights = Path(obtain_model(ID).model, "unet/diffusion_pytorch_model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.resolve().write_bytes(data)
    with pytest.raises(
        InputError, match=r"unet/diffusion_pytorch_model\.safetensors: is not the file that the hub has"
    ):
        obtain_model(ID)


@pytest.mark.parametrize(
    ("word", "more", "message"),
    [
        (
            ID,
            {"gated": True},
            r"--model someone/small: is gated: accept its terms at .*/someone/small and set HF_TOKEN",
        ),
        (
            "someone/smal",
            {},
            r"--model someone/smal: no such file or directory here, and .* no model of that name",
        ),
        ("no/such/folder", {}, r"--model no/such/folder: no such file or directory"),
        ("small.safetensors", {}, r"--model small\.safetensors: no such file or directory"),
        (f"{ID}/sd15.ckpt", {}, r"sd15\.ckpt: a pickled file"),
        (f"{ID}/other.safetensors", {}, r"someone/small has no file other\.safetensors"),
    ],
)
def test_what_cannot_be_had_is_said_with_its_name_and_what_to_do(hub, folder, word, more, message):
    hub.add(ID, folder, **more)
    with pytest.raises(InputError, match=message):
        obtain_model(word)


def test_a_token_opens_a_gated_model(hub, folder, monkeypatch):
    hub.add(ID, folder, gated=True, token="hf_good")
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(InputError, match="is gated"):
        obtain_model(ID)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert obtain_model(ID).commit


def test_revisions_belong_to_the_hub(hub, folder):
    hub.add(ID, folder)
    with pytest.raises(InputError, match=r"has no revision 'v9'"):
        obtain_model(ID, revision="v9")
    with pytest.raises(InputError, match=r"--revision v1: default is not a model of the hub"):
        obtain_model("default", revision="v1")


def test_pickled_weights_are_not_fetched(hub, folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    hub.add(ID, folder)
    with pytest.raises(InputError, match=r"someone/small/vae/diffusion_pytorch_model\.bin: a pickled file"):
        obtain_model(ID)
    assert hub.fetched() == ["model_index.json"]


def test_parts_may_be_the_hubs_too(hub, folder, tmp_path):
    hub.add(ID, folder)
    hub.add("someone/decoder", shutil.copytree(folder / "vae", tmp_path / "vae"))
    got = obtain_model(ID, GeneratorOptions(vae=ModelPart("someone/decoder")))
    assert got.options.vae.path.endswith(f"snapshots/{hub.repositories['someone/decoder'].commit}")
    with pytest.raises(InputError, match=r"--lora someone/small: has several \.safetensors files|no LoRA"):
        obtain_model(ID, GeneratorOptions(loras=(LoraChoice(ID),)))
