"""The packaged models, uncoupled and coupled: their size, what it draws, what that takes, and the same pixels wherever this runs."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from millijoule.jobs.recipe import load_recipe
from millijoule.kernels import int8_product, native_library
from millijoule.workers.generators.registry import PACKAGED, load_generator
from millijoule.workers.judging.quality import judge
from millijoule.workers.judging.verifier import WEIGHTS_OF_ALL, Verifier
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.oscillators.model_file import load_model
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.scenes import FAMILIES, sample_scene
from millijoule.workers.scenes.vocabulary import NOUNS
from millijoule.workers.schemas import ImageRequest

RESULTS = Path(__file__).parents[3] / "benchmarks" / "quality"

#: SHA-256 of the pixels of the first 30 of `asked`, in turn.
PIXELS = {
    "default": "2a1fb9dc5cfcbd92929a16906718641e5354c653870ceef238c8d4096c024f59",
    "coupled": "95b8691911534daa2b2766c6a3af5dad9f40b971d10024310b20d6c2d5bfed19",
}

#: Bytes of all but codes and ink.
SHARED_BYTES = {"default": 512 * 1024, "coupled": 550 * 1024}


@pytest.fixture(scope="module", params=["default", "coupled"])
def model(request):
    return request.param


@pytest.fixture(scope="module")
def generator(model):
    return load_generator(model)


@pytest.fixture(scope="module")
def asked():
    """Scenes, families and requests: held-out prompts of all families over the whole vocabulary."""
    rng = np.random.default_rng(11)
    families = [FAMILIES[i % len(FAMILIES)] for i in range(120)]
    scenes = [sample_scene(family, rng, held_out=True, nouns=len(NOUNS)) for family in families]
    requests = [ImageRequest(str(i), 0, write_prompt(s, rng), seed=i) for i, s in enumerate(scenes)]
    return scenes, families, requests


def test_the_file_is_small(model):
    file = PACKAGED[model]
    tensors = load_file(file)
    of_nouns = sum(tensors[name].nbytes for name in ("codes", "ink"))
    assert of_nouns / len(NOUNS) <= 128
    assert file.stat().st_size - of_nouns <= SHARED_BYTES[model]
    assert file.stat().st_size <= 750_000
    assert not [
        t.shape for name, t in tensors.items() if len(NOUNS) in t.shape and name not in ("codes", "ink")
    ]


@pytest.mark.parametrize(("packaged", "recipe"), [("default", "icons"), ("coupled", "coupled")])
def test_a_recipe_is_what_made_the_weights(packaged, recipe):
    with safe_open(PACKAGED[packaged], "np") as opened:
        metadata = opened.metadata()
    training = load_recipe(recipe, {}).training
    assert metadata["steps"] == str(training.steps)
    assert metadata["seed"] == str(training.seed)
    assert json.loads(metadata["config"]) == asdict(training.model)
    log = (RESULTS.parent / "training" / f"{packaged}.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == training.steps


def test_all_nouns_are_drawn_so_that_the_verifier_reads_them(generator, asked):
    scenes, families, requests = asked
    drawn = generator.generate(requests)
    assert {w for told in drawn.warnings for w in told} == set()
    readings = Verifier.load(WEIGHTS_OF_ALL).read(drawn.images)
    right = [judge(*one).correct for one in zip(scenes, families, readings, strict=True)]
    assert sum(right) >= 0.97 * len(right)


def test_pixels_are_the_same_wherever_this_runs(model, asked):
    def pixels():
        images = load_generator(model).generate(asked[2][:30]).images
        return hashlib.sha256(images.tobytes()).hexdigest()

    for product in int8_product.FORMS:
        with native_library.only("reference"), int8_product.only(product):
            assert pixels() == PIXELS[model], product
    for form in native_library.forms_here():
        with native_library.only(form):
            assert pixels() == PIXELS[model], form


def test_the_result_file_is_of_this_file_and_counts_what_is_drawn(model, generator, asked):
    result = json.loads((RESULTS / f"{model}.json").read_text())["model"]
    assert result["sha256"] == hashlib.sha256(PACKAGED[model].read_bytes()).hexdigest()
    counted = sum(values.mean() for values in generator.operations_of(asked[2]).values())
    assert counted <= 20e6
    assert counted == pytest.approx(sum(result["operations_per_image"].values()), rel=0.1)


def test_the_coupling_carries_the_coupled_model_s_images(asked):
    scenes, families, requests = asked
    painter, _ = load_model(PACKAGED["coupled"])
    without = Painter.of(painter.network.without_coupling())
    generator = OscillatorGenerator(without, "without", sha256="")
    readings = Verifier.load(WEIGHTS_OF_ALL).read(generator.generate(requests).images)
    right = [judge(*one).correct for one in zip(scenes, families, readings, strict=True)]
    assert sum(right) < 0.3 * len(right)
    found = json.loads((RESULTS / "coupling.json").read_text())
    assert found["model"]["sha256"] == hashlib.sha256(PACKAGED["coupled"].read_bytes()).hexdigest()
