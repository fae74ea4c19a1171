"""The shipped generator: same pixels at any batch size, prompts obeyed, bad model files refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import describe_model, load_generator, model_path
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, PALETTE
from millijoule.workers.scenes.vocabulary import NOUNS
from millijoule.workers.schemas import ImageRequest

DEFAULT = model_path("default")


@pytest.fixture(scope="module")
def generator():
    return load_generator("default")


def request(prompt: str, seed: int, **more) -> ImageRequest:
    return ImageRequest(f"p{seed}", 0, prompt, seed, **more)


@pytest.fixture(scope="module")
def requests():
    return [
        request(
            f"a {COLOURS[i % 10]} {NOUNS[i * 16]} {('above', 'and', 'left of')[i % 3]} a {COLOURS[(i + 3) % 10]} "
            f"{NOUNS[(i * 37 + 1) % 1040]} on a {BACKGROUNDS[i % 5]} background",
            seed=2**63 + i * 7919,
        )
        for i in range(64)
    ]


def in_batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("size", [1, 7])
def test_images_do_not_depend_on_the_batch(generator, requests, size):
    images = np.concatenate([generator.generate(r).images for r in in_batches(requests, size)])
    assert np.array_equal(images, generator.generate(requests).images)


def test_the_place_in_the_batch_does_not_matter(generator, requests):
    images = generator.generate(requests).images
    assert np.array_equal(generator.generate(requests[::-1]).images[::-1], images)


def test_seeds_make_different_images_and_the_same_seed_the_same(generator):
    images = generator.generate([request("a red heart", s) for s in (1, 2, 1)]).images
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


def test_backgrounds_and_colours_follow_the_prompt(generator):
    """Corner pixels against the palette, and the icon's own colour, over every colour and background."""
    cases = [
        (c, b, n)
        for i, c in enumerate(COLOURS)
        for j, b in enumerate(BACKGROUNDS)
        if c != b
        for n in (NOUNS[(3 * i + 5 * j) % 80], NOUNS[500 + 3 * i + 5 * j])
    ]
    images = generator.generate(
        [request(f"a big {c} {n} on a {b} background", seed=i) for i, (c, b, n) in enumerate(cases)]
    ).images.astype(float)
    names = sorted(set(COLOURS) | set(BACKGROUNDS))
    palette = np.array([PALETTE[n] for n in names], float)
    backgrounds = images[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
    found = np.linalg.norm(backgrounds[:, None] - palette, axis=-1).argmin(1)
    right_background = np.mean([names[f] == b for f, (_, b, _) in zip(found, cases, strict=True)])
    assert right_background > 0.95
    right_colour = 0
    for image, (colour, background, _) in zip(images, cases, strict=True):
        pixels = image[12:52, 12:52].reshape(-1, 3)
        away = np.linalg.norm(pixels - np.array(PALETTE[background], float), axis=1)
        icon = np.median(pixels[away >= np.quantile(away, 0.9)], axis=0)
        others = [n for n in COLOURS if n != background]
        nearest = min(others, key=lambda n: np.linalg.norm(icon - np.array(PALETTE[n], float)))
        right_colour += nearest == colour
    assert right_colour / len(cases) > 0.8  # chance is 1 in 9


def test_words_it_does_not_know_and_options_it_does_not_use_are_reported(generator):
    batch = generator.generate(
        [
            request("a red quux", 0),
            request("a red cat", 1),
            request("a red cat", 2, guidance_scale=7.5, negative_prompt="dog"),
        ]
    )
    assert any("quux" in w for w in batch.warnings[0])
    assert batch.warnings[1] == ()
    assert len(batch.warnings[2]) == 2


def test_more_steps_make_nearly_the_same_image(generator):
    """It approximates a flow: twice the steps is the same picture, only integrated more finely."""
    a = generator.generate([request("a big blue house", 5)]).images.astype(float)
    b = generator.generate([request("a big blue house", 5, num_inference_steps=20)]).images.astype(float)
    assert np.abs(a - b).mean() < 20
    assert not np.array_equal(a, b)


@pytest.mark.parametrize("more", [{"width": 32, "height": 32}, {"num_inference_steps": 1000}])
def test_sizes_and_steps_it_cannot_make_are_refused(generator, more):
    with pytest.raises(InputError, match="this model"):
        generator.generate([request("a red cat", 0, **more)])


def test_what_a_prompt_leaves_open_is_settled_by_the_seed(generator):
    images = generator.generate([request("a star on a white background", s) for s in range(12)]).images
    icon = images[:, 28:36, 28:36].reshape(12, -1, 3).astype(float).mean(1)
    assert icon.std(0).max() > 30  # many colours


def test_operations_do_not_depend_on_the_engine_or_the_batch(generator, requests):
    together = generator.operations_of(requests)
    alone = [generator.operations_of([r]) for r in requests[:9]]
    for part, values in together.items():
        assert [int(a[part][0]) for a in alone] == values[:9].tolist()
    twice = generator.operations_of([replace(r, num_inference_steps=20) for r in requests])
    assert np.array_equal(twice["dynamics"], 2 * together["dynamics"])


def test_the_shipped_weights_are_integers_and_named(generator):
    assert {t.dtype.is_floating_point for t in load_file(DEFAULT).values()} == {False}
    assert generator.info.sha256 == describe_model("default").sha256


def rewrite(path, *, metadata=None, drop=(), change=None):
    with safe_open(DEFAULT, "pt") as file:
        old = file.metadata()
    tensors = {k: v for k, v in load_file(DEFAULT).items() if k not in drop}
    if change:
        change(tensors)
    save_file(tensors, path, {**old, **(metadata or {})})


def wrong_shape(tensors):
    tensors["share.bias"] = torch.zeros(5, dtype=torch.int32)


def floats(tensors):
    tensors["codes"] = tensors["codes"].float()


def huge_config() -> str:
    with safe_open(DEFAULT, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return json.dumps({**config, "width": 10**9})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"metadata": {"format": "other"}}, "not an oscillator model"),
        (
            {"metadata": {"version": "4"}},
            "oscillator format 4, this program reads 5: .*the version that wrote it",
        ),
        ({"metadata": {"config": "{"}}, "damaged"),
        ({"metadata": {"config": huge_config()}}, r"<= 4096` - at `\$\.width`|<= 4096 - at `\$\.width`"),
        ({"drop": ("codes",)}, "codes"),
        ({"drop": ("share.weights",)}, "share.weights"),
        ({"change": floats}, "codes is torch.float32"),
        ({"change": wrong_shape}, r"share.bias is torch.int32 \[5\]"),
    ],
)
def test_bad_models_are_refused_by_name(tmp_path, how, words):
    path = tmp_path / "model.safetensors"
    rewrite(path, **how)
    with pytest.raises(InputError, match=words) as refused:
        OscillatorGenerator.load(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("size", [0, 4, 100, 100_000])
def test_truncated_models_are_refused_by_name(tmp_path, size):
    path = tmp_path / "model.safetensors"
    shutil.copy(DEFAULT, path)
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        OscillatorGenerator.load(path)


def test_a_pickle_is_refused_without_being_opened(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="pickled checkpoint"):
        load_generator(str(path))
