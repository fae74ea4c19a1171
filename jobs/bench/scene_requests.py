"""What models are asked to draw while they are measured."""

from __future__ import annotations

import numpy as np

from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.scenes import FAMILIES, sample_scene
from millijoule.workers.schemas import ImageRequest


def scene_requests(count: int) -> list[ImageRequest]:
    """One image of each of `count` prompts: the six families in turn, held-out combinations."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(FAMILIES[i % len(FAMILIES)], rng, held_out=True) for i in range(count)]
    return [ImageRequest(str(i), 0, write_prompt(scene, rng), seed=i) for i, scene in enumerate(scenes)]
