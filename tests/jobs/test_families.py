"""Whole jobs with pipelines of many families, from a folder to a local output and to a bucket; Ray is stood in for."""

import io
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.jobs import assert_exactly_once, manifest
from support.stand_in_jobs import start_cluster
from support.tiny_loras import save_lora
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.jobs import generate
from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.images.readers import read_provenance
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.storage.open import open_store

pytest.importorskip("diffusers")

FAMILIES = [
    *("sd15", "sdxl", "sd3", "flux", "qwen_image"),
    *(
        pytest.param(family, marks=pytest.mark.long)
        for family in ("pixart_sigma", "sana", "lcm", "kandinsky22", "z_image", "chroma", "deepfloyd_if")
    ),
]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """`job(model, rows, output=...)`: a job of shards of four images on a node without a GPU."""
    ray = start_cluster(monkeypatch)
    ray.add_node("host-1", CPU=2.0)
    ray.shutdown = lambda: None

    def run(model, rows, output=tmp_path / "out", side=64, **more):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return generate(
            prompts=prompts,
            output=str(output),
            model=str(model),
            shard_size=4,
            device="cpu",
            engine="eager",
            width=side,
            height=side,
            quiet=True,
            telemetry=False,
            **more,
        )

    return run


def rows_of(family):
    few = {"num_inference_steps": 2}
    return [
        {"prompt_id": "short", "prompt": "a red dog", "seed": 1, **few},
        {"prompt_id": "long", "prompt": "a big blue cat " * 200, "seed": 2, **few},
        {"prompt_id": "guided", "prompt": "a red dog", "seed": 3, "guidance_scale": 6.0, **few},
        {"prompt_id": "away", "prompt": "a red dog", "seed": 4, "negative_prompt": "ugly", **few},
        {"prompt_id": "odd", "prompt": "a red dog", "seed": 5, **few, "width": SIZES[family] + 1},
    ]


def quick(family, tmp_path):
    """The pipeline, which a worker that starts tries with its default of steps."""
    folder = shutil.copytree(tiny_pipeline(family), tmp_path / family)
    (folder / "millijoule.json").write_text(json.dumps({"num_inference_steps": 2}))
    return folder


