"""Pixels that are no numbers, and images that were hidden: one row's status, and never its neighbours'."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.diffusion.precision import in_float32, is_narrow, quantised
from millijoule.workers.engines.open import open_engine
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.rungs.precision import SettledPrecision
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.schemas import ImageRequest

EAGER = GeneratorOptions(engine="eager")


def requests(count, family="sd15"):
    side = SIZES[family]
    return [
        ImageRequest(f"p{i}", 0, "a red dog", i, width=side, height=side, num_inference_steps=2)
        for i in range(count)
    ]


@pytest.fixture
def narrow():
    """Stable Diffusion in bfloat16, as on a GPU; the tests break its decoder for one row."""
    loaded = DiffusersGenerator.load(tiny_pipeline("sd15"), options=EAGER).loaded
    loaded.pipeline.to(torch.bfloat16)
    return DiffusersGenerator(loaded, EAGER, open_engine(EAGER, "cpu"))


def spoil(generator, value, when=lambda image: True):
    """The decoder makes `value` of a pixel of row 1 of a batch, or of a single row, where `when` says so."""
    vae = generator.pipeline.vae
    decode = vae.decode

    def spoiled(latents, *args, **kwargs):
        (image,) = decode(latents, *args, **{**kwargs, "return_dict": False})[:1]
        if when(image):
            image[min(1, len(image) - 1), 0, 5, 5] = value
        return (image,)

    vae.decode = spoiled


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_without_numbers_is_drawn_again_in_float32(narrow, value):
    asked = requests(3)
    before = narrow.generate(asked)
    assert before.rejected == (None,) * 3
    weights = {k: v.clone() for k, v in narrow.pipeline.unet.state_dict().items()}
    spoil(narrow, value, when=lambda image: image.dtype == torch.bfloat16)
    drawn = narrow.generate(asked)
    assert drawn.rejected == (None,) * 3
    assert drawn.warnings == ((), ("pixels were not finite numbers, drawn again in float32",), ())
    assert np.array_equal(drawn.images[[0, 2]], before.images[[0, 2]])
    wide = DiffusersGenerator.load(tiny_pipeline("sd15"), options=EAGER)
    for name in ("unet", "text_encoder", "vae"):  # the weights as bfloat16 has them
        getattr(wide.pipeline, name).to(torch.bfloat16).to(torch.float32)
    difference = np.abs(drawn.images[1].astype(int) - wide.generate(asked[1:2]).images[0].astype(int))
    assert difference.max() <= 1
    for name, weight in narrow.pipeline.unet.state_dict().items():  # nothing is left wide
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, weights[name])


def test_a_row_without_numbers_in_float32_either_is_quarantined(narrow, caplog):
    asked = requests(3)
    before = narrow.generate(asked)
    spoil(narrow, float("nan"))
    drawn = narrow.generate(asked)
    assert [r and r.status for r in drawn.rejected] == [None, "quarantined", None]
    assert drawn.rejected[1].reason == "pixels are not finite numbers, not in float32 either"
    assert drawn.rejected[1].may_be_the_device
    assert np.array_equal(drawn.images[[0, 2]], before.images[[0, 2]])
    assert caplog.text.count("drawn again in float32") == 1
    assert "p1" in caplog.text


def test_a_model_in_float32_has_no_second_try(monkeypatch):
    generator = DiffusersGenerator.load(tiny_pipeline("sd15"), options=EAGER)
    spoil(generator, float("nan"))
    calls = []
    draw = generator.call.draw
    monkeypatch.setattr(generator.call, "draw", lambda *a, **k: calls.append(1) or draw(*a, **k))
    drawn = generator.generate(requests(2))
    assert drawn.rejected[0] is None
    assert drawn.rejected[1].reason == "pixels are not finite numbers"
    assert len(calls) == 1


def test_no_memory_for_float32_quarantines_and_says_so(narrow, monkeypatch):
    spoil(narrow, float("nan"))
    draw = narrow.call.draw

    def no_room(*args, float32=False, **kwargs):
        if float32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(*args, **kwargs)

    monkeypatch.setattr(narrow.call, "draw", no_room)
    (rejected,) = narrow.generate(requests(1)).rejected
    assert (
        rejected.reason == "pixels are not finite numbers, and cannot be drawn in float32: CUDA out of memory"
    )


def test_mixed_precision_is_left_for_the_second_try():
    """On a processor that multiplies bfloat16 weights are float32 already; only autocast has to go."""
    loaded = DiffusersGenerator.load(tiny_pipeline("sd15"), options=EAGER).loaded
    loaded.rungs.precision = SettledPrecision(torch.float32, mixed=True)
    mixed = DiffusersGenerator(loaded, EAGER, open_engine(EAGER, "cpu"))
    spoil(mixed, float("nan"), when=lambda image: torch.is_autocast_enabled("cpu"))
    drawn = mixed.generate(requests(2))
    assert drawn.rejected == (None, None)
    assert drawn.warnings[1] == ("pixels were not finite numbers, drawn again in float32",)


def test_a_denoiser_that_a_rung_rounds_is_float32_for_the_second_try():
    rounded = GeneratorOptions(engine="eager", rungs=Rungs(precision="bfloat16"))
    generator = DiffusersGenerator.load(tiny_pipeline("sd15"), options=rounded)
    narrow = [p.dtype for p in generator.pipeline.unet.parameters()]
    assert torch.bfloat16 in narrow
    spoil(generator, float("nan"), when=lambda image: torch.is_autocast_enabled("cpu"))
    drawn = generator.generate(requests(2))
    assert drawn.rejected == (None, None)
    assert [p.dtype for p in generator.pipeline.unet.parameters()] == narrow


@pytest.mark.parametrize("family", ["sd15_safety", "deepfloyd_if"])
def test_an_image_that_is_hidden_is_filtered(family):
    generator = DiffusersGenerator.load(tiny_pipeline(family), options=EAGER)
    asked = requests(3, family)
    before = generator.generate(asked)
    assert before.rejected == (None,) * 3
    if family == "sd15_safety":
        checker = generator.pipeline.safety_checker
        forward = checker.forward

        def hide_second(clip_input, images):
            images, _ = forward(clip_input, images)
            images[1] = 0.0
            return images, [False, True, False]

        checker.forward = hide_second
    else:
        generator.pipeline.run_safety_checker = lambda image, *rest: (
            np.stack([image[0], image[1] * 0, image[2]]),
            [False, True, False],
            [False] * 3,
        )
    drawn = generator.generate(asked)
    assert [r and r.status for r in drawn.rejected] == [None, "filtered", None]
    assert not drawn.rejected[1].may_be_the_device
    assert np.array_equal(drawn.images[[0, 2]], before.images[[0, 2]])


def test_a_black_image_is_said_to_be_black(monkeypatch):
    generator = DiffusersGenerator.load(tiny_pipeline("sd15"), options=EAGER)
    vae = generator.pipeline.vae
    decode = vae.decode
    vae.decode = lambda latents, *a, **k: (decode(latents, *a, **{**k, "return_dict": False})[0] * 0 - 1,)
    assert generator.generate(requests(1)).warnings == (("the image is all black",),)


@pytest.mark.parametrize("family", ["sd15", "sd3", "sana", "z_image", "chroma"])
def test_pixels_are_quantised_as_from_the_arrays_of_the_pipeline(tiny, family, monkeypatch):
    generator = tiny(family)
    asked = requests(2, family)
    ours = generator.generate(asked).images
    monkeypatch.setattr(generator.call, "family", replace(generator.family, tensors=False))
    assert np.array_equal(generator.generate(asked).images, ours)


def test_quantisation_rounds_to_the_nearest_level_and_marks_rows_that_are_no_numbers():
    levels = torch.arange(256, dtype=torch.float32) / 255
    images = levels.reshape(1, 1, 16, 16).repeat(3, 3, 1, 1)
    images[1, 2, 3, 4] = float("nan")
    images[2, 0, 0, 0] = float("-inf")
    for given in (images, images.permute(0, 2, 3, 1).numpy()):
        pixels, finite = quantised(given)
        assert finite.tolist() == [True, False, False]
        assert np.array_equal(pixels[0, :, :, 0].ravel(), np.arange(256))
        assert pixels.dtype == np.uint8
        assert pixels[1, 3, 4, 2] == 0
    for narrow in (torch.float16, torch.bfloat16):
        assert np.array_equal(quantised(torch.ones(1, 3, 2, 2, dtype=narrow))[0], np.full((1, 2, 2, 3), 255))
    with_halves = torch.tensor([0.5, 1.5, 2.5]).reshape(1, 3, 1, 1) / 255
    assert np.array_equal(quantised(with_halves)[0], quantised(with_halves.permute(0, 2, 3, 1).numpy())[0])


def test_weights_are_what_they_were_after_an_error(narrow):
    with pytest.raises(ZeroDivisionError), in_float32(narrow.pipeline):
        is_narrow(narrow.pipeline) or 1 / 0
    assert is_narrow(narrow.pipeline)
    assert narrow.pipeline.unet.dtype == torch.bfloat16
