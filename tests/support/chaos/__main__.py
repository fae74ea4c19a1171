"""`python -m support.chaos FOLDER [--seed N] [--storms N] [--costs N] [--ray N] [--pixels N] [--minutes M | --hours H] [--at-once N] [--record FILE]`

Four parts: storms over forked processes, pairs of runs that tell what a fault costs, storms over a real Ray cluster, and a
device that draws wrong pixels. With a time, the first three take turns, so that each has a third of it; otherwise each part
makes as many runs as asked for: storms, pairs of each kind, storms on Ray, runs with wrong pixels.

FOLDER keeps a line per run (`results.jsonl`), and the record is written anew after every few: the same command again goes on
where the last one was ended. Prints a line of JSON per run and a table at the end; exit code 1 where anything was lost, twice,
false or blamed wrongly.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.chaos import costs, wrong_pixels
from support.chaos.faults import SHAPES, Storm, calm, storm
from support.chaos.record import Results, next_seed, record, table
from support.chaos.runs import begin, result_of, run_in_child

from millijoule.jobs.machine import describe_machine
from millijoule.jobs.measuring.measurement import save_result

#: Between two looks at the clock: so many storms, kinds whose cost is told, storms on Ray.
TURN = {"storms": 12, "costs": 6, "ray": 1}
WRONG_PIXELS_RUNS = 5


class Suite:
    """All parts over one folder."""

    def __init__(self, folder: Path, seed: int, at_once: int) -> None:
        self.folder, self.seed, self.at_once = folder, seed, at_once
        self.environment = describe_machine()
        self.results = Results(folder, self.environment)
        self.undisturbed: list[dict[str, Any]] = []

    def add(self, part: str, result: dict[str, Any]) -> None:
        self.results.add(part, result)
        print(json.dumps(self.results.all[-1]), flush=True)

    def calm_runs(self) -> list[dict[str, Any]]:
        """Of each shape, once; whatever else runs has its hashes."""
        if not self.undisturbed:
            for i in range(len(SHAPES)):
                result = run_in_child(calm(i), self.folder / f"calm-{i}", None)
                if result["problems"] or result["outcome"] != "certified":
                    raise SystemExit(f"an undisturbed run is not as it should be: {result}")
                self.undisturbed.append(result)
        return self.undisturbed

    def storms(self, n: int) -> None:
        """`n` of them, some at a time."""
        undisturbed, running = self.calm_runs(), dict[int, Storm]()
        seed = next_seed(self.results, "storms", self.seed)
        while n or running:
            if n and len(running) < self.at_once:
                drawn, n = storm(seed), n - 1
                folder = self.folder / str(seed)
                running[begin(drawn, folder, undisturbed[drawn.shape])] = drawn
                seed += 1
            else:
                ended = running.pop(os.waitpid(-1, 0)[0])
                self.add("storms", result_of(ended, self.folder / str(ended.seed)))

    def costs(self, n: int, pairs: int | None = None) -> bool:
        """The next `n` pairs; False when there are `pairs` of each kind."""
        for _ in range(n):
            found = costs.next_kind(self.results.of("costs"), pairs)
            if found is None:
                return False
            kind, tried = found
            self.add("costs", costs.run_pair(kind, self.seed + tried, self.folder))
        return True

    def pixels(self, runs: int) -> None:
        """Until there are `runs` of them."""
        for i in range(len(self.results.of("pixels")), runs):
            undisturbed = self.calm_runs()[wrong_pixels.SHAPE]
            self.add("pixels", wrong_pixels.run(self.seed + i, self.folder, undisturbed))

    def ray(self, n: int) -> None:
        """In a process of its own, which may have threads."""
        for _ in range(n):
            seed = next_seed(self.results, "ray", self.seed)
            done = subprocess.run(
                [sys.executable, "-m", "support.chaos.on_ray", self.folder / "ray", "--seed", str(seed)],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith('{"run"')]
            failed = {
                "run": seed,
                "faults": [],
                "outcome": "unfinished",
                "store": "?",
                "processes": 0,
                "seconds": 0.0,
                "problems": [f"the run itself failed with {done.returncode}: see its log above"],
            }
            self.add("ray", json.loads(lines[-1]) if lines else failed)

    def write(self, path: Path | None) -> dict[str, Any]:
        whole = record(self.results)
        if path is not None:
            of = {"what": "storms of faults", "storms_at_once": self.at_once}
            save_result({**of, **whole, "environment": self.environment}, path)
        return whole


def take_turns(
    suite: Suite, parts: dict[str, Callable[[int], object]], until: float, path: Path | None
) -> None:
    """Whoever had the least time is next. How long a turn takes is told from its last one: none is begun that would be late."""
    took = dict.fromkeys(parts, 0.0)
    least = {name: suite.results.seconds(name) for name in parts}
    while True:
        ready = [n for n in parts if time.monotonic() + took[n] < until]
        if not ready:
            return
        name = min(ready, key=lambda n: least[n])
        began = time.monotonic()
        parts[name](TURN[name])
        took[name] = time.monotonic() - began
        least[name] += took[name]
        suite.write(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="support.chaos")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next has the next")
    parser.add_argument("--storms", type=int, default=0)
    parser.add_argument("--costs", type=int, default=0, help="pairs of each kind")
    parser.add_argument("--ray", type=int, default=0, help="storms on a real cluster")
    parser.add_argument("--pixels", type=int, default=0, help="runs with a device that draws wrong pixels")
    parser.add_argument(
        "--at-once", type=int, default=1, help="storms over forked processes; all else runs alone"
    )
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(relativeCreated)d %(process)d %(levelname)s %(name)s: %(message)s"
    )
    until = time.monotonic() + 60 * options.minutes + 3600 * options.hours
    suite = Suite(options.folder, options.seed, options.at_once)
    parts = {"storms": suite.storms, "costs": suite.costs, "ray": suite.ray}
    for part, asked in (("storms", options.storms), ("ray", options.ray)):
        while (more := asked - len(suite.results.of(part))) > 0:
            parts[part](min(more, TURN[part]))
            suite.write(options.record)
    while options.costs and suite.costs(TURN["costs"], options.costs):
        suite.write(options.record)
    suite.pixels(options.pixels)
    if options.minutes or options.hours:
        suite.pixels(WRONG_PIXELS_RUNS)
        take_turns(suite, parts, until, options.record)
    whole = suite.write(options.record)
    print(table(whole), file=sys.stderr)
    return int(whole["runs_with_problems"] > 0)


if __name__ == "__main__":
    sys.exit(main())
