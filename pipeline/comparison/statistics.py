"""How many times less energy A needs than B per accepted image, and how sure that is.

Energies and counts of measured blocks go in; the ratio, its interval, the systematic budget and the verdict come out.
The same numbers give the same answer on any machine: resampling draws on a generator whose raw stream
NumPy promises to keep (NEP 19). Nothing here reads files.

**Interval.** Energy and accepted images of each arm are added up over the complete quadruples (ABBA or BAAB) and
divided; the statistic is the log of B's quotient over A's. A quadruple is resampled as a whole: drift that is linear in
time cancels within it, and a block alone is not independent of its neighbours. Sums rather than a mean of block ratios,
because a slow arm has few accepted images per block, and the log of a small count is biased. The interval is Hesterberg's expanded
percentile (The American Statistician 69, 2015): percentiles of the bootstrap distribution at levels that give
Student's interval where the clusters are normal. Plain percentile and BCa intervals are too short for the ten
clusters of a usual run (they lack the factor n/(n-1) and the t quantile), and BCa's acceleration, estimated from ten
values, is mostly noise for log ratios, which are nearly symmetric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from millijoule.pipeline.comparison.registration import Statistics, Systematics
from millijoule.pipeline.energy.evidence import MEANINGS


@dataclass(frozen=True)
class MeasuredBlock:
    """One block of a quadruple. `energy_mj` is that of all images, rejected ones too; None: not measured."""

    quadruple: int
    side: str  # "A" or "B"
    energy_mj: int | None
    images: int
    accepted: int
    seconds: float


@dataclass(frozen=True)
class RatioInterval:
    """B's energy per image over A's, and its interval; `low` and `high` are None where there is none."""

    ratio: float
    low: float | None
    high: float | None
    quadruples: int  # complete ones


def complete_quadruples(blocks: Sequence[MeasuredBlock]) -> list[list[MeasuredBlock]]:
    """The quadruples of which all four blocks have energy: half of one would not cancel drift."""
    by_number: dict[int, list[MeasuredBlock]] = {}
    for block in blocks:
        by_number.setdefault(block.quadruple, []).append(block)
    return [
        four
        for _, four in sorted(by_number.items())
        if sorted(b.side for b in four) == ["A", "A", "B", "B"] and all(b.energy_mj is not None for b in four)
    ]


@dataclass(frozen=True)
class SideSums:
    """Totals of one side's blocks; `energy_mj` is whole, because complete quadruples have all energies."""

    blocks: int
    energy_mj: int
    images: int
    accepted: int
    seconds: float


def sum_sides(blocks: Sequence[MeasuredBlock]) -> dict[str, SideSums]:
    """Totals over the complete quadruples by side, "A" and "B"."""
    complete = [b for four in complete_quadruples(blocks) for b in four]
    sums = {}
    for side in "AB":
        own = [b for b in complete if b.side == side]
        sums[side] = SideSums(
            len(own),
            sum(b.energy_mj or 0 for b in own),
            sum(b.images for b in own),
            sum(b.accepted for b in own),
            math.fsum(b.seconds for b in own),
        )
    return sums


def energy_ratio(
    blocks: Sequence[MeasuredBlock], statistics: Statistics, *, per: str = "accepted"
) -> RatioInterval | None:
    """B's energy per image over A's.

    Args:
        blocks: of the comparison, in any order.
        statistics: as registered.
        per: "accepted" images, all "images", or "seconds".

    Returns:
        None where no quadruple is complete or an arm has no such image or no energy; an interval is given only with
        enough quadruples and few enough missing ones.
    """
    quadruples = complete_quadruples(blocks)
    if not quadruples:
        return None
    table = np.array(  # [quadruples, 4]: energy and count of A, energy and count of B
        [
            [
                math.fsum(getattr(b, what) for b in four if b.side == side)
                for side in "AB"
                for what in ("energy_mj", per)
            ]
            for four in quadruples
        ],
        dtype=np.float64,
    )
    value = float(_log_ratio(table.sum(0)))
    if not math.isfinite(value):
        return None
    n, planned = len(quadruples), len({b.quadruple for b in blocks})
    if n < statistics.min_quadruples or (planned - n) > statistics.max_missing * planned:
        return RatioInterval(math.exp(value), None, None, n)
    pick = draw_indices(statistics.seed, statistics.resamples, n)
    samples = _log_ratio(table[pick].sum(1))
    level = expanded_level(n, statistics.confidence)
    with np.errstate(invalid="ignore"):  # a block without energy or images makes samples infinite
        low, high = np.quantile(samples, (level, 1 - level))
    if not (math.isfinite(low) and math.isfinite(high)):
        return RatioInterval(math.exp(value), None, None, n)
    return RatioInterval(math.exp(value), math.exp(low), math.exp(high), n)


def _log_ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(sums[..., 2]) - np.log(sums[..., 3]) - np.log(sums[..., 0]) + np.log(sums[..., 1])


