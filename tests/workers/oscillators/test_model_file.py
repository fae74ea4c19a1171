"""Models in files: written and read again, small, and refused where they are not what they say."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_oscillators import painter_of, tiny_oscillators

from millijoule.workers.errors import InputError, RowError
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.oscillators.model_file import load_model, save_model
from millijoule.workers.schemas import ImageRequest


@pytest.fixture
def file(painter, tmp_path):
    save_model(painter, tmp_path / "model.safetensors", "tiny", {"seed": "3"})
    return tmp_path / "model.safetensors"


def requests(count):
    return [
        ImageRequest(str(i), 0, f"two red {noun}", seed=i)
        for i, noun in zip(range(count), ("bats", "axes", "anchors", "foxes"), strict=False)
    ]


def test_a_model_draws_the_same_after_it_was_written(painter, file):
    again, name = load_model(file)
    assert name == "tiny"
    drawn = OscillatorGenerator(painter, "x", "0").generate(requests(4))
    loaded = load_generator(str(file))
    assert isinstance(loaded, OscillatorGenerator)
    assert (loaded.generate(requests(4)).images == drawn.images).all()
    assert drawn.images.std() > 5
    assert "fox" in drawn.warnings[3][0]
    assert loaded.nouns == again.network.config.nouns
    with pytest.raises(RowError, match="64x64"):
        loaded.generate([ImageRequest("a", 0, "a bat", seed=1, width=128)])


def changed(file, **tensors):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    content = load_file(file) | tensors
    save_file({k: v for k, v in content.items() if v is not None}, file, metadata)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"codes": torch.zeros(3, 4, dtype=torch.int8)}, "codes is"),
        ({"near.weights": None}, "near.weights is missing"),
        ({"ink": torch.zeros(7, 30, dtype=torch.int16)}, "ink is"),
        ({"more": torch.zeros(2)}, "of no use: more"),
    ],
)
def test_a_damaged_file_is_refused_by_name(file, tensors, words):
    changed(file, **tensors)
    with pytest.raises(InputError, match=f"{file.name}: damaged model file.*{words}"):
        load_model(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"nouns": 0},
        {"nouns": 5000},
        {"steps": 3},
        {"steps": 101},
        {"coupling": "mlp"},
        {"coupling": "sometimes"},
        {"extra": 1},
    ],
)
def test_settings_that_cannot_be_are_refused(file, entry):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | entry)
    save_file(load_file(file), file, metadata)
    with pytest.raises(InputError, match="damaged model file"):
        load_model(file)


@pytest.mark.parametrize("value", [0.0, -1e-3, 1e300, float("nan"), float("inf")])
def test_a_coupling_whose_scales_would_not_be_the_same_everywhere_is_refused(tmp_path, value):
    path = tmp_path / "coupled.safetensors"
    save_model(painter_of(tiny_oscillators("trained")), path, "tiny")
    scale = load_file(path)["coupling.spread_scale"]
    scale[3] = value
    changed(path, **{"coupling.spread_scale": scale})
    with pytest.raises(InputError, match=r"coupling\.spread_scale has values that are not above 0"):
        load_model(path)
