"""`millijoule evaluate`: true renders score one, noise scores nothing, and the file holds what was seen."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.tiny_oscillators import painter_of, tiny_oscillators

from millijoule.jobs import evaluate
from millijoule.jobs.evaluate import EvaluateOptions, count_operations, list_items
from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo, Rejection, every_image
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.judging.verifier import WEIGHTS, VerifierNet
from millijoule.workers.oscillators.model_file import save_model
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.renderer import render_scenes
from millijoule.workers.scenes.scenes import FAMILIES, complete, is_held_out
from millijoule.workers.scenes.vocabulary import NOUN_NUMBER, NOUNS
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.training.verifier import VerifierConfig, export_verifier


class Artist:
    """Draws true renders of what the prompt's words say, or noise."""

    def __init__(self, noise: bool = False, size: int = 64) -> None:
        self.noise = noise
        self.info = GeneratorInfo("artist", "0" * 64, size, size, num_inference_steps=1, batch_size=7)

    def generate(self, requests):
        if self.noise:
            rng = np.random.default_rng([r.seed for r in requests])
            return GeneratedBatch(rng.integers(0, 256, (len(requests), 64, 64, 3), dtype=np.uint8))
        scenes = [complete(parse_prompt(r.prompt)[0], r.seed) for r in requests]
        return GeneratedBatch(render_scenes(scenes, 1, requests[0].seed)[:, 0])

    def operations_of(self, requests, *, dense=False):
        return {"drawing": np.full(len(requests), 12)}


def artist(device):
    return Artist()


def noise(device):
    return Artist(noise=True)


def small(device):
    return Artist(size=32)


class Prude(Artist):
    """Hides two of seven images behind a black one, as a safety checker does, and gives up on a third."""

    def generate(self, requests):
        images, rejected = super().generate(requests).images, [None] * len(requests)
        for i, why in ((1, HIDDEN), (2, HIDDEN), (4, Rejection("quarantined", "no numbers"))):
            if i < len(requests):
                images[i], rejected[i] = 0, why
        return GeneratedBatch(images, rejected=tuple(rejected))


class Puritan(Artist):
    def generate(self, requests):
        return GeneratedBatch(super().generate(requests).images, rejected=(HIDDEN,) * len(requests))


HIDDEN = Rejection("filtered", "the checker hid it")


def prude(device):
    return Prude()


def puritan(device):
    return Puritan()


def learned(device):
    """Says that it knows the whole vocabulary."""
    artist = Artist()
    artist.nouns = len(NOUNS)
    return artist


def run(tmp_path, monkeypatch, model, *more):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evaluate_models.py").write_text(
        f"import importlib.util\nspec = importlib.util.spec_from_file_location('m', {__file__!r})\n"
        "m = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(m)\n"
        "artist, noise, small, learned = m.artist, m.noise, m.small, m.learned\n"
        "prude, puritan = m.prude, m.puritan\n"
    )
    argv = ["--model", model, "--output", str(tmp_path / "out"), "--prompts-per-family", "5", *more]
    return evaluate.main(argv)


def test_a_perfect_artist_scores_one(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "python:evaluate_models:artist") == 0
    result = json.loads((tmp_path / "out" / "artist.json").read_text())
    assert result["score"]["mean"][0] > 0.97
    rows = pq.ParquetFile(tmp_path / "out" / "artist.parquet").read().to_pylist()
    assert result["images"] == len(rows) == 60
    assert np.mean([row["strict"] for row in rows]) > 0.95
    assert sum(len(row["read"]) for row in rows) > 60
    assert result["model"]["operations_per_image"] == {"drawing": 12}
    assert {"commit", "dirty", "torch"} <= result["environment"].keys()
    assert result["recall"] > 0.7
    assert "independent_features" not in result
    shown = capsys.readouterr().out
    assert "colour attribution" in shown
    assert (tmp_path / "out" / "artist.png").stat().st_size > 10_000


