"""Clocks of a board are as they were after a sweep, whatever ended it; the board is a stand-in whose state is a file."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from millijoule.jobs.ladder.clock_guard import guarded_clocks, open_binding
from millijoule.jobs.ladder.stand_in_clocks import CLOCKS_MHZ, USUAL_MW, make_state, power_mw
from millijoule.jobs.measuring.stand_ins import board_uuid
from millijoule.workers.errors import InputError

UUID = board_uuid(0)

#: Holds a clock and a power limit until it is killed.
HOLDS = """
import signal, sys, time
from millijoule.jobs.ladder.clock_guard import guarded_clocks
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
with guarded_clocks(sys.argv[1], sys.argv[2]) as clocks:
    clocks.lock(1200)
    clocks.limit(300_000)
    print(clocks.guardian.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def board(tmp_path):
    path = tmp_path / "board.json"
    make_state(path)
    return path


def state(board):
    found = json.loads(board.read_text())
    return found["locked_mhz"], found["limit_mw"]


RESTORED = (None, USUAL_MW)


def test_clocks_are_held_inside_and_restored_after(board):
    with guarded_clocks(UUID, str(board)) as clocks:
        clocks.lock(990)
        clocks.limit(400_000)
        assert state(board) == ([990, 990], 400_000)
        assert clocks.steps_mhz() == list(CLOCKS_MHZ)
    assert state(board) == RESTORED


def test_an_exception_restores(board):
    def sweep():
        with guarded_clocks(UUID, str(board)) as clocks:
            clocks.lock(990)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sweep()
    assert state(board) == RESTORED


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_killed_leaves_a_restored_board(board, number):
    sweep = subprocess.Popen(
        [sys.executable, "-c", HOLDS, UUID, str(board)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
    )
    guardian = int(sweep.stdout.readline())
    assert state(board) == ([1200, 1200], 300_000)
    for held in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(guardian, held)  # what a terminal or a supervisor sends to all does not reach it
    sweep.send_signal(number)
    sweep.wait()
    wait_until(lambda: state(board) == RESTORED)
    wait_until(lambda: not running(guardian))


def test_a_guardian_that_is_killed_ends_the_sweep_and_the_board_is_restored(board):
    def sweep():
        with guarded_clocks(UUID, str(board)) as clocks:
            clocks.lock(990)
            clocks.guardian.kill()
            clocks.guardian.wait()
            clocks.lock(500)

    with pytest.raises(RuntimeError, match="guardian"):
        sweep()
    assert state(board) == RESTORED


def test_what_is_not_allowed_is_refused_before_anything_is_changed(board, capfd):
    make_state(board, may_change=False)
    with pytest.raises(InputError, match="takes root"), guarded_clocks(UUID, str(board)):
        pytest.fail("entered")
    assert state(board) == RESTORED
    assert "nvidia-smi" not in capfd.readouterr().err


def test_an_unknown_board_is_named(board):
    with pytest.raises(InputError, match="GPU-none"), guarded_clocks("GPU-none", str(board)):
        pytest.fail("entered")


def test_the_counter_of_the_stand_in_grows_by_its_power(board):
    lib = open_binding(str(board))
    handle = lib.nvmlDeviceGetHandleByUUID(UUID)
    lib.nvmlDeviceSetGpuLockedClocks(handle, 345, 345)
    slow = power_mw(json.loads(board.read_text()))
    lib.nvmlDeviceResetGpuLockedClocks(handle)
    assert slow < power_mw(json.loads(board.read_text()))
    before = json.loads(board.read_text())
    time.sleep(0.02)
    lib.nvmlDeviceSetPowerManagementLimit(handle, 200_000)
    after = json.loads(board.read_text())
    passed_s = (after["t_ns"] - before["t_ns"]) / 1e9
    assert after["energy_mj"] - before["energy_mj"] == pytest.approx(600_000 * passed_s)


def wait_until(holds, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
