"""What a training shows of its generator: fixed prompts, one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from millijoule.workers.generators.protocol import Generator, known_nouns
from millijoule.workers.judging.contact_sheet import draw_contact_sheet
from millijoule.workers.scenes.prompts import write_prompt
from millijoule.workers.scenes.scenes import FAMILIES, sample_scene
from millijoule.workers.schemas import ImageRequest


def write_sample_sheet(generator: Generator, path: Path, count: int = 32) -> None:
    """Draw fixed prompts of the six families, in held-out combinations, with seeds 0, 1, 2 ... as one PNG. None are picked."""
    nouns = known_nouns(generator)
    rng = np.random.default_rng(0)
    families = [FAMILIES[i % len(FAMILIES)] for i in range(count)]
    scenes = [sample_scene(family, rng, held_out=True, nouns=nouns) for family in families]
    prompts = [write_prompt(scene, rng) for scene in scenes]
    requests = [ImageRequest(str(i), 0, prompt, seed=i) for i, prompt in enumerate(prompts)]
    images = generator.generate(requests).images
    path.write_bytes(draw_contact_sheet([Image.fromarray(image) for image in images], prompts))