def test_what_a_model_rejects_counts_as_wrong_and_is_in_no_other_figure(tmp_path, monkeypatch, capsys):
    """60 prompts in batches of seven: eight whole ones and one of four."""
    assert (
        run(tmp_path, monkeypatch, "python:evaluate_models:prude", "--name", "p", "--images-per-prompt", "2")
        == 0
    )
    result = json.loads((tmp_path / "out" / "p.json").read_text())
    assert result["images"] == 60
    assert result["rejected"] == {"filtered": 18, "quarantined": 8}
    rows = pq.ParquetFile(tmp_path / "out" / "p.parquet").read().to_pylist()
    hidden = [row for row in rows if row["rejected"]]
    assert [i for i, row in enumerate(rows[:7]) if row["rejected"]] == [1, 2, 4]
    assert {row["rejected"] for row in hidden} == {"filtered: the checker hid it", "quarantined: no numbers"}
    assert not any(row["correct"] or row["strict"] or row["read"] for row in hidden)
    assert all(row["background"] is None for row in hidden)
    shares = [np.mean([r["correct"] for r in rows if r["family"] == family]) for family in FAMILIES]
    assert result["score"]["mean"][0] == pytest.approx(np.mean(shares))
    assert 0.5 < result["score"]["mean"][0] <= 34 / 60 + 0.01
    # black ones are all alike; true renders of the others are as near as those of a perfect artist
    assert result["exact_duplicates"] == 0
    assert result["precision"] > 0.7
    assert "18 filtered, 8 quarantined; they count as wrong" in " ".join(capsys.readouterr().out.split())


def test_a_model_that_rejects_everything_is_refused_with_its_reason(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "python:evaluate_models:puritan") == 1
    assert (
        "gives no image of any prompt; the first is filtered: the checker hid it" in capsys.readouterr().err
    )


def test_what_compares_or_times_images_needs_every_one():
    requests = [
        ImageRequest(str(i), 0, f"a red cat above a blue car on a background of {i}", 0) for i in range(7)
    ]
    whole = Artist().generate(requests[:1])
    assert every_image(whole, requests[:1]) is whole.images
    words = (
        r"no image of 3 of 7 requests.* the first is filtered \(the checker hid it\), prompt 'a red cat above"
    )
    with pytest.raises(InputError, match=words):
        every_image(Prude().generate(requests), requests)


@pytest.mark.long
def test_noise_scores_nothing_and_is_far(tmp_path, monkeypatch):
    assert run(tmp_path, monkeypatch, "python:evaluate_models:noise", "--name", "n") == 0
    assert run(tmp_path, monkeypatch, "renders") == 0
    result, ceiling = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in ("n", "renders"))
    assert result["score"]["mean"][0] < 0.05
    assert ceiling["score"]["mean"][0] > 0.97
    assert result["frechet_distance"] > 3 * ceiling["frechet_distance"]
    rows = pq.ParquetFile(tmp_path / "out" / "n.parquet").read().to_pylist()
    assert not any(row["correct"] for row in rows if row["family"] == "counting")


@pytest.mark.long
def test_another_networks_features_are_compared_when_asked_for(tmp_path, monkeypatch, capsys):
    found = {}
    for model, name in (("renders", "near"), ("python:evaluate_models:noise", "far")):
        more = ["--name", name, "--prompts-per-family", "1", "--features", "efficientnet-lite0"]
        assert run(tmp_path, monkeypatch, model, *more) == 0
        found[name] = json.loads((tmp_path / "out" / f"{name}.json").read_text())["independent_features"]
    assert "in efficientnet-lite0 Frechet distance" in capsys.readouterr().out
    weights = WEIGHTS.with_name("efficientnet-lite0.safetensors")
    assert found["near"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found["near"]["network"] == "efficientnet-lite0"
    assert found["far"]["frechet_distance"] > 3 * found["near"]["frechet_distance"]
    assert found["near"]["recall"] > 0.5 > found["far"]["recall"]


def test_models_of_another_size_are_refused(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "python:evaluate_models:small") == 1
    assert "32x32" in capsys.readouterr().err


def test_a_suite_that_the_verifier_does_not_know_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "draw_items", lambda *_: pytest.fail("something was drawn"))
    for arguments in (["python:evaluate_models:learned"], ["renders", "--suite", "icons-1000"]):
        assert run(tmp_path, monkeypatch, *arguments, "--verifier", str(WEIGHTS)) == 1
        error = capsys.readouterr().err
        assert f"icons-1000 has {len(NOUNS)} nouns, the verifier knows the first 80" in error
        assert "--verifier" in error


