"""What every measurement does alike: options, result file, processes of their own.

`python -m millijoule.jobs.measuring.measurement MODULE FUNCTION ARGUMENTS` is what `start_alone` runs.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.machine import describe_machine

#: Options that are paths of whoever measured: in no result.
PATHS = ("result", "output", "folder", "before")


@dataclass(frozen=True)
class ResultOptions:
    """What every measurement takes."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""


def describe(what: str, options: Any) -> dict[str, Any]:
    """The head of a result: what was measured, how, and where."""
    told = {name: value for name, value in asdict(options).items() if name not in PATHS}
    return {"what": what, "options": told, "environment": describe_machine()}


def save_result(result: dict[str, Any], path: str | Path | None) -> None:
    """Save `result` as JSON at `path`, in one move, if one was given."""
    if path is not None:
        unfinished = Path(f"{path}.part")
        unfinished.write_text(json.dumps(result, indent=2) + "\n")
        unfinished.replace(path)


def write_result(result: dict[str, Any], path: str | Path | None) -> None:
    """Save `result` at `path`, and print it."""
    save_result(result, path)
    print(json.dumps(result, indent=2))


def start_alone(function: Callable[..., Any], *arguments: Any) -> subprocess.Popen[str]:
    """Start `function(*arguments)` in a process of its own, whose memory and CPU time are nobody else's.

    Args:
        function: of a module; what it returns is JSON.
        arguments: JSON values.
    """
    command = [sys.executable, "-m", __name__, function.__module__, function.__name__, json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str]) -> Any:
    """What the function of `start_alone` returned.

    Raises:
        RuntimeError: it failed; its traceback has gone to stderr.
    """
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with exit code {process.returncode}")
    return json.loads(output.splitlines()[-1])


def run_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, from a process of its own; see `start_alone`."""
    return answer_of(start_alone(function, *arguments))


if __name__ == "__main__":
    module, name, given = sys.argv[1:]
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(given))))
