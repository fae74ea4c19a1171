"""What storms have left: a line of JSON per run in a file that only grows, and the record that is made of all lines.

A line has its `part` ("storms", "costs", "pixels" or "ray"), its seed as `run`, and the commit it ran with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.chaos import costs, wrong_pixels
from support.chaos.faults import KINDS, WRONG_PIXELS

OUTCOMES = ("certified", "missing", "unfinished")


class Results:
    """The lines in `folder`, of earlier calls, too."""

    def __init__(self, folder: Path, environment: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.commit = environment["commit"]
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, part: str, result: dict[str, Any]) -> None:
        result = {"part": part, "commit": self.commit, **result}
        result.pop("hashes", None)
        self.all.append(result)
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def of(self, part: str) -> list[dict[str, Any]]:
        return [r for r in self.all if r["part"] == part]

    def seconds(self, part: str) -> float:
        """How long its runs took, one after the other."""
        return sum(r.get("both_seconds", r["seconds"]) for r in self.of(part))


def counts(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over runs of one part. A fault is survived where its run ended without a problem."""
    of_kinds: dict[str, dict[str, int]] = {}
    for result in results:
        for kind in result["faults"]:
            row = of_kinds.setdefault(kind, {"injected": 0, "survived": 0})
            row["injected"] += 1
            row["survived"] += not result["problems"]
    return {
        "runs": len(results),
        "runs_with_problems": sum(bool(r["problems"]) for r in results),
        "faults_injected": sum(k["injected"] for k in of_kinds.values()),
        "faults_survived": sum(k["survived"] for k in of_kinds.values()),
        "kinds_injected": len(of_kinds),
        "processes": sum(r["processes"] for r in results),
        "outcomes": {o: sum(r["outcome"] == o for r in results) for o in OUTCOMES},
        "seconds": round(sum(r.get("both_seconds", r["seconds"]) for r in results)),
        "kinds": of_kinds,
    }


def ray_costs(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """On a real cluster a fault costs, as a mean over all: what jobs took and used beyond an undisturbed one."""
    whole = [r for r in results if r["outcome"] != "unfinished" and r["faults"]]
    faults = sum(len(r["faults"]) for r in whole)
    if not faults:
        return {}
    return {
        "seconds_lost_per_fault": round(sum(r["done_s"] - r["calm_done_s"] for r in whole) / faults, 2),
        "joules_lost_per_fault": round(
            sum(r["spent_mj"] - r["calm_spent_mj"] for r in whole) / faults / 1000, 2
        ),
        "calm_seconds": [r["calm_done_s"] for r in whole],
        "calm_joules": [r["calm_spent_mj"] / 1000 for r in whole],
    }


def record(results: Results) -> dict[str, Any]:
    """All parts in one, with the words that each part has for what a fault costs."""
    parts = {name: counts(results.of(name)) for name in ("storms", "costs", "ray")}
    cost = dict(costs.summary(results.of("costs")))
    kinds: dict[str, dict[str, Any]] = {}
    for kind in [*KINDS, *sorted(parts["ray"]["kinds"].keys() - set(KINDS))]:
        rows = [part["kinds"].get(kind, {"injected": 0, "survived": 0}) for part in parts.values()]
        kinds[kind] = {name: sum(row[name] for row in rows) for name in ("injected", "survived")}
        kinds[kind]["of_these_on_ray"] = rows[-1]["injected"]
        if kind in cost:
            kinds[kind]["cost"] = cost[kind]
    for part in parts.values():
        del part["kinds"]
    of_ray = results.of("ray")
    parts["ray"] |= ray_costs(of_ray) | {"stores": sorted({r["store"] for r in of_ray})}
    names = ("runs", "faults_injected", "faults_survived", "processes")
    return {
        **{name: sum(part[name] for part in parts.values()) for name in names},
        "runs_with_problems": sum(bool(r["problems"]) for r in results.all),
        "kinds_injected": sum(k["injected"] > 0 for k in kinds.values()),
        "outcomes": {o: sum(part["outcomes"][o] for part in parts.values()) for o in OUTCOMES},
        "kinds": kinds,
        "parts": parts,
        "not_seen": {WRONG_PIXELS: wrong_pixels.summary(results.of("pixels"))},
        "problems": [{n: r[n] for n in ("part", "run", "problems")} for r in results.all if r["problems"]],
        "seeds": {name: _seeds(results.of(name)) for name in ("storms", "ray")},
        "commits": sorted({r["commit"] for r in results.all}),
    }


def _seeds(results: Sequence[dict[str, Any]]) -> str:
    """As "0-249, 318"."""
    parts: list[list[int]] = []
    for seed in sorted({r["run"] for r in results}):
        if parts and parts[-1][-1] == seed - 1:
            parts[-1][1:] = [seed]
        else:
            parts.append([seed])
    return ", ".join("-".join(map(str, part)) for part in parts)


def table(whole: Mapping[str, Any]) -> str:
    """The record for people."""
    heads = f"{'injected':>8} {'survived':>8} {'on Ray':>8} {'s lost':>14}  {'J lost':>14}"
    lines = [f"{'fault':34} {heads}"]
    for kind, row in whole["kinds"].items():
        cost = row.get("cost", "")
        words = (
            f" {cost}" if isinstance(cost, str) else f" {_figure(cost, 'seconds')} {_figure(cost, 'joules')}"
        )
        lines.append(
            f"{kind:34} {row['injected']:8} {row['survived']:8} {row['of_these_on_ray']:8}{words}".rstrip()
        )
    on_ray = whole["parts"]["ray"]["faults_injected"]
    lines.append(f"{'all':34} {whole['faults_injected']:8} {whole['faults_survived']:8} {on_ray:8}")
    return "\n".join(lines)


def _figure(cost: Mapping[str, Any], what: str) -> str:
    figure = f"{cost[f'{what}_lost']:.2f} ±{cost.get(f'{what}_lost_error', float('nan')):.2f}{'?' if 'rough' in cost else ' '}"
    return f"{figure:>15}"


def next_seed(results: Results, part: str, first: int) -> int:
    """The first from `first` on that has not run."""
    done = {r["run"] for r in results.of(part)}
    while first in done:
        first += 1
    return first
