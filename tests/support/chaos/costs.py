"""What a fault costs: runs in pairs, one with a single fault and one that differs from it in nothing but that.

Both have the same seed, and run one after the other, with nobody else. Every image of these jobs costs 1 J and 30 ms on its
board, so a joule lost is an image drawn once more; loading a model and warming up cost 1.2 J.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from support.chaos.faults import (
    AFTER,
    BETWEEN,
    DRIVER_ENDS,
    IN_PARTS,
    KINDS,
    PARTS,
    Fault,
    Round,
    Storm,
    job_of,
)
from support.chaos.runs import run_in_child

#: Kinds that cost something: what is damaged after the job costs it nothing, by construction.
KINDS_WITH_COST = tuple(kind for kind in KINDS if kind not in AFTER)
#: Three hosts of one board, nine shards of three images.
SHAPE = 3
#: Fewer pairs of one kind give a rough figure.
LEAST_PAIRS = 5


def pair(kind: str, seed: int) -> tuple[Storm, Storm]:
    """The run without the fault, and the one with it."""
    rng = random.Random(f"{kind} {seed}")
    shape = IN_PARTS if kind in PARTS else SHAPE
    plan = job_of(shape, seed)
    plan = replace(plan, prompts=tuple(f"image {i} mj=1000 ms=30" for i in range(len(plan.prompts))))
    fault = Fault(kind, rng.uniform(0.1, 0.6), 0.8)
    # one that is interrupted leaves an orderly house, and what it costs varies little; parts are left by dead workers
    # (and a commit that is not collected yet by one that was killed)
    killed = kind in PARTS or kind == "commit damaged"
    ended = Round(end=("driver killed", 1) if killed else ("driver interrupted", rng.randint(4, 6)))
    without: tuple[Round, ...]
    if kind in DRIVER_ENDS:
        without, rounds = (Round(),), (Round(end=(kind, rng.randint(1, 3))), Round())
    elif kind in BETWEEN:
        without, rounds = (ended, Round()), (ended, Round(before=(kind,)))
    elif kind == "reader killed":  # readers come after workers that die
        worker = Fault("worker killed", fault.at_s)
        without, rounds = (Round(faults=(worker,)),), (Round(faults=(worker, fault)),)
    else:
        without, rounds = (Round(),), (Round(faults=(fault,)),)
    return Storm(seed, shape, plan, without), Storm(seed, shape, plan, rounds)


def run_pair(kind: str, seed: int, folder: Path) -> dict[str, Any]:
    """Both runs, judged like any storm, and what the fault cost; `came` is 0 where it found nobody to strike."""
    without, disturbed = pair(kind, seed)
    name = f"{kind} {seed}".replace(" ", "-")
    first = run_in_child(without, folder / f"{name}-without", None)
    second = run_in_child(disturbed, folder / name, first if "hashes" in first else None)
    second.pop("hashes", None)
    came = second["faults"].count(kind) - first["faults"].count(kind)
    both = "unfinished" not in (first["outcome"], second["outcome"])
    result = {
        **second,
        "kind": kind,
        "came": came if both else 0,
        "problems": first["problems"] + second["problems"],
        "processes": first["processes"] + second["processes"],
        "both_seconds": round(first["seconds"] + second["seconds"], 2),
    }
    if both and came > 0:
        result["seconds_lost"] = round((second["done_s"] - first["done_s"]) / came, 3)
        result["joules_lost"] = round((second["spent_mj"] - first["spent_mj"]) / came / 1000, 3)
    return result


def next_kind(results: Sequence[dict[str, Any]], pairs: int | None = None) -> tuple[str, int] | None:
    """The kind that has come least, and how often it was tried; None where all came in `pairs`, or in three times as many did not."""
    came = Counter(r["kind"] for r in results if r["came"] > 0)
    tried = Counter(r["kind"] for r in results)
    kind = min(KINDS_WITH_COST, key=lambda k: max(came[k], tried[k] / 3))
    if pairs is not None and max(came[kind], tried[kind] / 3) >= pairs:
        return None
    return kind, tried[kind]


def of_kind(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error over pairs of one kind, and in how many of them the job's total was marked missing."""
    found: dict[str, Any] = {"pairs": len(results)}
    for name in ("seconds_lost", "joules_lost"):
        values = [r[name] for r in results]
        found[name] = round(statistics.mean(values), 2)
        if len(values) > 1:
            found[f"{name}_error"] = round(statistics.stdev(values) / len(values) ** 0.5, 2)
    found["energy_missing"] = sum(r["outcome"] == "missing" for r in results)
    return found


def summary(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """By kind. Two pairs are the least that say how far to trust their mean; a figure of fewer than `LEAST_PAIRS` says so."""
    for kind in AFTER:
        yield kind, "after the job: none by construction"
    for kind in KINDS_WITH_COST:
        pairs = [r for r in results if r["kind"] == kind and r["came"] > 0]
        if len(pairs) > 1:
            yield kind, of_kind(pairs) | ({"rough": True} if len(pairs) < LEAST_PAIRS else {})
        elif results:
            yield kind, f"not told: {len(pairs)} of {LEAST_PAIRS} pairs"
