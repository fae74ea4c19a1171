"""The shipped generator: same bits at any batch size, prompts obeyed, bad model files refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from millijoule.workers.errors import InputError
from millijoule.workers.generators.oscillator import BLENDING_OPERATIONS, OscillatorGenerator
from millijoule.workers.generators.oscillator_model import OscillatorConfig, noise_size, start_phases
from millijoule.workers.generators.registry import describe_model, load_generator, model_path
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    COLOURS,
    PALETTE,
    WINDOWS,
    complete,
    icons,
    scene_tokens,
)
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
            f"a {COLOURS[i % 10]} {NOUNS[i % 80]} {('above', 'and', 'left of')[i % 3]} a {COLOURS[(i + 3) % 10]} "
            f"{NOUNS[(i * 5 + 1) % 80]} on a {BACKGROUNDS[i % 5]} background",
            seed=2**63 + i * 7919,
        )
        for i in range(64)
    ]


def in_batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 7])
def test_phases_and_images_do_not_depend_on_the_batch(generator, requests, size):
    tokens = scene_tokens([complete(parse_prompt(r.prompt)[0], r.seed) for r in requests])
    whole = generator.relax(tokens, requests)
    parts = [
        generator.relax(t, r)
        for t, r in zip(in_batches(tokens, size), in_batches(requests, size), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    images = np.concatenate([generator.generate(r).images for r in in_batches(requests, size)])
    assert np.array_equal(images, generator.generate(requests).images)


def test_the_place_in_the_batch_does_not_matter(generator, requests):
    images = generator.generate(requests).images
    assert np.array_equal(generator.generate(requests[::-1]).images[::-1], images)


def test_seeds_make_different_images_and_the_same_seed_the_same(generator):
    images = generator.generate([request("a red heart", s) for s in (1, 2, 1)]).images
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


def test_noise_belongs_to_the_image_and_to_each_icon():
    config = OscillatorConfig()
    prompts = ["a cat above a dog", "four cats", "a large cat", "a blank picture"]
    scenes = [complete(parse_prompt(p)[0], 1) for p in prompts]
    tokens = torch.from_numpy(scene_tokens(scenes))
    noise = torch.arange(1, 1 + noise_size(config)).repeat(len(scenes), 1)  # every phase another number
    phases = start_phases(noise, tokens, config).view(len(scenes), config.cells, config.channels)
    half = config.noise_channels // 2
    assert not phases[:, :, config.noise_channels :].any()
    assert (phases[:, :, :half] == noise[:, None, :half]).all()  # alike in the whole image
    for scene, of_cells in zip(scenes, phases[:, :, half : config.noise_channels], strict=True):
        expected = torch.zeros(8, 8, half, dtype=torch.int64) + noise[0, half : config.noise_channels]
        for k, icon in enumerate(icons(scene)):
            left, top, side = WINDOWS[icon.window]
            first = (1 + k) * config.noise_channels + half
            expected[top : top + side, left : left + side] = noise[0, first : first + half]
        assert torch.equal(of_cells, expected.view(64, half))


def test_backgrounds_and_colours_follow_the_prompt(generator):
    """Corner pixels against the palette, and the icon's own colour, over every colour and background."""
    cases = [
        (c, b, n)
        for i, c in enumerate(COLOURS)
        for j, b in enumerate(BACKGROUNDS)
        if c != b
        for n in (NOUNS[(3 * i + 5 * j) % 80], NOUNS[(3 * i + 5 * j + 37) % 80])
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
            request("a red zebra", 0),
            request("a red cat", 1),
            request("a red cat", 2, guidance_scale=7.5, negative_prompt="dog"),
        ]
    )
    assert any("zebra" in w for w in batch.warnings[0])
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


def test_operations_are_those_of_the_layers(generator):
    """Against a plain count of every convolution and product, from the shapes they are called with."""
    counted = generator.count_operations()
    macs = 0

    def add(layer, inputs, output):
        nonlocal macs
        if isinstance(layer, torch.nn.ConvTranspose2d):
            macs += inputs[0][0].numel() * layer.weight[0].numel()
        else:
            macs += output[0, 0].numel() * layer.weight.numel()

    layers = [m for m in generator.model.decoder.modules() if hasattr(m, "weight")]
    hooks = [m.register_forward_hook(add) for m in layers]
    try:
        generator.generate([request("a red cat", 0)])
    finally:
        for hook in hooks:
            hook.remove()
    assert counted["decoder"] == 2 * macs + BLENDING_OPERATIONS * 64 * 64
    n, c, r = 2048, generator.config.channels, generator.config.rank
    assert generator.config.oscillators == n
    products = 10 * 2 * 2 * n * (5 * c + 2 * r)  # 10 steps, sine and cosine
    assert products < counted["dynamics"] < 1.1 * products
    assert sum(counted.values()) <= 0.5e9
    assert generator.count_operations(20)["dynamics"] == 2 * counted["dynamics"]


def test_the_shipped_weights_are_small_integers_and_named(generator):
    assert DEFAULT.stat().st_size <= 10 * 2**20
    assert load_file(DEFAULT)["coupling.local"].dtype == torch.int8
    assert generator.info.sha256 == describe_model("default").sha256


def rewrite(path, *, metadata=None, drop=(), change=None):
    with safe_open(DEFAULT, "pt") as file:
        old = file.metadata()
    tensors = {k: v for k, v in load_file(DEFAULT).items() if k not in drop}
    if change:
        change(tensors)
    save_file(tensors, path, {**old, **(metadata or {})})


def nan(tensors):
    tensors["decoder.output.bias"] = torch.full_like(tensors["decoder.output.bias"], float("nan"))


def wrong_shape(tensors):
    tensors["decoder.output.bias"] = torch.zeros(5)


def huge_config() -> str:
    with safe_open(DEFAULT, "pt") as file:
        config = json.loads(file.metadata()["config"])
    return json.dumps({**config, "grid": 10**9})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"metadata": {"format": "other"}}, "not an oscillator model"),
        ({"metadata": {"version": "99"}}, "format 99"),
        ({"metadata": {"config": "{"}}, "damaged"),
        ({"metadata": {"config": huge_config()}}, r"<= 4096` - at `\$\.grid`|<= 4096 - at `\$\.grid`"),
        ({"drop": ("coupling.gather",)}, "no coupling.gather of shape"),
        ({"metadata": {"arithmetic": "analog"}}, "damaged"),
        ({"drop": ("decoder.output.bias",)}, "decoder.output.bias"),
        ({"change": nan}, "not finite"),
        ({"change": wrong_shape}, "size mismatch for decoder.output.bias"),
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
