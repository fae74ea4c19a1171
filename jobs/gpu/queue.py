"""`make gpu`: what waits for a GPU, in order of worth, within a budget of seconds; a second call goes on.

Reads as: look at the machine, see what it lacks, take up the state, run step after step (`gpu_steps`), sum up. A step runs in
processes of its own, within its own time, and leaves its files in a folder of its own; whatever happens to it, the
next one is begun. `state.json` is replaced after each, so that nothing is lost when this program is killed. Needs the standard
library only: on a bare machine it runs first, with the machine's Python.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from millijoule.jobs.gpu.set_up import ROOT, Lack, how_to_fetch, prepare, python_path
from millijoule.jobs.gpu.steps import BASE, STEPS, Command, Step

STATE = "state.json"
SUMMARY = "summary.txt"
FORMAT_VERSION = 1

#: Inside the results: installed wheels, compiled kernels, the lock. Neither results nor worth keeping.
WORK = ".work"

DONE, FAILED, NO_TIME, SKIPPED, UNFINISHED, RUNNING = (
    "done",
    "failed",
    "no time left",
    "skipped",
    "unfinished",
    "running",
)

#: Every process of a step carries these in its environment, and so can be found and ended however it was started.
RESULTS_VARIABLE = "MILLIJOULE_GPU_RESULTS"
#: Set in rehearsals, for the tests of `tests/accelerator`: they take the CPU in the GPU's place.
REHEARSAL_VARIABLE = "MILLIJOULE_GPU_REHEARSAL"

#: Kept from the budget for the summary and the archive.
CLOSING_S = 5.0
#: What a killed step's processes get to disappear.
SWEEP_S = 3.0
#: Part of an archive: some machines hand back only files of up to 16 MiB.
ARCHIVE_PART_BYTES = 15 * 2**20
SHOWN_LINES = 12

#: What decides whether results belong to this program: code, recipes, weights and the tests that are a step.
_CODE = ("jobs", "pipeline", "workers", "kernels", "tests/accelerator")

ERROR, USAGE, INTERRUPTED = 1, 2, 5


class QueueError(Exception):
    """The queue cannot be run; the message says what to do."""


@dataclass
class Row:
    """What is known of one step; `commit`, `board` and times are of its last run."""

    status: str
    reason: str = ""
    began_unix: float | None = None
    seconds: float | None = None
    granted_s: float | None = None
    commit: str | None = None
    board: str | None = None
    runs: int = 0


@dataclass
class State:
    """Of one folder of results; `code` and `device` must stay the same for it to be continued."""

    code: str
    device: str
    commit: str
    steps: dict[str, Row] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """In one move: a reader, and a later call, see the old state or the new."""
        text = json.dumps({"format_version": FORMAT_VERSION, **_plain(self)}, indent=1) + "\n"
        temporary = folder / (STATE + ".part")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE)


def _plain(state: State) -> dict[str, Any]:
    steps = {name: {k: v for k, v in vars(row).items() if v is not None} for name, row in state.steps.items()}
    return {**vars(state), "steps": steps}


def load_state(folder: Path) -> State | None:
    """The state in `folder`, None where there is none.

    Raises:
        QueueError: there is one that this program did not write.
    """
    path = folder / STATE
    try:
        table = json.loads(path.read_text())
        if table.pop("format_version") != FORMAT_VERSION:
            raise ValueError("another format")
        steps = {name: Row(**row) for name, row in table.pop("steps").items()}
        return State(**table, steps=steps)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise QueueError(f"{path}: cannot be read ({error}); move it away, or give another folder") from error


# -- the machine ----------------------------------------------------------------------------------------------------


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


def find_commit() -> str:
    """The tree's commit, or what `MILLIJOULE_COMMIT` says where the tree is a copy without its history."""
    told = os.environ.get("MILLIJOULE_COMMIT")
    if told:
        return told
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def hash_code(root: Path = ROOT) -> str:
    """SHA-256 over what can change a result, whatever version control says or is there to say."""
    total = hashlib.sha256()
    for folder in _CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                total.update(f"{path.relative_to(root)}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


# -- one step -------------------------------------------------------------------------------------------------------


def run_step(
    step: Step, commands: Sequence[Command], results: Path, env: Mapping[str, str], granted_s: float
) -> tuple[str, str]:
    """Run `commands` within `granted_s` seconds; status and reason.

    The commands' output goes to the step's log as they write it. When time is over they are asked to end, and killed after the
    step's grace; so do all processes they started and left, in whatever session.
    """
    folder = results / step.name
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    deadline = began + granted_s
    with (results / f"{step.name}.log").open("ab") as log:
        for number, command in enumerate(commands):
            left_s = deadline - time.monotonic()
            if left_s <= step.grace_s:
                return _out_of_time(step, granted_s)
            useful_s = max(0.0, left_s - step.grace_s - step.reserve_s)
            words = fill(command, folder, results, useful_s)
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            code = _run(words, env, log, left_s - step.grace_s, step)
            if code is None or (time.monotonic() > deadline - step.grace_s and code != 0):
                return _out_of_time(step, granted_s)
            if code not in command.accepted:
                return FAILED, f"command {number + 1} of {len(commands)} ended with {_name_code(code)}"
    return DONE, ""


def _trained(folder: Path) -> int:
    """The last step that the training in `folder` has logged."""
    lines = (folder / "run" / "log.jsonl").read_text().splitlines()
    return int(json.loads(lines[-1])["step"])


def _out_of_time(step: Step, granted_s: float) -> tuple[str, str]:
    if step.goes_on:
        return UNFINISHED, f"ended after {granted_s:.0f} s; another call goes on"
    if granted_s < step.longest_s:
        return NO_TIME, f"ended after the {granted_s:.0f} s there were; it may take {step.longest_s:.0f}"
    return FAILED, f"not finished after {granted_s:.0f} s, and was ended"


def fill(command: Command, folder: Path, results: Path, useful_s: float) -> list[str]:
    """The words of a command with their braces filled in, without the interpreter."""
    values = {
        "folder": str(folder),
        "results": str(results),
        "minutes": f"{useful_s / 60:.2f}",
        "seconds": f"{useful_s:.0f}",
    }
    return [
        re.sub(r"\{(folder|results|minutes|seconds)\}", lambda m: values[m[1]], word)
        for word in command.words
    ]


def _run(
    words: list[str], env: Mapping[str, str], log: io.BufferedWriter, limit_s: float, step: Step
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
        preexec_fn=_die_with_parent,
    )
    try:
        return process.wait(max(0.1, limit_s))
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, step.end_with)
        try:
            # An ending that was asked for and obeyed in time is as good as none: what there is was kept
            process.wait(step.grace_s)
        except subprocess.TimeoutExpired:
            pass
        return None
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
        end_processes(env[RESULTS_VARIABLE])


