"""Several training runs of one thing: records of those that are complete, and intervals over them."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from millijoule.jobs.machine import find_commit
from millijoule.jobs.measuring.measurement import save_result, write_result
from millijoule.pipeline.comparison.statistics import student_quantile
from millijoule.workers.errors import InputError, UsageError

if TYPE_CHECKING:
    from millijoule.workers.training.loop import Trainer

#: What `recorded` keeps of a run, in its folder.
RECORD = "run.json"


def recorded(record: Path, settings: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returned when it ran with the same settings, and the commit of that, from the file `record`; where there is none,
    run it now.

    Raises:
        InputError: the record is of a run with other settings.
    """
    settings = json.loads(json.dumps(settings))
    if record.exists():
        try:
            kept = json.loads(record.read_text())
        except ValueError as error:
            raise InputError(f"{record}: damaged ({error}); delete it, and the run is done again") from error
        if kept["settings"] != settings:
            raise InputError(f"{record}: of a run with other settings; give the same, or another --output")
        return kept["found"]
    commit = find_commit()  # of when it began
    found = {**run(), "commit": commit}
    record.parent.mkdir(parents=True, exist_ok=True)
    unfinished = record.with_suffix(".part")
    unfinished.write_text(json.dumps({"settings": settings, "found": found}, indent=1) + "\n")
    unfinished.replace(record)
    return found


class FormOptions(Protocol):
    """Options of a measurement that trains several forms several times."""

    @property
    def forms(self) -> tuple[Any, ...]: ...
    @property
    def runs(self) -> int: ...
    @property
    def output(self) -> str: ...
    @property
    def result(self) -> str | None: ...


def run_forms(
    options: FormOptions,
    about: dict[str, Any],
    settings: Callable[[Any, int], dict[str, Any]],
    run: Callable[[Any, int], dict[str, Any]],
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> None:
    """Run every form with every seed, each `recorded` in a folder of its own, with the commit it ran at, and write the result:
    what is known so far after every run, with `summary` at the end.

    Raises:
        InputError: a form is given twice, or none.
    """
    if not options.forms or len(set(options.forms)) != len(options.forms):
        raise UsageError("--forms: one at least, and each once")
    rows: list[dict[str, Any]] = []
    for seed in range(options.runs):
        for form in options.forms:
            print(f"-- {form}, seed {seed}", flush=True)
            record = Path(options.output) / f"{form}-{seed}" / RECORD
            rows.append(recorded(record, settings(form, seed), partial(run, form, seed)))
            save_result({**about, "runs": rows}, options.result)
    write_result({**about, "summary": summary(rows), "runs": rows}, options.result)


def train_to_the_end(trainer: Trainer, folder: Path) -> None:
    """Train a run, or go on with it.

    Raises:
        KeyboardInterrupt: it was asked to stop (SIGTERM) before its last step; its checkpoint is written, and that is said.
    """
    from millijoule.workers.training.loop import run_training

    run_training(trainer, folder, resume=True)
    if trainer.step < trainer.config.steps:
        done = f"{trainer.step} of {trainer.config.steps} steps"
        print(f"{folder}: stopped after {done}; the same command goes on", file=sys.stderr)
        raise KeyboardInterrupt


def interval(values: Sequence[float]) -> list[float]:
    """Mean, and the 95 % interval of it over runs, by Student's t; the mean alone of one run."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [round(mean, 5)]
    half = student_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return [round(x, 5) for x in (mean, mean - half, mean + half)]
