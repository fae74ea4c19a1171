"""What every rung draws: prompts of a file, or icon scenes nobody was trained on, each with two seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.prompts import read_prompts
from millijoule.workers.diffusion.pipeline_folder import ICON_SCENES, PipelineFolder
from millijoule.workers.errors import InputError
from millijoule.workers.scenes.prompts import parse_prompt, write_prompt
from millijoule.workers.scenes.scenes import FAMILIES, sample_scene
from millijoule.workers.schemas import ImageRequest
from millijoule.workers.storage.inputs import expand_inputs


def icon_requests(count: int, seed: int) -> list[ImageRequest]:
    """Held-out prompts of the six families in turn: those of `millijoule evaluate`, the same first ones for any `count`."""
    found: list[ImageRequest] = []
    k = 0
    while len(found) < count:
        for f, family in enumerate(FAMILIES):
            rng = np.random.default_rng((seed, 1, f, k))
            prompt = write_prompt(sample_scene(family, rng, held_out=True), rng)
            for own in rng.integers(2**63, size=2):
                found.append(ImageRequest(str(len(found)), 0, prompt, int(own)))
        k += 1
    return found[:count]


def file_requests(prompts: str, count: int, seed: int) -> list[ImageRequest]:
    """The first prompts of what `prompts` stands for (see `millijoule generate --prompts`), at most `count` images.

    Raises:
        InputError: there is no prompt, or the files cannot be read.
    """
    found: list[str] = []
    for chunk in read_prompts(tuple(expand_inputs((prompts,))), PlanOptions()):
        found += chunk.rows.column("prompt").to_pylist()
        if 2 * len(found) >= count:
            break
    if not found:
        raise InputError(f"--prompts {prompts}: no prompt in it")
    seeds = np.random.default_rng(seed).integers(2**63, size=2 * len(found))
    return [ImageRequest(str(i), 0, found[i // 2], int(seeds[i])) for i in range(min(count, 2 * len(found)))]


def are_icon_scenes(folder: PipelineFolder | None, requests: Sequence[ImageRequest]) -> bool:
    """Whether the pipeline in `folder` (None: a model that is none) reads icon scenes, and all prompts are some: the packaged
    verifier can then score images."""
    return (folder is None or folder.defaults.prompts == ICON_SCENES) and not any(
        parse_prompt(r.prompt)[1] for r in requests
    )
