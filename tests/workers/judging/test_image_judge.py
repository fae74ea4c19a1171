"""The judge of icon scenes accepts true renders and no noise, and what it stores says the same again."""

import hashlib
import json

import numpy as np
import pytest

from millijoule.pipeline.comparison.acceptance import parse_icons, shows_scene
from millijoule.workers.errors import InputError
from millijoule.workers.judging.image_judge import IconJudge, load_judge, load_metric
from millijoule.workers.judging.verifier import WEIGHTS, WEIGHTS_OF_ALL
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene


@pytest.fixture(scope="module", params=[80, 1040])
def judge(request):
    return load_judge("icon-scene", request.param)


@pytest.fixture(scope="module")
def scenes(judge):
    """Prompts of all families, their families, and true renders."""
    rng = np.random.default_rng(5)
    drawn = [(f, sample_scene(f, rng, held_out=True, nouns=judge.nouns)) for f in FAMILIES for _ in range(10)]
    prompts = [write_prompt(scene, rng) for _, scene in drawn]
    whole = [complete(scene, i) for i, (_, scene) in enumerate(drawn)]
    return prompts, [f for f, _ in drawn], render_scenes(whole, 1, 3)[:, 0]


def test_true_renders_are_accepted_and_the_stored_reading_says_so_too(judge, scenes):
    prompts, families, images = scenes
    found = judge.judge(images, prompts, families)
    assert np.mean([j.accepted for j in found]) > 0.9
    for judgement, prompt, family in zip(found, prompts, families, strict=True):
        assert shows_scene(prompt, family, parse_icons(judgement.icons), judge.nouns) == judgement.accepted
        assert judgement.score is None
    assert all(
        len(json.dumps(x).split(".")[-1]) <= 2 for j in found for i in json.loads(j.icons) for x in i[3:]
    )


def test_renders_of_other_prompts_are_rejected(judge, scenes):
    prompts, families, images = scenes
    found = judge.judge(np.roll(images, 10, axis=0), prompts, families)
    assert np.mean([j.accepted for j in found]) < 0.2


@pytest.mark.long
def test_features_have_a_reference_of_the_same_width(judge, scenes):
    prompts, _, images = scenes
    features, reference = judge.features(images), judge.reference_features(prompts, 1)
    assert features.shape == reference.shape
    assert np.isfinite(reference).all()
    assert (reference == judge.reference_features(prompts, 1)).all()
    assert (reference != judge.reference_features(prompts, 2)).any()


def test_a_judge_is_known_by_its_weights(judge):
    assert isinstance(judge, IconJudge)
    weights = {80: WEIGHTS, 1040: WEIGHTS_OF_ALL}[judge.nouns]
    assert judge.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["python:a", "clip", "python:no_such_module:f", "python:json:no_such_name"])
def test_what_is_no_factory_is_refused(name):
    with pytest.raises(InputError, match="--metric"):
        load_metric(name)


def test_a_clip_model_scores_by_the_cosine_of_its_embeddings(tmp_path):
    """A tiny model with random weights, saved and loaded as a user's would be."""
    transformers = pytest.importorskip("transformers")
    import torch

    characters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={
            **shared,
            "vocab_size": len(words),
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**shared, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")),
    ).save_pretrained(tmp_path)
    metric = load_metric(f"clip:{tmp_path}")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    scores = metric.score(images, ["a cat", "a dog", "a cat"])
    assert len(scores) == 3
    assert all(0 <= s <= 100 for s in scores)
    assert len(set(scores)) > 1
    alone = metric.score(images[2:], ["a cat"])
    assert alone == pytest.approx(scores[2:], abs=1e-3)
    assert len(metric.sha256) == 64
