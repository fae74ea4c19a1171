"""Models in a bucket: the same model as in a folder, fetched once, and again only when it changed."""

import shutil

import numpy as np
import pytest
from support.tiny_loras import save_lora
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import obtain_model
from millijoule.workers.storage.open import open_store

pytest.importorskip("diffusers")

ASKED = [ImageRequest("p", 0, "a red cat", 1, num_inference_steps=2)]


@pytest.fixture
def bucket(moto_s3, s3_env, fault_proxy):
    """(URL, proxy that sees every request)."""
    proxy = fault_proxy(moto_s3)
    url = f"s3://{moto_s3.make_bucket('models')}"
    s3_env(moto_s3.through(proxy))
    return url, proxy


def upload(url, folder):
    store = open_store(url)
    for file in folder.rglob("*"):
        if file.is_file():
            store.put_file(file.relative_to(folder).as_posix(), file)


def reads(proxy, ending):
    return sum(
        line.startswith("GET") and line.split()[1].split("?")[0].endswith(ending) for line in proxy.requests
    )


def test_a_model_is_the_same_in_a_bucket_and_is_fetched_once(bucket, tmp_path):
    url, proxy = bucket
    folder = shutil.copytree(tiny_pipeline("sd15"), tmp_path / "sd15")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    upload(f"{url}/m/sd15", folder)
    proxy.requests.clear()
    cache = str(tmp_path / "cache")
    got = obtain_model(f"{url}/m/sd15", cache=cache)
    assert got.identity == describe_model(str(folder))
    assert reads(proxy, "unet/diffusion_pytorch_model.safetensors") == 1
    assert reads(proxy, ".bin") == 0
    images = load_generator(got.model, options=got.options).generate(ASKED).images
    assert np.array_equal(images, load_generator(str(folder)).generate(ASKED).images)
    proxy.requests.clear()
    assert obtain_model(f"{url}/m/sd15/", cache=cache).identity == got.identity
    assert reads(proxy, ".safetensors") == 0
    # another model under the same prefix is another entry of the cache
    upload(f"{url}/m/sd15", tiny_pipeline("lcm"))
    assert (
        obtain_model(f"{url}/m/sd15", cache=cache).identity.sha256
        == describe_model(str(tiny_pipeline("lcm"))).sha256
    )
    assert describe_model(got.model, got.options) == got.identity


def test_single_files_and_parts(bucket, tmp_path):
    url, _ = bucket
    lora = save_lora(tiny_pipeline("sd15"), tmp_path / "style.safetensors", 1)
    store = open_store(url)
    store.put_file("loras/style.safetensors", lora)
    upload(f"{url}/vae", tiny_pipeline("sd15") / "vae")
    choices = GeneratorOptions(
        loras=(LoraChoice(f"{url}/loras/style.safetensors", 0.5),), vae=ModelPart(f"{url}/vae")
    )
    got = obtain_model(str(tiny_pipeline("sd15")), choices, cache=str(tmp_path / "cache"))
    assert [(c.name, c.weight) for c in got.options.loras] == [("style", 0.5)]
    here = obtain_model(str(tiny_pipeline("sd15")), GeneratorOptions(loras=(LoraChoice(str(lora), 0.5),)))
    assert got.options.loras[0].sha256 == here.options.loras[0].sha256
    assert load_generator(got.model, options=got.options).generate(ASKED).images.std() > 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("/nothing", r"--model s3://.*/nothing: there is nothing under that prefix"),
        ("/x.safetensors", r"x\.safetensors: there is no such object"),
        ("/x.ckpt", r"x\.ckpt: a pickled file"),
        ("/vae", r"has no model_index\.json: not a pipeline"),
    ],
)
def test_what_is_not_there_is_said(bucket, tmp_path, word, message):
    url, _ = bucket
    upload(f"{url}/vae", tiny_pipeline("sd15") / "vae")
    with pytest.raises(InputError, match=message):
        obtain_model(url + word, cache=str(tmp_path / "cache"))