def pixels(output, row):
    with open_store(str(output)).open_input(row["path"]) as source:
        table = pq.ParquetFile(source).read().to_pylist()
    (encoded,) = (r["image"] for r in table if r["prompt_id"] == row["prompt_id"])
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_job_from_a_folder(job, family, tmp_path):
    side = SIZES[family]
    result = job(quick(family, tmp_path), rows_of(family), side=side)
    assert (result.images, result.images_quarantined) == (4, 1)
    rows = {row["prompt_id"]: row for row in manifest(tmp_path / "out")}
    assert_exactly_once(tmp_path / "out", 5)
    assert [rows[name]["status"] for name in ("short", "long", "guided", "away")] == ["ok"] * 4
    assert rows["odd"]["status"] == "quarantined"
    assert "this model needs sides that are multiples of" in rows["odd"]["error"]
    assert not rows["short"]["warnings"]
    assert "lost are" in rows["long"]["warnings"][0]
    options = GeneratorOptions(engine="eager", width=side, height=side)
    generator = DiffusersGenerator.load(tiny_pipeline(family), options=options)
    asked = rows_of(family)[0]
    del asked["prompt_id"]
    alone = generator.generate([ImageRequest("short", 0, **asked)]).images[0]
    drawn = pixels(tmp_path / "out", rows["short"])
    assert np.abs(drawn.astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.long
@pytest.mark.parametrize("family", ["sdxl", "qwen_image", "sana"])
def test_a_job_to_a_bucket(job, family, moto_s3, s3_env, tmp_path):
    s3_env(moto_s3)
    output = f"s3://{moto_s3.make_bucket('families')}/out"
    result = job(quick(family, tmp_path), rows_of(family), output)
    assert (result.images, result.images_quarantined) == (4, 1)
    assert_exactly_once(output, 5)


def test_hidden_and_rejected_images_have_their_statuses(job, tmp_path, monkeypatch):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    forward = StableDiffusionSafetyChecker.forward

    def hides_two(self, clip_input, images):
        images, hidden = forward(self, clip_input, images)
        for i in range(1, len(images), 4):
            images[i], hidden[i] = 0.0, True
        return images, hidden

    monkeypatch.setattr(StableDiffusionSafetyChecker, "forward", hides_two)
    rows = [{"prompt_id": str(i), "prompt": "a red dog", "num_inference_steps": 1} for i in range(4)]
    rows.append({"prompt_id": "long", "prompt": "apple " * 80, "num_inference_steps": 1})
    result = job(quick("sd15_safety", tmp_path), rows, long_prompts="reject")
    found = {row["prompt_id"]: row for row in manifest(tmp_path / "out")}
    assert {name: row["status"] for name, row in found.items()} == {
        "0": "ok",
        "1": "filtered",
        "2": "ok",
        "3": "ok",
        "long": "quarantined",
    }
    assert found["1"]["sha256"] is None
    assert found["1"]["error"] == "the model's safety checker hid this image"
    assert "lost are 'apple apple apple apple apple'" in found["long"]["error"]
    assert (result.images, result.images_quarantined) == (3, 1)


def test_what_changes_pixels_is_part_of_the_job(job, tmp_path):
    folder = quick("sd15", tmp_path)
    rows = [{"prompt": "a red dog", "num_inference_steps": 1}]
    job(folder, rows)
    assert job(folder, rows).images == 1
    with pytest.raises(InputError, match="--long-prompts was the default, now chunk"):
        job(folder, rows, long_prompts="chunk")
    with pytest.raises(InputError, match="--long-prompts chunk: StableDiffusion3Pipeline"):
        job(tiny_pipeline("sd3"), rows, tmp_path / "other", long_prompts="chunk")
    assert not (tmp_path / "other").exists()


def test_each_of_four_images_of_a_prompt_can_be_drawn_again_from_what_its_file_says(job, tmp_path):
    rows = [{"prompt_id": "p", "prompt": "a red dog", "num_inference_steps": 2}]
    assert job(quick("sd15", tmp_path), rows, images_per_prompt=4, format="files").images == 4
    options = GeneratorOptions(engine="eager", width=64, height=64)
    generator = DiffusersGenerator.load(tiny_pipeline("sd15"), options=options)
    seeds = set()
    for row in manifest(tmp_path / "out"):
        encoded = (tmp_path / "out" / row["path"]).read_bytes()
        _, said = read_provenance(encoded)
        request = ImageRequest("", 0, said["prompt"], said["seed"], num_inference_steps=2)
        alone = generator.generate([request]).images[0]
        kept = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        assert np.abs(alone.astype(int) - kept.astype(int)).max() <= 1
        seeds.add(said["seed"])
    assert len(seeds) == 4


#: Families whose pipelines take LoRAs, and the part that these are for.
WITH_LORAS = {
    **dict.fromkeys(("sd15", "sdxl", "lcm"), "unet"),
    **dict.fromkeys(("sd3", "flux", "qwen_image", "sana", "z_image"), "transformer"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["sd15", "sdxl", "sd3", "pixart_sigma", "sana", "flux", "qwen_image", "lcm", "kandinsky22", "z_image"],
)
def test_a_job_whose_model_is_in_a_bucket(job, family, moto_s3, s3_env, tmp_path):
    """With a LoRA where the tiny family has one, which changes the image and leaves that of a row without it alone."""
    s3_env(moto_s3)
    url = f"s3://{moto_s3.make_bucket('models')}/{family}"
    folder, bucket = quick(family, tmp_path), open_store(url)
    for file in sorted(f for f in folder.rglob("*") if f.is_file()):
        bucket.put(file.relative_to(folder).as_posix(), file.read_bytes())
    lora = ()
    rows = [{"prompt_id": name, "prompt": "a red dog", "seed": 1, "num_inference_steps": 2} for name in "ab"]
    if part := WITH_LORAS.get(family):
        lora = (str(save_lora(folder, tmp_path / "style.safetensors", 3, parts=(part,))),)
        rows[1]["lora"] = "none"
    side = SIZES[family]
    result = job(url, rows, side=side, lora=lora, model_cache=str(tmp_path / "cache"))
    assert (result.images, result.images_quarantined) == (2, 0)
    assert_exactly_once(tmp_path / "out", 2)
    found = {
        row["prompt_id"]: pixels(tmp_path / "out", row).astype(int) for row in manifest(tmp_path / "out")
    }
    options = GeneratorOptions(engine="eager", width=side, height=side)
    asked = ImageRequest("b", 0, "a red dog", 1, num_inference_steps=2)
    plain = DiffusersGenerator.load(tiny_pipeline(family), options=options).generate([asked]).images[0]
    assert np.abs(found["b"] - plain.astype(int)).max() <= 1
    assert bool(lora) == (np.abs(found["a"] - found["b"]).max() > 1)
