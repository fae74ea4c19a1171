"""How far a rung's images are from the dense ones of the same prompts and seeds, and whether they show what prompts say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import IMAGE_SIZE, Scene

RESAMPLES = 2000


@dataclass(frozen=True)
class Quality:
    """Of one rung's images, against the dense ones.

    Attributes:
        psnr_db: of the mean squared error over all images; None: not a pixel differs.
        feature_distance: mean distance of an image to its dense one, as a part of the mean distance between dense images of
            different requests: 0 is the same, 1 is another prompt's image.
        score: share of images that show what the prompt says; None: nobody can tell.
        score_loss: points (of 100) lost against the dense images, and a 95 % interval: bootstrap over prompts.
    """

    images: int
    psnr_db: float | None
    feature_distance: float
    score: float | None = None
    score_loss: tuple[float, float, float] | None = None


def compare(
    images: np.ndarray,
    dense: np.ndarray,
    prompts: Sequence[str],
    judge: Any,
    *,
    scored: bool,
) -> Quality:
    """Compare uint8 `[n, height, width, 3]` with `dense` of the same requests.

    Args:
        judge: an `ImageJudge`; the packaged one sees larger images reduced to its size.
        scored: whether it can say if an image shows its prompt.
    """
    seen, dense_seen = as_seen(images, judge), as_seen(dense, judge)
    apart = np.linalg.norm(judge.features(seen) - (reference := judge.features(dense_seen)), axis=1).mean()
    unlike = np.linalg.norm(reference - np.roll(reference, 1, axis=0), axis=1).mean()
    score = loss = None
    if scored:
        families = [family_of(parse_prompt(p)[0]) for p in prompts]
        right = accepted(judge, seen, prompts, families)
        score = float(right.mean())
        loss = score_loss(right, accepted(judge, dense_seen, prompts, families), prompts)
    distance = float(apart / unlike) if unlike else math.nan
    return Quality(len(images), psnr_db(images, dense), distance, score, loss)


def psnr_db(images: np.ndarray, dense: np.ndarray) -> float | None:
    """Peak signal to noise of uint8 images, from their mean squared error; None where they are the same."""
    squares = [
        np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
        for a, b in zip(images, dense, strict=True)
    ]
    error = float(np.mean(squares, dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else None


def score_loss(right: np.ndarray, dense: np.ndarray, prompts: Sequence[str]) -> tuple[float, float, float]:
    """Points lost from `dense` to `right`, bool `[n]` of the same requests, and the interval's ends.

    Images of one prompt are resampled together.
    """
    lost = (dense.astype(float) - right.astype(float)) * 100
    names, which = np.unique(np.asarray(prompts), return_inverse=True)
    sums, counts = np.bincount(which, lost), np.bincount(which)
    pick = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[pick].sum(1) / counts[pick].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(lost.mean()), float(low), float(high)


def accepted(judge: Any, images: np.ndarray, prompts: Sequence[str], families: Sequence[str]) -> np.ndarray:
    """bool `[n]`: which images the judge accepts."""
    return np.array([j.accepted for j in judge.judge(images, prompts, families)])


def as_seen(images: np.ndarray, judge: Any) -> np.ndarray:
    """`images` in the size that the judge reads: the packaged one's is 64x64, another one takes what comes."""
    from PIL import Image

    from millijoule.workers.judging.image_judge import IconJudge

    if not isinstance(judge, IconJudge) or images.shape[1:3] == (IMAGE_SIZE, IMAGE_SIZE):
        return images
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BOX)) for i in images])


def family_of(scene: Scene) -> str:
    """The GenEval family whose rule a prompt of icon scenes is judged by."""
    if len(scene.groups) == 2:
        if scene.relation is not None:
            return "position"
        coloured = all(group.colour is not None for group in scene.groups)
        return "colour attribution" if coloured else "two objects"
    if scene.groups and scene.groups[0].count > 1:
        return "counting"
    return "colours" if scene.groups and scene.groups[0].colour is not None else "single object"
