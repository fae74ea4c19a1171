"""What a family calls things: each option of a row changes its image, or is said not to."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.tiny_pipelines import SIZES, change_json, tiny_pipeline

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.schemas import ImageRequest

EAGER = GeneratorOptions(engine="eager")
FAMILIES = [
    *("sd15", "sdxl", "sd3", "flux", "flux_schnell", "qwen_image", "z_image", "lcm"),
    *(
        pytest.param(family, marks=pytest.mark.long)
        for family in (
            "pixart_sigma",
            "sana",
            "chroma",
            "kandinsky22",
            "deepfloyd_if",
            "hunyuan_dit",
            "lumina2",
        )
    ),
]

#: What a family does not do.
UNUSED = {("lcm", "negative_prompt")}


def request(family, **fields):
    side = SIZES[family]
    plain = ImageRequest("p", 0, "a blue cat on the moon", 7, width=side, height=side, num_inference_steps=2)
    return replace(plain, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_option_changes_the_image_or_is_reported(tiny, family):
    generator = tiny(family)
    base = request(family, guidance_scale=4.0, negative_prompt="a very ugly old dog")
    image = generator.generate([base]).images[0]
    for field, value in (
        ("guidance_scale", 9.0),
        ("negative_prompt", "a small green tree"),
        ("num_inference_steps", 3),
        ("seed", 8),
        ("prompt", "a red dog"),
    ):
        drawn = generator.generate([replace(base, **{field: value})])
        reported = f"{field} is not used by this model" in drawn.warnings[0]
        assert reported == ((family, field) in UNUSED), (field, drawn.warnings)
        assert np.array_equal(drawn.images[0], image) == reported, field


def test_guidance_that_needs_a_negative_prompt_gets_an_empty_one(tiny):
    generator = tiny("qwen_image")
    plain = generator.generate([request("qwen_image")]).images
    guided = generator.generate([request("qwen_image", guidance_scale=3.0)])
    assert not np.array_equal(guided.images, plain)
    assert guided.warnings == ((),)
    unguided = generator.generate([request("qwen_image", guidance_scale=1.0)])
    assert np.array_equal(unguided.images, plain)  # the pipeline guides only away from something


def test_options_without_effect_are_said(tiny):
    said = tiny("sd15").generate([request("sd15", guidance_scale=1.0, negative_prompt="ugly")]).warnings
    assert said == (("negative_prompt has no effect at guidance_scale 1",),)
    said = (
        tiny("qwen_image")
        .generate([request("qwen_image", guidance_scale=1.0, negative_prompt="ugly")])
        .warnings
    )
    assert said == (("negative_prompt has no effect at guidance_scale 1",),)
    assert tiny("sd15").generate([request("sd15", negative_prompt="")]).warnings == ((),)


#: Native width and height, and of what sides have to be a multiple, in pixels: eight pixels per latent, two latents per token.
NATIVE = {
    "sd15": (64, 8),
    "sdxl": (64, 8),
    "sd3": (64, 16),
    "flux": (1024, 16),
    "qwen_image": (1024, 16),
    "z_image": (1024, 16),
    "kandinsky22": (64, 4),
    "deepfloyd_if": (32, 2),
    "sana": (64, 32),
    "lumina2": (64, 16),
}


@pytest.mark.parametrize("family", NATIVE)
def test_native_sizes_and_those_that_are_refused(tiny, family):
    generator, (side, multiple) = tiny(family), NATIVE[family]
    assert (generator.info.width, generator.info.height) == (side, side)
    wide = replace(request(family), width=2 * SIZES[family])
    assert generator.generate([wide]).images.shape == (1, SIZES[family], 2 * SIZES[family], 3)
    with pytest.raises(RowError, match=f"multiples of {multiple}$"):
        generator.generate([replace(wide, width=SIZES[family] + multiple // 2)])
    smallest = replace(wide, width=SIZES[family] + multiple)
    assert generator.generate([smallest]).images.shape == (1, SIZES[family], SIZES[family] + multiple, 3)


def test_published_sizes_are_drawn_at_where_a_model_has_them(tmp_path):
    """SANA for 1024 pixels draws at the nearest of its sizes and scales to what is asked, as its pipeline does by itself."""
    folder = shutil.copytree(tiny_pipeline("sana"), tmp_path / "sana")
    change_json(folder / "transformer/config.json", sample_size=32)
    binned = DiffusersGenerator.load(folder, options=EAGER).family
    assert "use_resolution_binning" not in binned.constants
    plain = DiffusersGenerator.load(tiny_pipeline("sana"), options=EAGER).family
    assert plain.constants["use_resolution_binning"] is False


def test_sd3_without_its_t5_is_loaded(tmp_path):
    folder = shutil.copytree(tiny_pipeline("sd3"), tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    index = json.loads((folder / "model_index.json").read_text())
    left_out = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | left_out))
    generator = DiffusersGenerator.load(folder, options=EAGER)
    drawn = generator.generate([request("sd3", prompt="apple " * 76)])
    assert drawn.images.std() > 0
    assert drawn.warnings[0][0].endswith("lost are 'apple'")  # nothing reads on


@pytest.mark.long
def test_wuerstchens_networks_are_found_in_its_own_folder_of_diffusers(tmp_path):
    import diffusers

    index = json.loads((tiny_pipeline("wuerstchen") / "model_index.json").read_text())
    assert index["decoder"] == ["diffusers", "WuerstchenDiffNeXt"]
    generator = DiffusersGenerator.load(tiny_pipeline("wuerstchen"), options=EAGER)
    assert type(generator.pipeline.decoder).__name__ == "WuerstchenDiffNeXt"
    assert (generator.family.guidance_argument, generator.info.width) == ("prior_guidance_scale", 512)
    # as published, by the name of that folder
    folder = shutil.copytree(tiny_pipeline("wuerstchen"), tmp_path / "wuerstchen")
    change_json(folder / "model_index.json", decoder=["wuerstchen", "WuerstchenDiffNeXt"])
    assert type(DiffusersGenerator.load(folder, options=EAGER).pipeline.vqgan).__name__ == "PaellaVQModel"
    assert not hasattr(diffusers, "WuerstchenDiffNeXt")  # nothing is left in the library
    change_json(folder / "model_index.json", decoder=["wuerstchen", "NoSuchNet"])
    with pytest.raises(InputError, match=r"model_index\.json: decoder is of wuerstchen"):
        DiffusersGenerator.load(folder, options=EAGER)
    assert drawn_once(generator)


def drawn_once(generator):
    return generator.generate([request("wuerstchen")]).images.std() > 0


def test_kandinsky_is_guided_away_from_negative_prompts_in_any_batch(tiny):
    generator = tiny("kandinsky22")
    asked = [
        request("kandinsky22", seed=i, negative_prompt=n) for i, n in enumerate(("ugly", "an old dog", ""))
    ]
    together = generator.generate(asked).images
    for image, r in zip(together, asked, strict=True):
        assert np.abs(generator.generate([r]).images[0].astype(int) - image.astype(int)).max() <= 1
        assert not np.array_equal(generator.generate([replace(r, negative_prompt=None)]).images[0], image)


def test_a_job_may_have_a_size_of_its_own():
    sized = DiffusersGenerator.load(tiny_pipeline("flux"), options=replace(EAGER, width=64, height=32))
    assert (sized.info.width, sized.info.height) == (64, 32)
    asked = [ImageRequest("p", 0, "a dog", 1, num_inference_steps=1)]
    assert sized.generate(asked).images.shape == (1, 32, 64, 3)
    with pytest.raises(
        InputError, match="--width 60 --height 32: this model needs sides that are multiples of 16"
    ):
        DiffusersGenerator.load(tiny_pipeline("flux"), options=replace(EAGER, width=60, height=32))
    assert replace(EAGER, width=64).identity()["width"] == 64
    assert "width" not in EAGER.identity()