def draw_indices(seed: int, resamples: int, n: int) -> np.ndarray:
    """`[resamples, n]` indices below n, the same for a seed in every version of NumPy."""
    raw = np.random.PCG64(seed).random_raw(resamples * n)
    return ((raw >> np.uint64(32)) * np.uint64(n) >> np.uint64(32)).astype(np.int64).reshape(resamples, n)


def expanded_level(n: int, confidence: float) -> float:
    """The percentile of n clusters' bootstrap distribution at which the lower end of the interval stands."""
    t = student_quantile((1 + confidence) / 2, n - 1)
    return NormalDist().cdf(-math.sqrt(n / (n - 1)) * t)


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t for whole degrees of freedom and p >= 0.5, by bisection of the exact series.

    Source: Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_inside(middle, degrees) < 2 * p - 1 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_inside(theta: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan theta)."""
    cos, odd = math.cos(theta), degrees % 2
    term, total = (cos if odd else 1.0), 0.0
    for k in range(1, (degrees + 1) // 2 if odd else degrees // 2 + 1):
        total += term
        term *= cos * cos * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total


# ---- systematic budget ------------------------------------------------------------------------------------------


def systematic_budget(
    blocks: Sequence[MeasuredBlock],
    systematics: Systematics,
    *,
    measured: bool,
    controls: Mapping[str, float | None],
    prompts: float | None,
) -> dict[str, float | None]:
    """What may shift the log ratio in all blocks alike; the parts are added up, not squared.

    Gain: both arms run on one device under one meter, so a proportional error cancels and has no part here.

    Args:
        blocks: of the comparison.
        systematics: as registered.
        measured: whether the energies come from counters; the offset and the delay of a counter do not
            concern the estimate, whose own error is unknown and not in the budget.
        controls: log ratios by control ("same", "telemetry A", ...), None where not measured.
        prompts: half the interval of the log ratio of accepted shares over prompts, None where unknown.

    Returns:
        Parts of the log ratio by name; None where a part could not be found, which leaves the whole unknown.
    """
    a, b = sum_sides(blocks).values()
    budget: dict[str, float | None] = {}
    if measured:
        budget["offset"] = budget["counter delay"] = None
        if min(a.energy_mj, a.seconds, b.energy_mj, b.seconds) > 0:
            per_watt = abs(a.seconds / (a.energy_mj / 1000) - b.seconds / (b.energy_mj / 1000))
            budget["offset"] = systematics.offset_watts * per_watt
            budget["counter delay"] = systematics.counter_delay_s * (
                a.blocks / a.seconds + b.blocks / b.seconds
            )
    for name, value in controls.items():
        budget[name] = None if value is None else abs(value)
    budget["prompts"] = prompts
    return budget


def total(budget: Mapping[str, float | None]) -> float | None:
    """The sum of all parts; None where one is unknown."""
    parts = [p for p in budget.values() if p is not None]
    return math.fsum(parts) if len(parts) == len(budget) and all(map(math.isfinite, parts)) else None


# ---- verdict ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """`outcome`: "holds", "does not hold", "not established", or for an estimate "holds for the estimate only"."""

    outcome: str
    widened_low: float | None
    reasons: tuple[str, ...] = ()


def judge_claim(
    factor: float,
    interval: RatioInterval | None,
    systematic: float | None,
    evidence: str,
    gate_passed: bool,
    obstacles: Sequence[str] = (),
) -> Claim:
    """Whether "A needs at least `factor` times less" is shown: the interval's lower end, widened, must reach it.

    Args:
        obstacles: further reasons why nothing is established, such as a control that failed.
    """
    reasons = list(obstacles)
    if interval is None:
        reasons.append("no ratio: energy or accepted images are missing in an arm")
    elif interval.low is None:
        reasons.append("no interval: too few complete quadruples or accepted images")
    if systematic is None:
        reasons.append("the systematic budget has a part that could not be found")
    if interval is None or interval.low is None or systematic is None or reasons:
        return Claim("not established", None, tuple(reasons))
    widened = interval.low * math.exp(-systematic)
    if not gate_passed:
        return Claim("does not hold", widened, ("the quality gate failed",))
    if widened < factor:
        return Claim("does not hold", widened, (f"the widened lower end is below {factor:g}",))
    return Claim("holds for the estimate only" if evidence == "E0" else "holds", widened)


def verdict_line(
    interval: RatioInterval | None, confidence: float, boundary: str, evidence: str, gate_passed: bool
) -> str:
    """The one sentence to quote."""
    if interval is None:
        head = "The energy of A against B per accepted image is not established"
    else:
        head = f"A needs {interval.ratio:.4g} times less energy than B per accepted image, "
        if interval.low is None or interval.high is None:
            head += "not established (no interval)"
        else:
            head += f"{100 * confidence:.4g} % interval [{interval.low:.4g}, {interval.high:.4g}]"
    return (
        f"{head}, boundary {boundary}, evidence class {evidence} ({MEANINGS[evidence]}), "
        f"quality gate {'passed' if gate_passed else 'failed'}"
    )
