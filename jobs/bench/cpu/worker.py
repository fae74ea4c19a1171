"""`millijoule bench worker [RESULT.json]`: where the processor time of an image goes, from its prompt to closed books.

Each side is a process of its own on one thread, without Ray: the stages one by one on the same images, and a whole job of one
worker on a local disk, of which what no stage accounts for is "leases, rows, commits, books". With `--before` the code of another
checkout does the same, in turn with this one's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.bench.stages import commit_of
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring import worker_stages
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import InputError, UsageError

#: What a bar of the picture is, in the order in which an image passes.
PARTS = ("requests", "prompts", "drawing", "encoding", "writing", "leases, rows, commits, books")


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure where a worker's processor time goes."""

    images: int = 8192
    """Images of each side and round: different prompts of the six families."""

    rounds: int = 3
    """Rounds of each process, of which the least counts, stage by stage."""

    turns: int = 2
    """Processes of each side, in turn."""

    before: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """A checkout of another commit, installed with its own `.venv` or not, that is measured beside this one."""

    picture: str | None = None
    """Draw the two sides to this PNG."""


def run(options: BenchOptions) -> int:
    if min(options.images, options.rounds, options.turns) < 1:
        raise UsageError("--images, --rounds, --turns: at least 1")
    sides: dict[str, str | None] = {"now": None}
    if options.before is not None:
        if not Path(options.before, "infra", "typing", "millijoule").exists():
            raise InputError(f"--before {options.before}: no checkout of Millijoule")
        sides = {"before": options.before, "now": None}
    rows = [
        {"side": side, "turn": turn, **_measured(checkout, options)}
        for turn in range(options.turns)
        for side, checkout in (sides.items() if turn % 2 == 0 else reversed(sides.items()))
    ]
    result = {
        **describe("processor time per image by stage, one thread", options),
        "before": commit_of(options.before),
        "cpu_us_per_image": {side: parts([row for row in rows if row["side"] == side]) for side in sides},
        "rows": rows,
    }
    write_result(result, options.result)
    if options.picture is not None:
        from millijoule.jobs.measuring.waterfall import draw_waterfall

        Path(options.picture).write_bytes(draw_waterfall(result["cpu_us_per_image"], PARTS))
    return COMPLETE


def parts(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each of `PARTS`, the least of all rows, and "job", their sum."""
    stages = [row["cpu_us_per_image"] for row in rows]
    least = {name: min(stage[name] for stage in stages) for name in stages[0]}
    known = {
        "requests": least["requests"],
        "prompts": least["prompts"],
        "drawing": max(least["prompts and drawing"] - least["prompts"], 0.0),
        "encoding": least["encoding"],
        "writing": least["writing"],
    }
    return {**known, PARTS[-1]: least["job"] - sum(known.values()), "job": least["job"]}


def _measured(checkout: str | None, options: BenchOptions) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkout is not None:
        environment["PYTHONPATH"] = str(Path(checkout, "infra", "typing"))
    command = [sys.executable, worker_stages.__file__, str(options.images), str(options.rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
