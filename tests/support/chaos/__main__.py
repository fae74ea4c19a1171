"""`python -m support.chaos FOLDER [--seed N] [--runs N | --minutes M | --hours H] [--at-once N] [--record FILE]`: storms, one after another.

Prints a line of JSON per run and a table at the end; exit code 1 where anything was lost, twice, false or blamed wrongly.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.chaos.faults import KINDS, SHAPES, Storm, calm, storm
from support.chaos.runs import begin, result_of, run_in_child

from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import write_result


def summary(results: Sequence[dict[str, Any]], undisturbed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Faults by kind. A fault is survived where its run ended without a problem.

    What one costs in seconds and joules beyond the shape's undisturbed run is told from runs with faults of one kind only:
    their mean, per fault. Both vary from run to run, and may be below zero.
    """
    kinds: dict[str, dict[str, Any]] = {k: {"injected": 0, "survived": 0} for k in KINDS}
    lost: dict[str, list[tuple[float, float]]] = defaultdict(list)
    missing: Counter[str] = Counter()
    for result in results:
        for kind in result["faults"]:
            kinds[kind]["injected"] += 1
            kinds[kind]["survived"] += not result["problems"]
        if len(set(result["faults"])) == 1 and result["outcome"] != "unfinished":
            calm_run, n = undisturbed[result["shape"]], len(result["faults"])
            missing[result["faults"][0]] += result["outcome"] == "missing"
            seconds = (result["seconds"] - calm_run["seconds"]) / n
            lost[result["faults"][0]].append(
                (seconds, (result["spent_mj"] - calm_run["spent_mj"]) / n / 1000)
            )
    for kind, pairs in lost.items():
        kinds[kind]["seconds_lost"] = round(sum(s for s, _ in pairs) / len(pairs), 2)
        kinds[kind]["joules_lost"] = round(sum(j for _, j in pairs) / len(pairs), 2)
        kinds[kind]["runs_of_this_kind_only"] = len(pairs)
        kinds[kind]["of_these_energy_missing"] = missing[kind]
    return {
        "runs": len(results),
        "runs_with_problems": sum(bool(r["problems"]) for r in results),
        "faults_injected": sum(k["injected"] for k in kinds.values()),
        "faults_survived": sum(k["survived"] for k in kinds.values()),
        "kinds_injected": sum(k["injected"] > 0 for k in kinds.values()),
        "processes": sum(r["processes"] for r in results),
        "outcomes": {
            o: sum(r["outcome"] == o for r in results) for o in ("certified", "missing", "unfinished")
        },
        "kinds": kinds,
        "problems": [{"seed": r["run"], "problems": r["problems"]} for r in results if r["problems"]],
    }


def table(counts: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{'fault':32} {'injected':>8} {'survived':>8} {'s lost':>8} {'J lost':>8}"]
    for kind, row in counts["kinds"].items():
        cost = [
            f"{row[name]:8.2f}" if name in row else f"{'':>8}" for name in ("seconds_lost", "joules_lost")
        ]
        lines.append(f"{kind:32} {row['injected']:8} {row['survived']:8} {' '.join(cost)}".rstrip())
    lines.append(f"{'all':32} {counts['faults_injected']:8} {counts['faults_survived']:8}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.chaos")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next has the next")
    parser.add_argument("--runs", type=int)
    parser.add_argument(
        "--at-once", type=int, default=1, help="more than one: what faults cost is told less well"
    )
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(relativeCreated)d %(process)d %(levelname)s %(name)s: %(message)s"
    )
    environment = describe_machine()
    until = time.monotonic() + 60 * options.minutes + 3600 * options.hours
    undisturbed = [run_in_child(calm(i), options.folder / f"calm-{i}", None) for i in range(len(SHAPES))]
    for result in undisturbed:
        if result["problems"] or result["outcome"] != "certified":
            raise SystemExit(f"an undisturbed run is not as it should be: {result}")
    results: list[dict[str, Any]] = []
    running: dict[int, Storm] = {}
    seed = options.seed
    while True:
        begun = seed - options.seed
        more = begun < options.runs if options.runs is not None else time.monotonic() < until
        if more and len(running) < options.at_once:
            drawn = storm(seed)
            running[begin(drawn, options.folder / str(seed), undisturbed[drawn.shape])] = drawn
            seed += 1
        elif running:
            ended = running.pop(os.waitpid(-1, 0)[0])
            results.append(result_of(ended, options.folder / str(ended.seed)))
            print(json.dumps(results[-1]), flush=True)
        else:
            break
    counts = summary(results, undisturbed)
    print(table(counts), file=sys.stderr)
    if options.record is not None:
        of = {"what": "storms of faults", "first_seed": options.seed, "at_once": options.at_once}
        write_result({**of, **counts, "environment": environment}, str(options.record))
    return int(counts["runs_with_problems"] > 0)


if __name__ == "__main__":
    sys.exit(main())
