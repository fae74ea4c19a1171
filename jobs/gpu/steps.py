"""The steps of `make gpu`, read from `steps.toml`: what waits for a GPU, as commands with time limits.

Needs the standard library only: it is read before anything is installed.
"""

from __future__ import annotations

import re
import shlex
import signal
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

#: What every step imports.
BASE = (
    "torch",
    "deepspeed",
    "numpy",
    "pyarrow",
    "msgspec",
    "nvidia-ml-py",
    "pillow",
    "rich",
    "safetensors",
    "tyro",
)


@dataclass(frozen=True)
class Step:
    """One check or measurement; its commands run one after the other, the first that fails ends it.

    A command is the words that follow the Python interpreter. One may hold `{folder}` (the step's own), `{results}` (all
    steps'), and `{minutes}` and `{seconds}`: what is left of the step's time when the command starts, less `reserve_s`.

    Attributes:
        seconds: with less time left than the first it is not begun: nothing useful would come of it; after the
            second it is ended.
        commands: on a GPU.
        toy: in a rehearsal.
        needs: packages beside `BASE`, by their names in registries.
        after: a path under the results that another step leaves and this one reads.
        reserve_s: kept from `{minutes}` and `{seconds}`, for starting, and for the commands that follow.
        grace_s: what it gets after it was asked to end, before it is killed; part of its time.
        accepted: exit codes that are no failure.
        training_steps: of a training; one that stands at fewer, in the log of `{folder}/run`, is not done.
        goes_on: what it has when its time is over is kept, and the next call continues it, as with every training.
    """

    name: str
    what: str
    seconds: tuple[float, float]
    commands: tuple[tuple[str, ...], ...]
    toy: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    after: str = ""
    reserve_s: float = 0.0
    grace_s: float = 5.0
    accepted: tuple[int, ...] = (0,)
    training_steps: int = 0
    goes_on: bool = False


def fill(words: tuple[str, ...], values: Mapping[str, str]) -> tuple[str, ...]:
    """`words` with `{name}` replaced where `values` has the name."""
    return tuple(re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), word) for word in words)


def end_signal(words: tuple[str, ...]) -> signal.Signals:
    """What asks a command to end when time is over: pytest writes its results on Ctrl-C only."""
    return signal.SIGINT if words[:2] == ("-m", "pytest") else signal.SIGTERM


def read_steps(path: Path) -> tuple[Step, ...]:
    """The steps in `path`, whose first lines explain the format."""
    table = tomllib.loads(path.read_text())
    return tuple(_read_step(dict(raw), table["words"]) for raw in table["step"])


def _read_step(raw: dict[str, Any], words: Mapping[str, str]) -> Step:
    def line(command: str, more: str) -> tuple[str, ...]:
        (text,) = fill((f"{command} {more}",), words)
        program, *rest = shlex.split(text)
        return ("-m", program if program == "pytest" else f"millijoule.jobs.{program}", *rest)

    commands, board, toy = raw.pop("commands"), raw.pop("board", []), raw.pop("toy", [])
    raw["commands"] = tuple(line(c, more) for c, more in zip_longest(commands, board, fillvalue=""))
    raw["toy"] = tuple(
        line(c, more) for c, more in zip_longest(commands, toy, fillvalue="") if more is not False
    )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Step(**fields)


STEPS = read_steps(Path(__file__).with_suffix(".toml"))
