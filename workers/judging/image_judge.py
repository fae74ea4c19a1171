"""Who says whether an image shows its prompt: the protocol, and the judge of icon scenes.

A judge sees images and prompts, never which model drew them. Its readings are stored, so that the rule that turns them
into "accepted" can be applied again by someone else. A score can be added by `ImageMetric`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from millijoule.workers.factories import find_factory
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.scenes.prompts import parse_prompt
from millijoule.workers.scenes.scenes import Scene
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS

ICON_JUDGE = "icon-scene"


@dataclass(frozen=True)
class Judgement:
    """`icons` is a JSON list of [noun, colour, size, x, y] under the rule "icon-scene"; `score` is for "threshold"."""

    accepted: bool
    icons: str | None = None
    score: float | None = None


class ImageJudge(Protocol):
    """Says of each image whether it shows its prompt.

    Attributes:
        name: for people.
        sha256: of its weights and rules.
        rule: "icon-scene" or "threshold": how `accepted` follows from what is stored.
    """

    name: str
    sha256: str
    rule: str

    def judge(self, images: np.ndarray, prompts: Sequence[str], families: Sequence[str]) -> list[Judgement]:
        """Judge uint8 `[n, height, width, 3]`."""

    def features(self, images: np.ndarray) -> np.ndarray:
        """float32 `[n, d]`, for distances between sets of images."""

    def reference_features(self, prompts: Sequence[str], seed: int) -> np.ndarray | None:
        """float32 `[m, d]` of images as they should be, or None where there are none."""


class ImageMetric(Protocol):
    """A score per image, higher is better, such as a CLIP score. `name` and `sha256` say which."""

    name: str
    sha256: str

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Sequence[float]:
        """Score uint8 `[n, height, width, 3]`."""


class IconJudge:
    """The packaged verifier with the rules of `workers.judging.quality`; true renders are the reference (`train` extra).

    Attributes:
        nouns: prompts are read with the first so many nouns of the vocabulary, images by the verifier that knows them.
    """

    name = "icon-scene verifier"
    rule = ICON_JUDGE

    def __init__(self, nouns: int = DEFAULT_NOUNS) -> None:
        from millijoule.workers.judging.verifier import Verifier, packaged_weights

        self.nouns = nouns
        weights = packaged_weights(nouns)
        self.sha256 = file_sha256(weights)
        self._verifier = Verifier.load(weights)

    def judge(self, images: np.ndarray, prompts: Sequence[str], families: Sequence[str]) -> list[Judgement]:
        from millijoule.workers.judging.quality import judge

        found = []
        for prompt, family, raw in zip(prompts, families, self._verifier.read(images), strict=True):
            rounded = tuple(replace(i, x=round(i.x, 2), y=round(i.y, 2)) for i in raw.icons)
            reading = replace(raw, icons=rounded)  # what is stored is what is judged
            icons = json.dumps([[i.noun, i.colour, i.size, i.x, i.y] for i in reading.icons])
            found.append(Judgement(judge(self.scene(prompt), family, reading).correct, icons))
        return found

    def scene(self, prompt: str) -> Scene:
        """What `prompt` says."""
        return parse_prompt(prompt, self.nouns)[0]

    def features(self, images: np.ndarray) -> np.ndarray:
        return self._verifier.features(images)

    def reference_features(self, prompts: Sequence[str], seed: int) -> np.ndarray | None:
        from millijoule.workers.scenes.renderer import render_prompted

        scenes = [self.scene(prompt) for prompt in prompts]
        return np.concatenate([self.features(images) for images in render_prompted(scenes, seed)])


def load_judge(judge: str, nouns: int = DEFAULT_NOUNS) -> ImageJudge:
    """ "icon-scene" for prompts of the vocabulary's first `nouns`, or "python:MODULE:FACTORY", a function of yours that returns an
    `ImageJudge`."""
    return IconJudge(nouns) if judge == ICON_JUDGE else find_factory("--judge", judge)()


def load_metric(metric: str) -> ImageMetric:
    """The `ImageMetric` that "python:MODULE:FACTORY" returns, or "clip:FOLDER" for a CLIP model's score."""
    if metric.startswith("clip:"):
        from millijoule.workers.judging.clip_score import ClipScore

        return ClipScore(Path(metric.removeprefix("clip:")))
    return find_factory("--metric", metric)()
