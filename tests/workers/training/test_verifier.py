"""Training of the verifier: how many nouns it learns is one setting, and what was begun before there were more goes on."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from millijoule.workers.errors import InputError
from millijoule.workers.judging.verifier import WEIGHTS, Verifier, cell_parts, global_parts
from millijoule.workers.scenes.vocabulary import NOUN_NUMBER, NOUNS
from millijoule.workers.training.loop import CHECKPOINT, load_checkpoint, save_checkpoint
from millijoule.workers.training.verifier import (
    LabelledImages,
    VerifierConfig,
    VerifierTrainer,
    make_targets,
    sample_any_scene,
    verifier_loss,
)

TINY = VerifierConfig(stem=8, middle=8, trunk=8, batch=8, steps=2)


def test_the_shipped_verifier_says_nothing_of_nouns_and_knows_the_first_80():
    with safe_open(WEIGHTS, "numpy") as file:
        assert "nouns" not in file.metadata()
    assert Verifier.load().nouns == 80


def test_a_verifier_of_more_nouns_is_trained_written_and_read(tmp_path):
    trainer = VerifierTrainer(replace(TINY, nouns=120))
    nouns = np.concatenate([trainer.batch(step).noun.ravel() for step in range(20)])
    assert 80 < nouns.max() < 120
    assert trainer.train_step()["loss"] < 60
    path = trainer.export(tmp_path, "v")
    verifier = Verifier.load(path)
    assert verifier.nouns == 120
    assert verifier.net.cells.out_channels == sum(cell_parts(120)) == 1 + 120 + 10 + 3 + 2
    for nouns in ("2000", "0", "many", "81"):
        with safe_open(path, "numpy") as file:
            metadata = {**file.metadata(), "nouns": nouns}
        save_file(load_file(path), tmp_path / "other.safetensors", metadata)
        with pytest.raises(InputError, match="damaged"):
            Verifier.load(tmp_path / "other.safetensors")


def test_a_verifier_reads_nouns_beyond_the_first_80():
    trainer = VerifierTrainer(replace(TINY, nouns=90))
    with torch.no_grad():
        trainer.net.cells.weight.zero_()
        trainer.net.cells.bias.zero_()
        trainer.net.cells.bias[0] = 9.0  # a centre everywhere
        trainer.net.cells.bias[1 + 85] = 9.0
    reading = Verifier(trainer.net).read(np.zeros((1, 64, 64, 3), np.uint8))[0]
    assert {icon.noun for icon in reading.icons} == {NOUNS[85]}


@pytest.mark.parametrize("nouns", [80, 160, len(NOUNS)])
def test_each_noun_weighs_the_same_however_many_there_are(nouns):
    """At logits of zero every binary cross entropy is log 2; the weight of all nouns was 8 when there were 80."""
    empty = LabelledImages(
        np.zeros((2, 64, 64, 3), np.uint8),
        *(np.full((2, 4), -1) for _ in range(3)),
        np.zeros((2, 4, 2), np.float32),
        np.zeros(2, np.int64),
    )
    cells, overall = torch.zeros(2, sum(cell_parts(nouns)), 8, 8), torch.zeros(2, sum(global_parts(nouns)))
    log = verifier_loss(cells, overall, make_targets(empty, nouns))[1]
    others = math.log(2) + 0.3 * math.log(5) + 4 * math.log(2)
    assert log["features"] == pytest.approx(8 * nouns / 80 * math.log(2) + others, rel=1e-5)


def test_scenes_of_the_first_80_nouns_are_drawn_as_ever():
    """The fingerprint was taken when there were no other nouns."""
    rng = np.random.default_rng(5)
    drawn = [sample_any_scene(rng) for _ in range(200)]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == "0e0dd5ec207fe0b4"
    more = [sample_any_scene(rng, 300) for _ in range(500)]
    assert 250 < max(NOUN_NUMBER[g.noun] for scene in more for g in scene.groups) < 300


def test_more_nouns_than_there_are_are_refused():
    with pytest.raises(ValueError, match="nouns"):
        VerifierConfig(nouns=len(NOUNS) + 1)


def test_a_training_that_began_before_a_setting_existed_goes_on(tmp_path):
    begun = VerifierTrainer(TINY)
    begun.step = 1
    save_checkpoint(begun, tmp_path)
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    settings = json.loads(saved["config"])
    del settings["nouns"]
    torch.save({**saved, "config": json.dumps(settings)}, tmp_path / CHECKPOINT)
    resumed = VerifierTrainer(TINY)
    load_checkpoint(resumed, tmp_path)
    assert resumed.step == 1
    with pytest.raises(InputError, match="nouns"):
        load_checkpoint(VerifierTrainer(replace(TINY, nouns=100)), tmp_path)
