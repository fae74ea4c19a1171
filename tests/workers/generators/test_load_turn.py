"""Workers of a host load a model one after another, and a dead or stuck one keeps nobody from it for good."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from millijoule.workers.generators import load_turn as module
from millijoule.workers.generators.load_turn import load_turn

SPAWN = multiprocessing.get_context("fork")


def load(model: Path, folder: Path, log: Path) -> None:
    with load_turn(model, folder):
        with log.open("a") as file:
            file.write(f"begin {os.getpid()}\n")
        time.sleep(0.05)
        with log.open("a") as file:
            file.write(f"end {os.getpid()}\n")


def hold(model: Path, folder: Path, ready) -> None:
    with load_turn(model, folder):
        ready.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """A process that is in the middle of loading `tmp_path / "a"`."""
    ready = SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(tmp_path / "a", tmp_path / "turns", ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_one_process_loads_at_a_time(tmp_path):
    log = tmp_path / "log"
    started = [SPAWN.Process(target=load, args=(tmp_path / "a", tmp_path / "turns", log)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(30)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == 8
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        assert (begin[0], end[0], begin[1]) == ("begin", "end", end[1])


def test_a_process_that_dies_while_it_loads_gives_its_turn_back(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(30)
    load(tmp_path / "a", tmp_path / "turns", tmp_path / "log")
    assert (tmp_path / "log").exists()


def test_another_model_does_not_wait(tmp_path, holder):
    load(tmp_path / "b", tmp_path / "turns", tmp_path / "log")
    assert (tmp_path / "log").exists()


def test_who_waits_too_long_loads_all_the_same_and_says_so(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(module, "LOAD_TIMEOUT_S", 0.1)
    load(tmp_path / "a", tmp_path / "turns", tmp_path / "log")
    assert "does not wait for others that load the same model" in caplog.text


def test_the_turn_ends_where_loading_fails(tmp_path):
    with pytest.raises(ValueError, match="broken"), load_turn(tmp_path / "a", tmp_path / "turns"):
        raise ValueError("broken")
    load(tmp_path / "a", tmp_path / "turns", tmp_path / "log")
