"""Whether A's images are no worse than B's, by margins fixed beforehand. What cannot be shown has failed.

Both arms drew the same prompts with the same seeds. Differences are resampled by prompt, within families; A passes a
metric if the end of the two-sided interval that is worse for A keeps the margin, which is a one-sided test at
half the level. Missing images, numbers that are not finite, too few images or prompts, blank and repeated images fail
the gate before any comparison. Nothing here reads files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millijoule.pipeline.comparison.registration import Gate, Request
from millijoule.pipeline.comparison.statistics import draw_indices

#: With fewer prompts the bootstrap says nothing.
MIN_PROMPTS = 20


@dataclass(frozen=True)
class ArmImages:
    """One image for each registered request, in their order; None where there is none.

    `accepted` is by the judge's rule alone. `features` is `[n, d]`, or None.
    """

    accepted: Sequence[bool | None]
    blank: Sequence[bool | None]
    repeated: Sequence[bool]
    features: np.ndarray | None
    metrics: Mapping[str, Sequence[float | None]]

    def counted(self) -> list[bool]:
        """Which images count as accepted: blank and repeated ones do not."""
        return [
            bool(accepted) and blank is False and not repeated
            for accepted, blank, repeated in zip(self.accepted, self.blank, self.repeated, strict=True)
        ]


@dataclass(frozen=True)
class GateResult:
    """`checks` has one entry per test: what was found, what is allowed, whether it passed."""

    passed: bool
    checks: dict[str, dict[str, Any]]

    @property
    def failures(self) -> tuple[str, ...]:
        return tuple(name for name, check in self.checks.items() if not check["passed"])


def judge_gate(
    gate: Gate,
    confidence: float,
    requests: Sequence[Request],
    arms: Mapping[str, ArmImages],
    reference: np.ndarray | None,
) -> GateResult:
    """Run every registered test.

    Args:
        gate: as registered.
        confidence: of the two-sided intervals.
        requests: as registered.
        arms: "A" and "B".
        reference: features `[m, d]` of what images should look like, None where there are none.
    """
    checks: dict[str, dict[str, Any]] = {}

    def check(name: str, passed: bool, **found: Any) -> None:
        checks[name] = {"passed": bool(passed), **found}

    whole = True
    for side, arm in arms.items():
        present = sum(a is not None and b is not None for a, b in zip(arm.accepted, arm.blank, strict=True))
        complete = present == len(requests) and present >= gate.min_images
        whole &= complete
        check(f"images {side}", complete, found=present, registered=len(requests), least=gate.min_images)
        for name, flags, most in (
            ("blank", arm.blank, gate.max_blank),
            ("repeated", arm.repeated, gate.max_duplicates),
        ):
            share = sum(bool(f) for f in flags) / max(1, len(requests))
            check(f"{name} {side}", share <= most, found=share, most=most)
    by_family = _prompts_by_family(requests)
    prompts = sum(len(p) for p in by_family.values())
    least = min((len(p) for p in by_family.values()), default=0)
    check("prompts", prompts >= MIN_PROMPTS and least >= 2, found=prompts, least=MIN_PROMPTS)
    if not whole or not checks["prompts"]["passed"]:
        return GateResult(False, checks)

    level = (1 - confidence) / 2
    a, b = arms["A"], arms["B"]

    def compare(name: str, of_a: np.ndarray, of_b: np.ndarray, margin: float, unseen: float) -> None:
        point, low, high = _mean_difference(of_a - of_b, by_family, gate, level)
        low = min(low, point - unseen)
        check(
            name,
            math.isfinite(low) and low >= -margin,
            a=_family_mean(of_a, by_family),
            b=_family_mean(of_b, by_family),
            difference=point,
            low=low,
            high=high,
            margin=margin,
        )

    score_a, score_b = (np.array(arm.counted(), dtype=np.float64) for arm in (a, b))
    compare("score", score_a, score_b, gate.score_margin, _unseen(level, prompts))
    check("frechet", **_frechet_check(gate, level, requests, a.features, b.features, reference))
    for metric in gate.metrics:
        name = f"metric {metric.name}"
        of_a, of_b = (_finite(arm.metrics.get(metric.name, ()), len(requests)) for arm in (a, b))
        if of_a is None or of_b is None:
            check(name, False, found="missing or not finite", margin=metric.margin)
        else:
            compare(name, of_a, of_b, metric.margin, unseen=0.0)
    return GateResult(all(c["passed"] for c in checks.values()), checks)


def accepted_spread(
    gate: Gate, confidence: float, requests: Sequence[Request], arms: Mapping[str, ArmImages]
) -> float | None:
    """Half the interval of log(accepted share of A / of B) over prompts: how far other prompts might move the ratio.

    None where an arm has no accepted image in some resample.
    """
    by_family = _prompts_by_family(requests)
    sums = {side: np.array(arm.counted(), dtype=np.float64) for side, arm in arms.items()}
    drawn = {side: np.zeros(gate.resamples) for side in arms}
    for f, prompts in enumerate(by_family.values()):
        pick = draw_indices(gate.seed + f, gate.resamples, len(prompts))
        for side in arms:
            drawn[side] += np.array([sums[side][rows].sum() for rows in prompts])[pick].sum(1)
    if any((d <= 0).any() for d in drawn.values()):
        return None
    level = (1 - confidence) / 2
    low, high = np.quantile(np.log(drawn["A"]) - np.log(drawn["B"]), (level, 1 - level))
    n_prompts = sum(len(p) for p in by_family.values())
    return max(float(high - low) / 2, _unseen(level, n_prompts))


def _unseen(level: float, prompts: int) -> float:
    """The share of prompts that may behave in a way that none of these did (the rule of three, at this level).

    Resampling cannot show what did not occur: where both arms agree on every prompt, its interval has no width.
    """
    return -math.log(level) / prompts


def _prompts_by_family(requests: Sequence[Request]) -> dict[str, list[np.ndarray]]:
    """Rows of each prompt, by family."""
    rows: dict[str, dict[str, list[int]]] = {}
    for i, request in enumerate(requests):
        rows.setdefault(request.family, {}).setdefault(request.prompt, []).append(i)
    return {family: [np.array(r) for r in prompts.values()] for family, prompts in rows.items()}


def _family_mean(values: np.ndarray, by_family: Mapping[str, list[np.ndarray]]) -> float:
    return float(np.mean([values[np.concatenate(prompts)].mean() for prompts in by_family.values()]))


def _mean_difference(
    difference: np.ndarray, by_family: Mapping[str, list[np.ndarray]], gate: Gate, level: float
) -> tuple[float, float, float]:
    """Mean over families of a difference per image, with its interval over prompts."""
    drawn = np.zeros(gate.resamples)
    for f, prompts in enumerate(by_family.values()):
        sums = np.array([difference[rows].sum() for rows in prompts])
        counts = np.array([len(rows) for rows in prompts])
        pick = draw_indices(gate.seed + f, gate.resamples, len(prompts))
        drawn += sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(drawn / len(by_family), (level, 1 - level))
    return _family_mean(difference, by_family), float(low), float(high)


def _finite(values: Sequence[float | None], n: int) -> np.ndarray | None:
    found = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return found if len(found) == n and np.isfinite(found).all() else None


def _frechet_check(
    gate: Gate,
    level: float,
    requests: Sequence[Request],
    a: np.ndarray | None,
    b: np.ndarray | None,
    reference: np.ndarray | None,
) -> dict[str, Any]:
    """A's distance may exceed B's by the registered share: the upper end of FD(A) - (1 + margin) FD(B) is at most 0."""
    failed = {"passed": False, "margin": gate.frechet_margin}
    if a is None or b is None or reference is None:
        return {**failed, "found": "features are missing"}
    width = reference.shape[1]
    if a.shape != b.shape or a.shape != (len(requests), width):
        return {**failed, "found": "features have unequal shapes"}
    if not all(np.isfinite(x).all() for x in (a, b, reference)):
        return {**failed, "found": "features are not finite"}
    if min(len(a), len(reference)) <= width:
        return {**failed, "found": f"too few images for {width} features"}
    a, b = a.astype(np.float64), b.astype(np.float64)
    true = _moments(reference.astype(np.float64), np.ones(len(reference)))
    root = _root(true[1])

    def distances(weights: np.ndarray) -> tuple[float, float]:
        return _frechet(_moments(a, weights), true, root), _frechet(_moments(b, weights), true, root)

    names = {name: i for i, name in enumerate(dict.fromkeys((r.family, r.prompt) for r in requests))}
    of_request = np.array([names[r.family, r.prompt] for r in requests])
    pick = draw_indices(gate.seed, gate.frechet_resamples, len(names))
    samples = []
    for row in pick:
        distance_a, distance_b = distances(np.bincount(row, minlength=len(names))[of_request].astype(float))
        samples.append(distance_a - (1 + gate.frechet_margin) * distance_b)
    distance_a, distance_b = distances(np.ones(len(requests)))
    excess = distance_a - (1 + gate.frechet_margin) * distance_b
    # resampled sets repeat images, which lengthens both distances: only the spread is taken from them
    high = excess + float(np.quantile(samples, 1 - level) - np.mean(samples))
    return {
        "passed": math.isfinite(high) and high <= 0,
        "a": distance_a,
        "b": distance_b,
        "excess": excess,
        "high": high,
        "margin": gate.frechet_margin,
    }


def _moments(x: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = weights @ x / weights.sum()
    centred = x - mean
    return mean, (centred * weights[:, None]).T @ centred / (weights.sum() - 1)


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def _frechet(
    found: tuple[np.ndarray, np.ndarray], true: tuple[np.ndarray, np.ndarray], true_root: np.ndarray
) -> float:
    """Frechet distance of two Gaussians from their moments (Heusel et al. 2017); 0 at least."""
    middle = np.sqrt(np.linalg.eigvalsh(true_root @ found[1] @ true_root).clip(min=0)).sum()
    mean = np.square(found[0] - true[0]).sum()
    return float(max(0.0, mean + np.trace(found[1]) + np.trace(true[1]) - 2 * middle))
