"""Runs that are on record are not run again; intervals over runs are Student's."""

import json
import os
import signal
from dataclasses import dataclass

import pytest

from millijoule.jobs.machine import find_commit
from millijoule.jobs.measuring.runs import interval, recorded, train_to_the_end
from millijoule.workers.errors import InputError


def test_a_run_is_done_once(tmp_path):
    record, calls = tmp_path / "a" / "run.json", []

    def run():
        calls.append(1)
        return {"score": 0.5}

    found = {"score": 0.5, "commit": find_commit()}
    assert recorded(record, {"steps": 3, "sizes": (1, 2)}, run) == found
    assert recorded(record, {"steps": 3, "sizes": (1, 2)}, run) == found
    assert calls == [1]
    with pytest.raises(InputError, match="other settings"):
        recorded(record, {"steps": 4, "sizes": (1, 2)}, run)
    assert json.loads(record.read_text())["found"] == found


def test_a_damaged_record_is_named(tmp_path):
    record = tmp_path / "run.json"
    recorded(record, {"steps": 3}, lambda: {"score": 0.5})
    record.write_text(record.read_text()[:20])
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        recorded(record, {"steps": 3}, lambda: {"score": 0.5})


def test_intervals_are_those_of_the_table():
    # Student's t for 2 degrees of freedom at 97.5 %: 4.3027
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    assert mean - low == pytest.approx(high - mean, abs=1e-5)
    assert interval([0.25]) == [0.25]


@dataclass(frozen=True)
class FiveSteps:
    steps: int = 5


class AsksToStop:
    """Sends its own process a SIGTERM in its first step."""

    config, step = FiveSteps(), 0

    def train_step(self):
        os.kill(os.getpid(), signal.SIGTERM)
        self.step += 1
        return {"loss": 1.0}

    def state(self):
        return {}


def test_a_run_that_was_stopped_is_not_taken_for_one_that_is_complete(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(AsksToStop(), tmp_path)
    assert "stopped after 1 of 5 steps" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").exists()
