"""`make gpu`: what waits for a GPU, in order of worth, within a budget of seconds; a second call goes on.

Reads as: look at the machine, see what it lacks, take up the state, run step after step (`one_step`), sum up. A step runs in
processes of its own, within its own time, and leaves its files in a folder of its own; whatever happens to it, the
next one is begun. `state.json` is replaced after each, so that nothing is lost when this program is killed. Needs the standard
library only: on a bare machine it runs first, with the machine's Python.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from millijoule.jobs.gpu.one_step import (
    DONE,
    FAILED,
    NO_TIME,
    RESULTS_VARIABLE,
    UNFINISHED,
    end_processes,
    run_step,
)
from millijoule.jobs.gpu.results import (
    STATE,
    WORK,
    QueueError,
    Row,
    State,
    keep,
    line_of,
    load_state,
    summarise,
)
from millijoule.jobs.gpu.set_up import ROOT, Lack, how_to_fetch, prepare, python_path
from millijoule.jobs.gpu.steps import BASE, STEPS, Step
from millijoule.jobs.machine import find_commit

SKIPPED, RUNNING = "skipped", "running"

#: Set in rehearsals, for the tests of `tests/accelerator`: they take the CPU in the GPU's place.
REHEARSAL_VARIABLE = "MILLIJOULE_GPU_REHEARSAL"

#: Kept from the budget for the summary and the archive.
CLOSING_S = 5.0
SHOWN_LINES = 12

#: What decides whether results belong to this program: code, recipes, weights and the tests that are a step.
CODE = ("jobs", "pipeline", "workers", "kernels", "tests/accelerator")

ERROR, USAGE, INTERRUPTED = 1, 2, 5


@dataclass(frozen=True)
class Device:
    """The boards NVML shows: product names, of which a state is kept apart; UUIDs and driver, which rows tell."""

    name: str
    board: str


def find_device() -> Device:
    """The boards of this machine, asked of the driver's own command: pynvml may still lie among the carried wheels.

    Raises:
        QueueError: there is none.
    """
    command = ["nvidia-smi", "--query-gpu=name,uuid,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise QueueError(
            f"nvidia-smi shows no board here ({error}); --rehearse runs everything at toy size on a CPU"
        ) from error
    boards = [line.rsplit(", ", 2) for line in done.stdout.splitlines() if line.count(", ") >= 2]
    if not boards:
        raise QueueError("nvidia-smi shows no board here; --rehearse runs everything at toy size on a CPU")
    names, uuids, drivers = zip(*boards, strict=True)
    return Device(", ".join(names), f"{', '.join(uuids)} (driver {drivers[0]})")


def hash_code(root: Path = ROOT) -> str:
    """SHA-256 over what can change a result, whatever version control says or is there to say."""
    total = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"{path.relative_to(root)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


@dataclass
class Queue:
    """One call of `make gpu`. `on_step` is called after each step."""

    results: Path
    state: State
    board: str
    lacks: Mapping[str, Lack]
    env: Mapping[str, str]
    deadline: float
    rehearsal: bool
    on_step: Callable[[], None]

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            row = self.state.steps.setdefault(step.name, Row(NO_TIME))
            left_s = self.deadline - time.monotonic()
            # how fast a CPU is, is not what a rehearsal is about
            shortest_s, longest_s = (step.grace_s, left_s) if self.rehearsal else step.seconds
            status, reason = SKIPPED, self._cannot(step)
            if not reason and left_s < shortest_s:
                status, reason = NO_TIME, f"needs {shortest_s:.0f} s at least, {max(0, left_s):.0f} are left"
            if reason and row.runs:  # what is known of it stays
                print(line_of(step.name, Row(status, reason)), flush=True)
                continue
            if reason:
                row.status, row.reason = status, reason
            else:
                self._run(step, row, min(longest_s, left_s))
            print(line_of(step.name, row), flush=True)
            self.state.save(self.results)
            self.on_step()

    def _cannot(self, step: Step) -> str:
        lacking = [self.lacks[p].reason for p in (*BASE, *step.needs) if p in self.lacks]
        if not lacking and step.after and not (self.results / step.after).exists():
            return f"{step.after} is not there: an earlier step leaves it"
        return "; ".join(dict.fromkeys(lacking))

    def _run(self, step: Step, row: Row, granted_s: float) -> None:
        print(f"{step.name}: {step.what} (up to {granted_s:.0f} s)", flush=True)
        row.status, row.reason, row.began_unix = RUNNING, "", time.time()
        row.granted_s, row.seconds, row.runs = round(granted_s, 1), None, row.runs + 1
        row.commit, row.board = self.state.commit, self.board
        self.state.save(self.results)
        began = time.monotonic()
        try:
            row.status, row.reason = run_step(
                step, self.results, self.env, granted_s, rehearsal=self.rehearsal
            )
            if row.status == DONE and step.training_steps and not self.rehearsal:
                log = self.results / step.name / "run" / "log.jsonl"
                trained = json.loads(log.read_text().splitlines()[-1])["step"]
                if trained < step.training_steps:
                    row.status = UNFINISHED
                    row.reason = f"{trained:,} of {step.training_steps:,} training steps"
        except Exception as error:  # whatever it is, it is this step's and must not cost the next ones
            row.status, row.reason = FAILED, f"{type(error).__name__}: {error}"
        except BaseException:
            row.status, row.reason = UNFINISHED, "interrupted"
            self.state.save(self.results)
            raise
        finally:
            row.seconds = round(time.monotonic() - began, 1)
        if row.status == FAILED:
            end = (self.results / f"{step.name}.log").read_bytes()[-8000:].decode(errors="replace")
            print("\n".join(f"    | {line}" for line in end.splitlines()[-SHOWN_LINES:]), flush=True)


def choose(steps: Sequence[Step], state: State, names: Sequence[str]) -> list[Step]:
    """What this call runs: the steps asked for, or else those that never came to an end, and failed ones after them.

    Raises:
        QueueError: no step has that name.
    """
    known = {step.name: step for step in steps}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise QueueError(f"no step is called {unknown[0]}; there are {', '.join(known)}")
    if names:
        return [step for step in steps if step.name in names]
    status = {name: row.status for name, row in state.steps.items()}
    fresh = [s for s in steps if status.get(s.name) not in (DONE, FAILED)]
    return fresh + [s for s in steps if status.get(s.name) == FAILED]


def take_up(results: Path, device: Device) -> State:
    """The state to go on with: a new one, or the folder's where it is of this code and this kind of device.

    Raises:
        QueueError: it is of another.
    """
    commit, code = find_commit(), hash_code()
    state = load_state(results)
    if state is None:
        return State(code, device.name, commit)
    where = f"{results}: holds results"
    advice = "give another folder (GPU_OUT=...), or move this one away"
    if state.device != device.name:
        raise QueueError(f"{where} of {state.device}, this is {device.name}; {advice}")
    if state.code != code:
        raise QueueError(f"{where} of other code (commit {state.commit}), this is of {commit}; {advice}")
    before = {row.board for row in state.steps.values() if row.board}
    told = [f"going on with {results / STATE}"]
    if before and device.board not in before:
        told.append(f"another board of the kind: {device.board} after {', '.join(sorted(before))}")
    if state.commit != commit:
        told.append(f"commit {commit} after {state.commit}, with the same code")
    print("; ".join(told), flush=True)
    state.commit = commit
    for row in state.steps.values():
        if row.status == RUNNING:
            row.status, row.reason = UNFINISHED, "the program was killed during this step"
    return state


@contextmanager
def _only_one(path: Path, results: Path) -> Iterator[None]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QueueError(
                f"{results}: another run is at work there; wait for it, or give another folder"
            ) from None
        yield


# -- the command ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Run what waits for a GPU, in order of worth, within a budget."
    )
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything, set-up included")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the results (default benchmarks/gpu)"
    )
    parser.add_argument(
        "--wheels", type=Path, default=None, help="folder of wheels for what the machine lacks"
    )
    parser.add_argument("--steps", nargs="*", default=[], help="run these steps, whether done or not")
    parser.add_argument(
        "--archive", type=Path, default=None, help="keep all results in files PREFIX.00, .01 ... too"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the steps, and what the results say of them"
    )
    parser.add_argument("--rehearse", action="store_true", help="everything at toy size, on a CPU")
    return parser


def run(options: argparse.Namespace, steps: Sequence[Step] = STEPS) -> int:
    """One call; the exit code: 0, or 1 where a step failed in this call or before.

    Raises:
        QueueError: nothing was begun.
    """
    deadline = time.monotonic() + options.budget - CLOSING_S
    default = ROOT / ("out/gpu-rehearsal" if options.rehearse else "benchmarks/gpu")
    results = (options.out or default).absolute()
    if options.list:
        print(list_steps(steps, load_state(results)))
        return 0
    if options.budget <= CLOSING_S:
        raise QueueError(f"BUDGET={options.budget:g}: seconds, more than {CLOSING_S:g}")
    device = Device("rehearsal", "none") if options.rehearse else find_device()
    work = results / WORK
    work.mkdir(parents=True, exist_ok=True)
    with _only_one(work / "lock", results):
        state = take_up(results, device)
        chosen = choose(steps, state, options.steps)
        end_processes(str(results))
        packages = dict.fromkeys(p for step in chosen for p in (*BASE, *step.needs))
        lacks = prepare(work / "site", options.wheels, packages)
        for lack in lacks.values():
            print(f"missing: {lack.reason}", flush=True)
        if lacks:
            command = how_to_fetch(dict.fromkeys(lack.package for lack in lacks.values()))
            print(f"fetch where there is a network, then give WHEELS: {command}", flush=True)
        queue = Queue(
            results,
            state,
            device.board,
            lacks,
            _environment(results, options.rehearse),
            deadline,
            options.rehearse,
            on_step=lambda: keep(results, options.archive, steps, state),
        )
        queue.run(chosen)
        keep(results, options.archive, steps, state)
    print("\n" + summarise(steps, state), end="", flush=True)
    return ERROR if any(row.status == FAILED for row in state.steps.values()) else 0


def _environment(results: Path, rehearsal: bool) -> dict[str, str]:
    env = {
        **os.environ,
        "PYTHONPATH": python_path(results / WORK / "site", os.environ.get("PYTHONPATH")),
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(results / WORK / "inductor"),
        RESULTS_VARIABLE: str(results),
    }
    if rehearsal:
        env[REHEARSAL_VARIABLE] = "1"
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env


def list_steps(steps: Sequence[Step], state: State | None) -> str:
    lines = [f"{'step':<29}{'shortest':>10}{'longest':>9}  what"]
    for step in steps:
        row = state.steps.get(step.name) if state else None
        lines.append(
            f"{step.name:<29}{step.seconds[0]:>8.0f} s{step.seconds[1]:>7.0f} s  {step.what}"
            + (f" [{row.status}]" if row else "")
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None, steps: Sequence[Step] = STEPS) -> int:
    def interrupt(signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    options = _parser().parse_args(argv)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(options, steps)
    except QueueError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print("make gpu: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