def _die_with_parent() -> None:
    """The kernel kills the command when this program is killed (prctl 1 is PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _signal_group(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:
        pass


def end_processes(results: str) -> None:
    """End what earlier steps with these results left running: Ray's daemons, workers of a killed program."""
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
            if wanted in (entry / "environ").read_bytes().split(b"\0") and _state_of(entry) != "Z":
                yield int(entry.name)
        except OSError:  # it ended, or is somebody else's
            continue


def _state_of(entry: Path) -> str:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0]


def _name_code(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# -- all steps ------------------------------------------------------------------------------------------------------


@dataclass
class Queue:
    """One call of `make gpu`."""

    results: Path
    state: State
    device: Device
    lacks: Mapping[str, Lack]
    env: Mapping[str, str]
    deadline: float
    rehearsal: bool
    on_step: Callable[[], None]

    def run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            row = self.state.steps.get(step.name) or Row(NO_TIME)
            self.state.steps[step.name] = row
            left_s = self.deadline - time.monotonic()
            status, reason = SKIPPED, self._cannot(step)
            if not reason and left_s < self._shortest_s(step):
                status = NO_TIME
                reason = f"needs {self._shortest_s(step):.0f} s at least, {max(0, left_s):.0f} are left"
            if reason and row.runs:  # what is known of it stays
                print(f"{status:<13}{step.name:<29}  {reason}", flush=True)
                continue
            if reason:
                row.status, row.reason = status, reason
            else:
                # how fast a CPU is, is not what a rehearsal is about
                self._run(step, row, left_s if self.rehearsal else min(step.longest_s, left_s))
            print(_line(step.name, row), flush=True)
            self.state.save(self.results)
            self.on_step()

    def _shortest_s(self, step: Step) -> float:
        return step.grace_s if self.rehearsal else step.shortest_s

    def _cannot(self, step: Step) -> str:
        lacking = [self.lacks[p] for p in (*BASE, *step.needs) if p in self.lacks]
        if lacking:
            return "; ".join(dict.fromkeys(lack.reason for lack in lacking))
        missing = [path for path in step.after if not (self.results / path).exists()]
        return f"{missing[0]} is not there: an earlier step leaves it" if missing else ""

    def _run(self, step: Step, row: Row, granted_s: float) -> None:
        print(f"{step.name}: {step.what} (up to {granted_s:.0f} s)", flush=True)
        row.status, row.reason, row.began_unix = RUNNING, "", time.time()
        row.granted_s, row.seconds, row.runs = round(granted_s, 1), None, row.runs + 1
        row.commit, row.board = self.state.commit, self.device.board
        self.state.save(self.results)
        began = time.monotonic()
        try:
            folder = self.results / step.name
            if self.rehearsal:
                folder.mkdir(exist_ok=True)
                for name, text in (step.in_rehearsal or {}).items():
                    (folder / name).write_text(text)
            commands = step.toy if self.rehearsal else step.commands
            row.status, row.reason = run_step(step, commands, self.results, self.env, granted_s)
            if row.status == DONE and step.training_steps and not self.rehearsal:
                trained = _trained(folder)
                if trained < step.training_steps:
                    row.status, row.reason = (
                        UNFINISHED,
                        f"{trained:,} of {step.training_steps:,} training steps",
                    )
        except Exception as error:  # whatever it is, it is this step's and must not cost the next ones
            row.status, row.reason = FAILED, f"{type(error).__name__}: {error}"
        except BaseException:
            row.status, row.reason = UNFINISHED, "interrupted"
            self.state.save(self.results)
            raise
        finally:
            row.seconds = round(time.monotonic() - began, 1)
        if row.status == FAILED:
            _show_end(self.results / f"{step.name}.log")


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


def _line(name: str, row: Row) -> str:
    took = f" {row.seconds:6.1f} s" if row.seconds is not None and row.status != NO_TIME else ""
    return f"{row.status:<13}{name:<29}{took}{'  ' + row.reason if row.reason else ''}"


def _show_end(log: Path) -> None:
    lines = log.read_bytes()[-8000:].decode(errors="replace").splitlines()[-SHOWN_LINES:]
    print("\n".join(f"    | {line}" for line in lines), flush=True)


def summarise(steps: Sequence[Step], state: State) -> str:
    rows = [_line(s.name, state.steps[s.name]) for s in steps if s.name in state.steps]
    counts = [state.steps[s.name].status for s in steps if s.name in state.steps]
    totals = ", ".join(f"{counts.count(status)} {status}" for status in dict.fromkeys(counts))
    return "\n".join([*rows, f"on {state.device}: {totals}", ""])


def write_archive(results: Path, prefix: Path) -> None:
    """All results but what a restart needs (`WORK`, checkpoints), as PREFIX.00, .01, ...: `cat PREFIX.* | tar xz` unpacks them.

    The parts are put in place one after the other when all are written; older ones are replaced.
    """

    def kept(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(info.name)
        left_out = WORK in path.parts or "work" in path.parts or path.name.startswith("checkpoint.pt")
        return None if left_out else info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as archive:
        archive.add(results, results.name, filter=kept)
    data = buffer.getvalue()
    parts = [data[i : i + ARCHIVE_PART_BYTES] for i in range(0, len(data), ARCHIVE_PART_BYTES)]
    staged = []
    for number, part in enumerate(parts):
        temporary = results / WORK / f"archive.{number:02d}"
        temporary.write_bytes(part)
        staged.append(temporary)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for old in prefix.parent.glob(f"{prefix.name}.[0-9][0-9]"):
        if int(old.suffix[1:]) >= len(parts):
            old.unlink()
    for number, temporary in enumerate(staged):
        shutil.move(temporary, f"{prefix}.{number:02d}")


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
            print(
                f"fetch where there is a network, then give WHEELS: {_fetch_all(lacks.values())}", flush=True
            )
        queue = Queue(
            results,
            state,
            device,
            lacks,
            _environment(results, options.rehearse),
            deadline,
            options.rehearse,
            on_step=lambda: _keep(results, options.archive, steps, state),
        )
        queue.run(chosen)
        _keep(results, options.archive, steps, state)
    print("\n" + summarise(steps, state), end="", flush=True)
    return ERROR if any(row.status == FAILED for row in state.steps.values()) else 0


def _fetch_all(lacks: Iterable[Lack]) -> str:
    return how_to_fetch(dict.fromkeys(lack.package for lack in lacks))


def _keep(results: Path, archive: Path | None, steps: Sequence[Step], state: State) -> None:
    (results / SUMMARY).write_text(summarise(steps, state))
    if archive is not None:
        write_archive(results, archive.absolute())


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
    lines = [f"{'step':<29}{'item':>5}{'shortest':>10}{'longest':>9}  what"]
    for step in steps:
        row = state.steps.get(step.name) if state else None
        lines.append(
            f"{step.name:<29}{step.item:>5}{step.shortest_s:>8.0f} s{step.longest_s:>7.0f} s  {step.what}"
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
