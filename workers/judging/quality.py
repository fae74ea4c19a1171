"""How good generated images are: scores of what they show, distances between sets of them, and how sure one can be.

Rules of the six families follow GenEval (Ghosh et al. 2023); the reading is the verifier's. Set metrics work on any
features. Nothing here draws or reads images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from millijoule.workers.judging.verifier import IconReading, SceneReading
from millijoule.workers.scenes.scenes import Group, Scene

#: An icon's centre must lie at least this many pixels further along a relation's axis than the other's.
RELATION_MARGIN = 4.0

#: Images of one prompt whose pixels differ by less (root mean square, in levels of 255) are near duplicates. Two
#: renders of one scene in which nothing but place and shade varies differ by 5 and more.
DUPLICATE_LEVELS = 2.0


@dataclass(frozen=True)
class Verdict:
    """`correct` by the family's rule; `strict` if the image shows exactly what the prompt says and nothing else."""

    correct: bool
    strict: bool


def judge(scene: Scene, family: str, reading: SceneReading) -> Verdict:
    """Judge what was read from an image against the scene its prompt describes (open parts are free)."""
    found = [[icon for icon in reading.icons if _matches(icon, group)] for group in scene.groups]
    match family:
        case "counting":
            correct = len(found[0]) == scene.groups[0].count
        case "position":
            correct = any(
                holds(scene.relation, a, b) for a in found[0] for b in found[1] if scene.relation is not None
            )
        case _:  # what is asked for is there; more of it does no harm
            correct = all(len(icons) >= group.count for icons, group in zip(found, scene.groups, strict=True))
    return Verdict(correct, _is_exactly(scene, reading, found))


def holds(relation: str, first: IconReading, second: IconReading) -> bool:
    """Whether `first` is `relation` `second`: further along its axis than across it, and by a margin."""
    along, across = _apart(relation, first, second)
    return along >= RELATION_MARGIN and along > abs(across)


def _apart(relation: str, first: IconReading, second: IconReading) -> tuple[float, float]:
    """Pixels from `second` to `first` along the relation's axis, and across it."""
    right, down = first.x - second.x, first.y - second.y
    return {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]


def _matches(icon: IconReading, group: Group) -> bool:
    return icon.noun == group.noun and group.colour in (None, icon.colour) and group.size in (None, icon.size)


def _is_exactly(scene: Scene, reading: SceneReading, found: list[list[IconReading]]) -> bool:
    if scene.background not in (None, reading.background):
        return False
    if Counter(i.noun for i in reading.icons) != Counter({g.noun: g.count for g in scene.groups}):
        return False
    if any(len(icons) != group.count for icons, group in zip(found, scene.groups, strict=True)):
        return False
    if scene.relation is not None:
        # whatever lies across: icons of groups stand side by side
        return all(_apart(scene.relation, a, b)[0] >= RELATION_MARGIN for a in found[0] for b in found[1])
    return True


def frechet_distance(features: np.ndarray, true: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to two feature sets `[n, d]` (Heusel et al. 2017), in float64.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), with square roots of symmetric matrices only.
    """
    a, b = features.astype(np.float64), true.astype(np.float64)
    ca, cb = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(ca)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ cb @ root).clip(min=0)
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(0.0, mean + np.trace(ca) + np.trace(cb) - 2 * np.sqrt(middle).sum()))


def precision_recall(features: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of feature sets `[n, d]` and `[m, d]`.

    Precision is the share of generated points that lie within the distance of some true point to its
    `NEIGHBOURS`-th neighbour among the true; recall the same with the sets exchanged.
    """
    true_reach, reach = _reach(true), _reach(features)
    inside = np.zeros(len(features), bool)
    covered = np.zeros(len(true), bool)
    for start in range(0, len(features), _BLOCK):
        d = _squares(features[start : start + _BLOCK], true)
        inside[start : start + _BLOCK] = (d <= true_reach).any(1)
        covered |= (d <= reach[start : start + _BLOCK, None]).any(0)
    return float(inside.mean()), float(covered.mean())


NEIGHBOURS = 3
_BLOCK = 1000


def _squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x.astype(np.float64), y.astype(np.float64)
    return np.maximum(np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T, 0)


def _reach(points: np.ndarray) -> np.ndarray:
    """Squared distance of each point to its `NEIGHBOURS`-th neighbour in the set."""
    blocks = (_squares(points[start : start + _BLOCK], points) for start in range(0, len(points), _BLOCK))
    return np.concatenate([np.partition(d, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for d in blocks])


def duplicate_rates(images: np.ndarray, prompts: Sequence[str]) -> tuple[float, float]:
    """Share of images, uint8 `[n, h, w, 3]`, with an exact, and with a near duplicate among those of the same prompt."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_prompt[prompt].append(i)
    exact = near = 0
    for rows in by_prompt.values():
        flat = images[rows].reshape(len(rows), -1)
        gaps = np.sqrt(_squares(flat, flat) / flat.shape[1])  # squares of integers: exact
        np.fill_diagonal(gaps, np.inf)
        exact += (gaps.min(1) == 0).sum()
        near += (gaps.min(1) < DUPLICATE_LEVELS).sum()
    return exact / len(images), near / len(images)


def family_means(
    correct: np.ndarray, families: np.ndarray, prompts: np.ndarray, *, resamples: int = 2000
) -> dict[str, tuple[float, float, float]]:
    """Share correct by family and their mean ("mean"), each with a 95 % bootstrap interval over prompts.

    All `[n]`, of each image; images of one prompt are resampled together.
    """
    rng = np.random.default_rng(0)
    found, drawn = {}, []
    for family in dict.fromkeys(families):
        here = families == family
        names, which = np.unique(prompts[here], return_inverse=True)
        sums, counts = np.bincount(which, correct[here]), np.bincount(which)
        pick = rng.integers(len(names), size=(resamples, len(names)))
        samples = sums[pick].sum(1) / counts[pick].sum(1)
        drawn.append(samples)
        found[str(family)] = (float(correct[here].mean()), *_interval(samples))
    mean = float(np.mean([value for value, _, _ in found.values()]))
    return {**found, "mean": (mean, *_interval(np.mean(drawn, 0)))}


def _interval(samples: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(samples, (0.025, 0.975))
    return float(low), float(high)
