"""LoRAs: seen in the image, chosen by row, and gone without a trace when a row wants none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_loras import save_lora
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.diffusion.pipeline_folder import read_pipeline
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.loras.files import check_lora
from millijoule.workers.loras.switch import LoraSwitch
from millijoule.workers.loras.words import lora_name, mix_of, read_cell, split_option
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.sources.obtain import obtain_model

pytest.importorskip("peft")

ASKED = ImageRequest("p", 0, "a red cat", 1, num_inference_steps=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loras")
    return {
        "paint": save_lora(
            tiny_pipeline("sd15"), folder / "paint.safetensors", 1, parts=("unet", "text_encoder")
        ),
        "ink": save_lora(tiny_pipeline("sd15"), folder / "ink.safetensors", 2),
    }


def options(files, *words):
    choices = []
    for word in words:
        name, _, weight = word.partition("=")
        choices.append(LoraChoice(str(files[name]), float(weight or 1)))
    return obtain_model(str(tiny_pipeline("sd15")), GeneratorOptions(loras=tuple(choices))).options


@pytest.fixture(scope="module")
def plain():
    return load_generator(str(tiny_pipeline("sd15")))


@pytest.fixture(scope="module")
def both(files):
    return load_generator(str(tiny_pipeline("sd15")), options=options(files, "paint", "ink=0.5"))


def draw(generator, lora=None):
    return generator.generate([replace(ASKED, lora=lora)]).images[0]


def test_each_row_is_drawn_with_its_own_and_none_leaves_no_trace(plain, both, files):
    mixes = [None, "none", "paint=1.0", "ink=0.5", "paint=0.25", "paint=1.0+ink=0.5"]
    images = {mix: draw(both, mix) for mix in mixes}
    assert np.array_equal(images["none"], draw(plain))
    assert np.array_equal(images[None], images["paint=1.0+ink=0.5"])
    assert len({images[mix].tobytes() for mix in mixes[1:]}) == 5
    for mix in reversed(mixes):
        assert np.array_equal(draw(both, mix), images[mix]), mix
    alone = load_generator(str(tiny_pipeline("sd15")), options=options(files, "ink=0.5"))
    assert np.array_equal(draw(alone), images["ink=0.5"])


def test_weights_after_a_b_a_are_the_bits_they_were(both):
    def bits():
        return {
            name: weight.detach().clone()
            for part in ("unet", "text_encoder")
            for name, weight in getattr(both.pipeline, part).state_dict().items()
        }

    draw(both, "paint=1.0")
    before = bits()
    for mix in ("ink=0.5", "none", "paint=0.3+ink=-2.0", "paint=1.0"):
        draw(both, mix)
    after = bits()
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_files_are_loaded_once_and_rows_are_grouped(files):
    generator = load_generator(str(tiny_pipeline("sd15")), options=options(files, "paint", "ink"))
    assert (generator.loras.loads, generator.loras.switches) == (2, 1)
    rows = [replace(ASKED, seed=i, lora=("paint=1.0", "ink=1.0")[i % 2]) for i in range(6)]
    images = generator.generate(rows).images
    assert (generator.loras.loads, generator.loras.switches) == (2, 3)
    alone = [generator.generate([row]).images[0].astype(int) for row in rows]
    apart = [[np.abs(one - image.astype(int)).mean() for one in alone] for image in images]
    assert [int(np.argmin(row)) for row in apart] == list(range(6))
    assert max(row[i] for i, row in enumerate(apart)) < 3  # rounding in a batch of another size


def test_what_does_not_fit_on_the_device_is_loaded_again_to_the_same_bits(files, both):
    generator = load_generator(str(tiny_pipeline("sd15")))
    generator.loras = LoraSwitch(generator.pipeline, options(files, "paint", "ink=0.5").loras, max_resident=1)
    loads = generator.loras.loads
    for mix in ("paint=1.0", "ink=0.5", "paint=1.0"):
        assert np.array_equal(draw(generator, mix), draw(both, mix)), mix
    assert generator.loras.loads == loads + 2  # the first was there


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_take_them_too(family, tmp_path):
    folder = tiny_pipeline(family)
    part = "unet" if family == "sdxl" else "transformer"
    file = save_lora(folder, tmp_path / "style.safetensors", 3, parts=(part,))
    got = obtain_model(str(folder), GeneratorOptions(loras=(LoraChoice(str(file)),)))
    generator = load_generator(got.model, options=got.options)
    asked = replace(ASKED, width=64, height=64)
    with_it, without = (generator.generate([replace(asked, lora=m)]).images for m in (None, "none"))
    assert not np.array_equal(with_it, without)
    assert np.array_equal(without, load_generator(str(folder)).generate([asked]).images)


def test_a_lora_of_another_model_is_refused_before_the_job(files, tmp_path):
    wide = save_lora(tiny_pipeline("sdxl"), tmp_path / "wide.safetensors", 1)
    with pytest.raises(
        InputError,
        match=r"wide\.safetensors: was made for another model than this StableDiffusionPipeline: .* reads 64",
    ):
        obtain_model(str(tiny_pipeline("sd15")), GeneratorOptions(loras=(LoraChoice(str(wide)),)))


def test_one_that_matches_no_layer_is_refused_by_name(files, tmp_path):
    renamed = {n.replace("down_blocks", "sideways"): t for n, t in load_file(files["ink"]).items()}
    renamed = {
        n.replace("up_blocks", "sideways").replace("mid_block", "sideways"): t for n, t in renamed.items()
    }
    save_file(renamed, tmp_path / "odd.safetensors")
    with pytest.raises(InputError, match=r"odd\.safetensors: .*StableDiffusionPipeline"):
        load_generator(
            str(tiny_pipeline("sd15")),
            options=GeneratorOptions(loras=(LoraChoice(str(tmp_path / "odd.safetensors"), name="odd"),)),
        )


def test_files_that_are_no_lora_are_refused(tmp_path):
    folder = read_pipeline(tiny_pipeline("sd15"))
    weights = tiny_pipeline("sd15") / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match="no LoRA"):
        check_lora(weights, folder)
    save_file({"lora_unet_x.hada_w1_a": torch.zeros(2, 2)}, tmp_path / "loha.safetensors")
    with pytest.raises(InputError, match="another kind of adapter"):
        check_lora(tmp_path / "loha.safetensors", folder)


def test_only_diffusion_pipelines_take_one(files):
    with pytest.raises(InputError, match="--lora: default is not a diffusion pipeline"):
        obtain_model("default", GeneratorOptions(loras=(LoraChoice(str(files["ink"])),)))


def test_two_of_one_name_are_refused(files, tmp_path):
    other = tmp_path / "ink.safetensors"
    other.write_bytes(files["ink"].read_bytes())
    choices = (LoraChoice(str(files["ink"])), LoraChoice(str(other)))
    with pytest.raises(InputError, match=r"two are called 'ink'"):
        obtain_model(str(tiny_pipeline("sd15")), GeneratorOptions(loras=choices))


def test_the_identity_is_of_content_weight_and_name_and_not_of_the_place(files, tmp_path):
    moved = tmp_path / "ink.safetensors"
    moved.write_bytes(files["ink"].read_bytes())
    here = options(files, "ink=0.5").identity()
    there = obtain_model(
        str(tiny_pipeline("sd15")), GeneratorOptions(loras=(LoraChoice(str(moved), 0.5),))
    ).options.identity()
    assert here == there
    assert here != options(files, "ink").identity() != options(files, "paint").identity()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors=0.8", ("a.safetensors", 0.8)),
        ("dir/x=y/a.safetensors", ("dir/x=y/a.safetensors", 1.0)),
        ("s3://b/lang=de/a.safetensors=-1", ("s3://b/lang=de/a.safetensors", -1.0)),
        ("folder=2=1", ("folder=2", 1.0)),
        ("a=nan", ("a=nan", 1.0)),
    ],
)
def test_an_option_is_a_path_and_a_weight(text, parts):
    assert split_option(text) == parts


def test_names_are_what_a_cell_can_say():
    assert lora_name("/x/y/style v2+.safetensors") == "style_v2"
    assert lora_name("s3://bucket/loras/ink/") == "ink"
    assert lora_name("someone/paint-lora") == "paint-lora"


DECLARED = {"paint": 1.0, "ink": 0.5}


@pytest.mark.parametrize(
    ("cell", "means"),
    [
        ("", None),
        ("  ", None),
        ("none", {}),
        ("None", {}),
        ("paint", {"paint": 1.0}),
        ("ink", {"ink": 0.5}),
        ("ink=2", {"ink": 2.0}),
        ("ink=0.25 + paint", {"paint": 1.0, "ink": 0.25}),
    ],
)
def test_cells_are_read_to_one_form(cell, means):
    canonical = read_cell(cell, DECLARED)
    assert mix_of(canonical, DECLARED) == (DECLARED if means is None else means)
    assert read_cell(canonical or "", DECLARED) == canonical


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("pant", r"no LoRA 'pant' was declared; did you mean 'paint'\?"),
        ("../../etc/passwd", "no LoRA '../../etc/passwd' was declared"),
        ("paint=much", "'much' is not a weight"),
        ("paint=inf", "'inf' is not a weight"),
        ("paint+paint=2", "names 'paint' twice"),
        ("paint+", "no LoRA '' was declared"),
    ],
)
def test_cells_that_mean_nothing_are_said(cell, message):
    with pytest.raises(ValueError, match=message):
        read_cell(cell, DECLARED)
