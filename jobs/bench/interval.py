"""`millijoule bench interval [RESULT.json]`: how often the interval of `millijoule verify` covers the true ratio.

Runs are made up: blocks of 60 s in quadruples ABBA and BAAB, energy that rises by 4 % over the run, normal noise on its log,
and in one case few accepted images. The interval is the product's own, with the statistic as registered by default. Also
what drift does to the ratio in quadruples, and to AA...BB.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import tyro

from millijoule.jobs.bench.result import write_result
from millijoule.jobs.entry import COMPLETE, run_command
from millijoule.jobs.environment import environment
from millijoule.pipeline.comparison.registration import Statistics
from millijoule.pipeline.comparison.statistics import MeasuredBlock, energy_ratio

DRIFT = 0.04
#: Energy of a block of B without noise, at the start of a run; millijoules.
BLOCK_MJ = 6e6
BLOCK_SECONDS = 60.0
BLOCK_IMAGES = 40


@dataclass(frozen=True)
class Case:
    """Runs of one kind. `noise` is the standard deviation of a block's log energy; `ratio` A's energy over B's.

    An image is accepted with `accepted_a` or `accepted_b`, one by one.
    """

    quadruples: int
    noise: float
    ratio: float = 0.970
    accepted_a: float = 1.0
    accepted_b: float = 1.0

    @property
    def true_ratio(self) -> float:
        """B's energy per accepted image over A's."""
        return self.accepted_a / self.accepted_b / self.ratio


CASES = (Case(10, 0.005), Case(5, 0.05), Case(10, 0.0, 0.5, accepted_a=0.6, accepted_b=0.2))


@dataclass(frozen=True)
class BenchOptions:
    """Measure how often the interval covers the true ratio."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

    runs: int = 600
    """Made-up runs of each case."""


def run(options: BenchOptions) -> int:
    statistics = Statistics()
    result = {
        "what": "interval",
        "options": {"runs": options.runs},
        "confidence": statistics.confidence,
        "rows": [
            {**asdict(case), "runs": options.runs, **coverage(case, options.runs, statistics)}
            for case in CASES
        ],
        "drift": drift_effect(),
        "environment": environment(),
    }
    write_result(result, options.result)
    return COMPLETE


def coverage(case: Case, runs: int, statistics: Statistics) -> dict[str, Any]:
    """Share of `runs` in which the interval holds the true ratio; a run without an interval does not cover."""
    covered = 0
    orders = (["ABBA", "BAAB"] * case.quadruples)[: case.quadruples]
    for seed in range(runs):
        found = energy_ratio(make_blocks(orders, case, seed), statistics)
        if found is not None and found.low is not None and found.high is not None:
            covered += found.low <= case.true_ratio <= found.high
    return {"covered": covered, "covered_share": covered / runs}


def drift_effect() -> dict[str, float]:
    """A's energy over B's as found without noise, by the order of the blocks."""
    case = Case(10, 0.0)
    found = {}
    for name, orders in (("ABBA, BAAB", ["ABBA", "BAAB"] * 5), ("AA...BB", ["A" * 20 + "B" * 20])):
        blocks = make_blocks(orders, case, 0)
        energy = {s: math.fsum(b.energy_mj or 0 for b in blocks if b.side == s) for s in "AB"}
        found[name] = energy["A"] / energy["B"]
    return {"true": case.ratio, "drift": DRIFT, **found}


def make_blocks(orders: Sequence[str], case: Case, seed: int) -> list[MeasuredBlock]:
    """One made-up run: a block per letter of `orders`, whose numbers are the quadruples'."""
    rng = np.random.default_rng(seed)
    sides = [(number, side) for number, order in enumerate(orders) for side in order]
    blocks = []
    for i, (number, side) in enumerate(sides):
        level = 1 + DRIFT * i / (len(sides) - 1)
        energy_mj = (
            BLOCK_MJ
            * level
            * (case.ratio if side == "A" else 1)
            * math.exp(case.noise * rng.standard_normal())
        )
        share = case.accepted_a if side == "A" else case.accepted_b
        accepted = int(rng.binomial(BLOCK_IMAGES, share))
        blocks.append(MeasuredBlock(number, side, round(energy_mj), BLOCK_IMAGES, accepted, BLOCK_SECONDS))
    return blocks


def main(argv: list[str] | None = None) -> int:
    return run_command("bench interval", BenchOptions, run, argv)


if __name__ == "__main__":
    sys.exit(main())
