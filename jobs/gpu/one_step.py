"""One step of `make gpu`: its commands as processes, within its time, and the end of all that they started."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from millijoule.jobs.gpu.set_up import ROOT
from millijoule.jobs.gpu.steps import Step, end_signal, fill

DONE, FAILED, NO_TIME, UNFINISHED = "done", "failed", "no time left", "unfinished"

#: Every process of a step carries this in its environment, and so can be found and ended however it was started.
RESULTS_VARIABLE = "MILLIJOULE_GPU_RESULTS"
#: What a killed step's processes get to disappear.
SWEEP_S = 3.0


def run_step(
    step: Step, results: Path, env: Mapping[str, str], granted_s: float, *, rehearsal: bool
) -> tuple[str, str]:
    """Run the commands of `step` within `granted_s` seconds; status and reason.

    The commands' output goes to the step's log as they write it. When time is over they are asked to end, and killed after the
    step's grace; so are all processes they started and left, in whatever session.
    """
    folder = results / step.name
    folder.mkdir(exist_ok=True)
    commands = step.toy if rehearsal else step.commands
    deadline = time.monotonic() + granted_s - step.grace_s
    with (results / f"{step.name}.log").open("ab") as log:
        for number, words in enumerate(commands, start=1):
            left_s = deadline - time.monotonic()
            code = None
            if left_s > 0:
                useful_s = max(0.0, left_s - step.reserve_s)
                values = {"folder": str(folder), "results": str(results)}
                values |= {"minutes": f"{useful_s / 60:.2f}", "seconds": f"{useful_s:.0f}"}
                filled = fill(words, values)
                log.write(f"$ {' '.join(filled)}\n".encode())
                log.flush()
                code = _run(filled, env, log, left_s, step.grace_s)
            if code is None or (time.monotonic() > deadline and code != 0):
                return _out_of_time(step, granted_s)
            if code not in step.accepted:
                name = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return FAILED, f"command {number} of {len(commands)} ended with {name}"
    return DONE, ""


def _out_of_time(step: Step, granted_s: float) -> tuple[str, str]:
    if step.goes_on or step.training_steps:
        return UNFINISHED, f"ended after {granted_s:.0f} s; another call goes on"
    if granted_s < step.seconds[1]:
        return NO_TIME, f"ended after the {granted_s:.0f} s there were; it may take {step.seconds[1]:.0f}"
    return FAILED, f"not finished after {granted_s:.0f} s, and was ended"


def _run(
    words: tuple[str, ...], env: Mapping[str, str], log: BinaryIO, limit_s: float, grace_s: float
) -> int | None:
    """The exit code; None where it had to be ended."""
    process = subprocess.Popen(
        [sys.executable, *words],
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=prepare_process,
    )
    try:
        return process.wait(max(0.1, limit_s))
    except subprocess.TimeoutExpired:
        # twice: Python loses an interrupt that comes where it ignores exceptions, as in a destructor
        for _ in range(2):
            _signal_group(process.pid, end_signal(words))
            try:
                process.wait(grace_s / 2)
                break
            except subprocess.TimeoutExpired:
                continue
        return None
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        end_processes(env[RESULTS_VARIABLE])


def prepare_process() -> None:
    """Of a command, before it begins: the kernel kills it when this program is killed (prctl 1 is PR_SET_PDEATHSIG), and an interrupt
    ends it. A shell has what a script starts in the background ignore interrupts, and all that it starts inherits that."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _signal_group(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:
        pass


def end_processes(results: str) -> None:
    """End what steps with these results left running: Ray's daemons, workers of a killed program."""
    until = time.monotonic() + SWEEP_S
    while (found := list(_left_behind(results))) and time.monotonic() < until:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        time.sleep(0.05)


def _left_behind(results: str) -> Iterator[int]:
    wanted = f"{RESULTS_VARIABLE}={results}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and wanted in (entry / "environ").read_bytes().split(b"\0"):
                yield int(entry.name)
        except OSError:  # it ended, or is somebody else's
            continue
