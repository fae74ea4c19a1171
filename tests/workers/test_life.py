"""Signs of life: real processes, killed for real."""

import os
import subprocess
import sys
import time

import pytest

from millijoule.workers import life
from millijoule.workers.life import hold_life_lock, is_gone, life_path

HOLD = """
import sys, time
from pathlib import Path
from millijoule.workers.life import hold_life_lock
hold_life_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
    return life_path("/somewhere/out", "w0001-0001", tmp_path)


@pytest.fixture
def holder(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_process_that_lives_is_not_gone_and_one_that_was_killed_is(path, holder):
    assert is_gone(path, 0.0) is False
    holder.kill()
    assert is_gone(path, 20.0) is True


def test_everybody_who_looks_sees_that_it_is_gone(path, holder):
    """The first who saw it may die before that is recorded."""
    holder.kill()
    assert [is_gone(path, 20.0) for _ in range(3)] == [True, True, True]


def test_of_a_process_that_gave_no_sign_nothing_is_known(path):
    assert is_gone(path, 0.0) is None


def test_files_of_the_dead_are_removed_when_they_are_old_and_those_of_the_living_stay(tmp_path, path, holder):
    dead, young = (life_path("/somewhere/out", name, tmp_path) for name in ("dead", "young"))
    for file in (dead, young):
        file.touch()
    long_ago = time.time() - life.KEEP_S - 60
    for file in (dead, path):
        os.utime(file, (long_ago, long_ago))
    hold_life_lock(life_path("/somewhere/out", "next", tmp_path))
    assert (dead.exists(), young.exists(), path.exists()) == (False, True, True)
