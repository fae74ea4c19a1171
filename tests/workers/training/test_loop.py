"""What trainings share: data drawn ahead is the data drawn on demand, and no step follows a gradient that is not finite."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from millijoule.workers.errors import InputError
from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.training.icons import IconData, IconTrainer, IconTrainingConfig
from millijoule.workers.training.loop import (
    load_checkpoint,
    newest_share,
    run_training,
    save_checkpoint,
    update_average,
)
from millijoule.workers.training.optimizer import adamw, clip_and_step, set_learning_rate
from millijoule.workers.training.step_data import StepData

SMALL = IconTrainingConfig(
    steps=20,
    half=4,
    whole=2,
    warm_up=2,
    model=OscillatorConfig(nouns=6, code=8, hidden=16, channels=4, width=8, mix=8),
)


@pytest.mark.long
def test_data_drawn_by_processes_is_the_data_drawn_on_demand():
    draw = IconData(SMALL)
    ahead, demand = StepData(draw, "cpu", 2), StepData(draw, "cpu", 0)
    for step in (0, 1, 2, 7, 8, 3):  # also after a jump, as when a run is resumed
        ours, theirs = ahead.get(step), demand.get(step)
        assert ours.keys() == theirs.keys() == {"noun", "size"}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_processes_change_no_bit_of_a_run():
    alone, helped = IconTrainer(SMALL), IconTrainer(SMALL, data_processes=1)
    for _ in range(3):
        assert alone.train_step()["loss"] == helped.train_step()["loss"]
    for a, b in zip(alone.average.parameters(), helped.average.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    layer = torch.nn.Linear(3, 2)
    optimizer = adamw(layer.parameters(), "cpu", lr=0.1)
    moved = []
    for value in (1.0, bad, 1.0):
        before = layer.weight.detach().clone()
        layer.weight.grad, layer.bias.grad = torch.full((2, 3), 0.5), torch.full((2,), value)
        taken = clip_and_step(optimizer, layer.parameters(), 10.0)
        moved.append(not torch.equal(before, layer.weight))
        assert bool(taken["skipped"]) == (value != 1.0)
        assert torch.isfinite(taken["gradient"])
    assert moved == [True, False, True]
    assert torch.isfinite(layer.weight).all()


def test_the_learning_rate_is_what_is_set():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = adamw([weight], "cpu", lr=1.0)
    set_learning_rate(optimizer, 0.25)
    weight.grad = torch.ones(1)
    optimizer.step()
    assert weight.item() == pytest.approx(-0.25)


def test_the_average_forgets_as_it_is_told():
    slow, fast = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.75 * slow.weight.detach() + 0.25 * fast.weight.detach()
    update_average(slow, fast, torch.tensor(0.25))
    torch.testing.assert_close(slow.weight.detach(), expected)
    assert newest_share(0.999, 0) == pytest.approx(0.9)
    assert newest_share(0.999, 10**6) == pytest.approx(0.001)


@pytest.mark.long
@pytest.mark.parametrize("bad", [1, 5])
def test_a_run_stops_where_most_losses_are_lost_and_not_for_one(tmp_path, bad):
    trainer = IconTrainer(replace(SMALL, steps=5))
    real = trainer.train_step
    trainer.train_step = lambda: real() | ({"loss": float("nan")} if trainer.step <= bad else {})
    if bad == 1:
        run_training(trainer, tmp_path)
        assert math.isfinite(json.loads((tmp_path / "log.jsonl").read_text())["loss"])
    else:
        with pytest.raises(RuntimeError, match="most losses of steps 0 to 5 are not finite"):
            run_training(trainer, tmp_path)
        assert not (tmp_path / "checkpoint.pt").exists()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    save_checkpoint(IconTrainer(SMALL), tmp_path)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        run_training(IconTrainer(replace(SMALL, seed=1)), tmp_path, resume=True)


def test_a_damaged_checkpoint_is_named(tmp_path):
    save_checkpoint(IconTrainer(SMALL), tmp_path)
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"checkpoint\.pt: damaged"):
        load_checkpoint(IconTrainer(SMALL), tmp_path)


def test_sigterm_ends_a_run_with_a_checkpoint_to_continue_from(tmp_path):
    trainer = IconTrainer(replace(SMALL, steps=10_000))
    before = signal.getsignal(signal.SIGTERM)
    run_training(trainer, tmp_path, sample=lambda step: os.kill(os.getpid(), signal.SIGTERM), sample_every=3)
    assert trainer.step == 4  # the step after is finished
    resumed = IconTrainer(trainer.config)
    load_checkpoint(resumed, tmp_path)
    assert resumed.step == trainer.step
    assert signal.getsignal(signal.SIGTERM) == before