def test_a_suite_beyond_the_models_vocabulary_is_said_to_be_so(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "python:evaluate_models:artist", "--suite", "icons-1000") == 0
    assert (
        f"icons-1000 has {len(NOUNS)} nouns, python:evaluate_models:artist knows the first 80"
        in capsys.readouterr().err
    )
    (result,) = (tmp_path / "out").glob("*.json")
    told = json.loads(result.read_text())
    assert (told["suite"]["nouns"], told["nouns_known"]) == (len(NOUNS), 80)


def test_the_models_vocabulary_decides_the_suite():
    known = {n: evaluate.largest_suite(n) for n in (12, 80, len(NOUNS) - 1, len(NOUNS))}
    assert list(known.values()) == ["icons-80", "icons-80", "icons-80", "icons-1000"]
    assert evaluate.OpenedModel(Artist(), "m", None, "cpu").nouns == 80
    assert evaluate.OpenedModel(learned("cpu"), "m", None, "cpu").nouns == len(NOUNS)


def test_all_nouns_are_judged_by_a_verifier_that_knows_them(tmp_path, monkeypatch):
    config = VerifierConfig(stem=8, middle=8, trunk=8, nouns=len(NOUNS))
    net = VerifierNet(config.shape, config.nouns)
    weights = export_verifier(net, tmp_path, "v", 0, config)
    more = ["--verifier", str(weights), "--prompts-per-family", "2"]
    assert run(tmp_path, monkeypatch, "renders", *more) == 0
    result = json.loads((tmp_path / "out" / "renders.json").read_text())
    assert result["suite"] == {"name": "icons-1000", "nouns": len(NOUNS)}
    assert result["verifier_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    drawn = list_items(EvaluateOptions("m", "o", prompts_per_family=40), len(NOUNS))
    numbers = {NOUN_NUMBER[g.noun] for item in drawn for g in item.scene.groups}
    assert max(numbers) > 1000


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(evaluate, "draw_items", lambda *_: pytest.fail("something was drawn"))
    assert run(tmp_path, monkeypatch, "python:evaluate_models:artist") == 1
    assert f"--output {tmp_path / 'out'}: nothing can be written there" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["held-out", "train"])
def test_prompts_are_fixed_and_of_their_split(split):
    few, many = (
        list_items(EvaluateOptions("m", "o", prompts_per_family=n, images_per_prompt=2, split=split))
        for n in (3, 6)
    )
    assert many[: len(few)] == few
    assert {i.family for i in few} == set(FAMILIES)
    named = [i for i in many if i.family not in ("single object", "counting")]
    assert all(is_held_out(i.scene) == (split == "held-out") for i in named)
    assert len({(i.prompt, i.seed) for i in many}) == len(many)


@pytest.mark.long
def test_processes_draw_the_same_images(tmp_path):
    options = EvaluateOptions("default", str(tmp_path), prompts_per_family=6, device="cpu")
    items = list_items(options)  # 72, more than a batch
    model = evaluate.open_model(options, "cpu")
    alone, _, about = evaluate.draw_items(items, model, options)
    together, _, same = evaluate.draw_items(items, model, replace(options, processes=2))
    assert np.array_equal(alone, together)
    assert about == same


def test_threads_of_several_processes_are_refused(tmp_path, capsys):
    arguments = ["--model", "default", "--output", str(tmp_path), "--processes", "2", "--threads", "3"]
    assert evaluate.main(arguments) != 0
    assert "--processes" in capsys.readouterr().err


def test_operations_are_reported_by_family_with_what_is_left_out(tmp_path):
    save_model(painter_of(tiny_oscillators()), tmp_path / "tiny.safetensors", "tiny")
    generator = load_generator(str(tmp_path / "tiny.safetensors"))
    prompts = ["a bat", "three bats", "a bat above an axe", "a bat"]
    families = ["single object", "counting", "position", "single object"]
    requests = [ImageRequest(str(i), 0, prompt, seed=i) for i, prompt in enumerate(prompts)]
    told = count_operations(generator, requests, families)
    of = [sum(int(v[0]) for v in generator.operations_of([r]).values()) for r in requests]
    assert told["operations_by_family"] == {
        "single object": round((of[0] + of[3]) / 2),
        "counting": of[1],
        "position": of[2],
    }
    assert abs(sum(told["operations_per_image"].values()) - sum(of) / 4) <= 2
    assert 0 < told["operations_left_out"] < 1
