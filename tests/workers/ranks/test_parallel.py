"""Two ranks draw what one draws, and each holds its share of the weights."""

import copy
import functools

import numpy as np
import pytest
from support.tiny_pipelines import SIZES, tiny_pipeline

from millijoule.workers.diffusion.families import LEVELS, PIXELS
from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.diffusion.loading import DENOISERS
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.ranks import parallel
from millijoule.workers.schemas import ImageRequest

#: Those of the most different blocks; the others take seconds all together.
FAMILIES = ["sd15", "sdxl", "sd3", "flux"]
MORE = ["qwen_image", "pixart_sigma", "chroma", "hunyuan_dit", "aura_flow", "z_image", "lcm"]
ALL = [*FAMILIES, *(pytest.param(family, marks=pytest.mark.long) for family in MORE)]
PROMPTS = ("a red dog", "a blue cat on the moon and a house with a tree", "the moon")


def load(family, ranks=1):
    return DiffusersGenerator.load(
        tiny_pipeline(family), options=GeneratorOptions(engine="eager", ranks=ranks)
    )


@functools.cache
def of_one(family):
    return load(family)


def denoiser(generator):
    return next(m for name in DENOISERS if (m := getattr(generator.pipeline, name, None)) is not None)


def weight_bytes(module):
    return sum(p.untyped_storage().nbytes() for p in module.parameters())


def requests(family, **fields):
    side = SIZES[family]
    return [
        ImageRequest("p", i, text, seed=i, width=side, height=side, num_inference_steps=2, **fields)
        for i, text in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("family", ALL)
def test_two_ranks_draw_what_one_draws(forked_ranks, family):
    asked = requests(family, guidance_scale=3.0)
    expected = of_one(family).generate(asked).images
    spread = load(family, ranks=2)
    try:
        together = spread.generate(asked).images
        alone = np.concatenate([spread.generate(asked[:1]).images, spread.generate(asked[1:]).images])
        held = weight_bytes(denoiser(spread))
    finally:
        spread.close()
    for drawn in (together, alone):
        difference = np.abs(drawn.astype(int) - expected)
        assert difference.max() <= LEVELS
        assert (difference > 0).mean() <= PIXELS
    assert np.abs(expected[0].astype(int) - expected[1]).max() > LEVELS  # else the test could not fail
    assert held < weight_bytes(denoiser(of_one(family)))


@pytest.mark.parametrize("family", [*FAMILIES, "aura_flow"])
def test_what_the_ranks_hold_together_is_every_weight_once_and_the_rest_twice(family):
    whole = denoiser(of_one(family))
    before = {name: p.numel() for name, p in whole.named_parameters()}
    parts = []
    for rank in range(2):
        part = copy.deepcopy(whole)
        said = parallel.spread_module(part, rank, 2)
        after = dict(part.named_parameters())
        assert after.keys() == before.keys()
        for name, p in after.items():
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name  # no view of the whole
            assert p.numel() in (before[name], before[name] // 2)
        assert said.all == sum(before.values())
        assert said.spread + said.whole == sum(p.numel() for p in after.values())
        parts.append(after)
    cut = {name for name in before if parts[0][name].numel() < before[name]}
    attention = {
        n for n in before if n.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }
    assert attention
    assert attention <= cut
    values = dict(whole.named_parameters())
    for name in cut:
        both = np.sort(np.concatenate([part[name].detach().numpy().ravel() for part in parts]))
        assert np.array_equal(both, np.sort(values[name].detach().numpy().ravel())), name
