"""What is said to be read of a prompt is read, and what is said to be lost is not: the pipelines themselves are asked."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.schemas import ImageRequest


def request(family, prompt, **fields):
    side = SIZES[family]
    return ImageRequest("p", 0, prompt, 7, width=side, height=side, num_inference_steps=2, **fields)


def draw(generator, family, prompt, **fields):
    return generator.generate([request(family, prompt, **fields)])


#: Words that each family reads, by the documentation of its encoders: 77 tokens of CLIP hold 75 words, 300 of T5 hold 299.
READ = {
    "sd15": 75,
    "sdxl": 75,
    "lcm": 75,
    "kandinsky22": 75,
    "deepfloyd_if": 76,
    "hunyuan_dit": 255,
    "sd3": 255,
    "aura_flow": 255,
    "pixart_sigma": 299,
    "sana": 299,
    "flux": 511,
    "chroma": 511,
    "qwen_image": 512,
}


@pytest.mark.long
@pytest.mark.parametrize("family", READ)
def test_the_words_that_are_said_to_be_lost_are_those_that_change_nothing(tiny, family):
    generator, read = tiny(family), READ[family]
    words = ["apple", "moon", "big"] * 200
    long = draw(generator, family, " ".join(words[: read + 3]))
    assert f"lost are {' '.join(words[read : read + 3])!r}" in long.warnings[0][-1]
    other_tail = [*words[:read], "dog", "red", "tree"]
    assert np.array_equal(draw(generator, family, " ".join(other_tail)).images, long.images)
    fits = draw(generator, family, " ".join(words[:read]))
    assert not any("lost" in warning for warning in fits.warnings[0])
    last = [*words[: read - 1], "heart"]
    if family not in (
        "aura_flow",
        "flux",
        "chroma",
        "hunyuan_dit",
    ):  # one of hundreds of words says next to nothing there
        assert not np.array_equal(draw(generator, family, " ".join(last)).images, fits.images)


def test_encoders_that_read_less_than_others_are_named(tiny):
    words = ["apple"] * 74 + ["moon", "dog", "cat"]
    (warning,) = tiny("flux").reader.warnings(" ".join(words))
    assert warning == (
        "text_encoder read the first 77 tokens of the prompt, text_encoder_2 the whole: not read by all are 'dog cat'"
    )
    (warning,) = tiny("sd3").reader.warnings(" ".join(words))
    assert warning.startswith(
        "text_encoder and text_encoder_2 read the first 77 tokens of the prompt, text_encoder_3"
    )
    assert tiny("sd3").reader.lost(" ".join(words)) == ""
    assert tiny("flux").reader.warnings(" ".join(words[:75])) == ()


def test_lost_words_are_as_they_were_written_and_not_endless(tiny):
    reader = tiny("sd15").reader
    assert (
        reader.lost("apple " * 75 + "Ünïcode, <b>DOG</b>  and  \U0001f431!")
        == "Ünïcode, <b>DOG</b>  and  \U0001f431!"
    )
    (warning,) = reader.warnings("apple " * 75 + "x" * 5000)
    assert len(warning) < 1200
    assert reader.warnings("") == ()


def test_a_long_negative_prompt_is_named_too(tiny):
    drawn = draw(tiny("sd15"), "sd15", "a dog", negative_prompt="ugly " * 75 + "blurry")
    assert "the negative prompt is 78 tokens long" in drawn.warnings[0][0]
    assert drawn.warnings[0][0].endswith("lost are 'blurry'")


def test_long_prompts_can_be_rejected(tiny):
    generator = tiny("sd15", "reject")
    asked = [
        request("sd15", "a red dog"),
        request("sd15", "apple " * 75 + "a dog"),
        request("sd15", "a blue cat"),
    ]
    drawn = generator.generate(asked)
    assert [r is None for r in drawn.rejected] == [True, False, True]
    assert drawn.rejected[1].status == "quarantined"
    assert drawn.rejected[1].certain
    assert "lost are 'a dog'" in drawn.rejected[1].reason
    plain = tiny("sd15").generate([asked[0], asked[2]]).images
    assert np.array_equal(drawn.images[[0, 2]], plain)
    flux = tiny("flux", "reject")
    assert draw(flux, "flux", "apple " * 100).rejected == (None,)  # T5 reads all of it


@pytest.mark.parametrize("family", ["sd15", "sdxl", "lcm"])
def test_long_prompts_can_be_read_in_chunks(tiny, family):
    generator, plain = tiny(family, "chunk"), tiny(family)
    short = request(family, "a red dog", negative_prompt=None if family == "lcm" else "ugly")
    assert np.array_equal(generator.generate([short]).images, plain.generate([short]).images)
    words = ["apple", "moon", "big"] * 100
    long = replace(short, prompt=" ".join(words[:78]))
    drawn = generator.generate([long])
    assert drawn.warnings == ((),)
    other_tail = replace(short, prompt=" ".join([*words[:77], "dog"]))
    assert not np.array_equal(generator.generate([other_tail]).images, drawn.images)
    mixed = generator.generate([short, long, replace(long, prompt=" ".join(words[:160]))])
    for image, alone in zip(mixed.images, (short, long), strict=False):
        difference = np.abs(image.astype(int) - generator.generate([alone]).images[0].astype(int))
        assert difference.max() <= 1


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_chunk_is_what_the_pipeline_reads_itself(tiny, family):
    """The encoding in pieces against diffusers' own, where both can be had."""
    from millijoule.workers.diffusion.prompt_chunks import encode_chunks

    pipeline = tiny(family).pipeline
    prompts, negatives = ["a red dog", "apple " * 75], ["ugly", ""]
    ours = encode_chunks(pipeline, prompts, negatives, 1, True)
    theirs = pipeline.encode_prompt(
        prompts,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negatives,
    )
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    assert [n for n in names if n in ours] == list(names[: len(theirs)])
    for name, expected in zip(names, theirs, strict=False):
        assert np.allclose(ours[name].detach(), expected.detach(), atol=1e-5), name


def test_chunks_are_refused_by_name_where_a_pipeline_does_not_read_them():
    chunk = GeneratorOptions(long_prompts="chunk")
    message = (
        r"--long-prompts chunk: FluxPipeline does not read prompts in chunks .*StableDiffusionXLPipeline"
    )
    with pytest.raises(InputError, match=message):
        describe_model(str(tiny_pipeline("flux")), chunk)  # what the driver asks before the job
    with pytest.raises(InputError, match="--long-prompts: default is not a diffusion pipeline"):
        describe_model("default", chunk)
    assert describe_model(str(tiny_pipeline("sd15")), chunk) == describe_model(str(tiny_pipeline("sd15")))


def test_the_libraries_say_nothing_themselves(capfd, caplog):
    """Not at load, and not for every long prompt; nor is the user's own logging changed."""
    import diffusers
    import transformers

    folder = tiny_pipeline("deepfloyd_if")
    capfd.readouterr()  # making it says something
    caplog.clear()
    before = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    with caplog.at_level(logging.DEBUG):
        generator = load_generator(str(folder), options=GeneratorOptions(engine="eager"))
        drawn = draw(generator, "deepfloyd_if", "apple " * 100)
    out, err = capfd.readouterr()
    assert out + err == ""
    assert [r for r in caplog.records if r.name.startswith(("diffusers", "transformers"))] == []
    assert len(drawn.warnings[0]) == 1
    assert before == (diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity())
    assert isinstance(generator, DiffusersGenerator)
