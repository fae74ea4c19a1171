"""`millijoule bench coupling [RESULT.json]`: what a coupled oscillator model's K carries, and how often its oscillators change.

The model draws the suite as it is and with K set to zero, all else as it was trained; the verifier reads both. Of every step it
is counted how many oscillators keep their sine and cosine, and so need send nothing to others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.evaluate import EvaluateOptions, list_items
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import InputError


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Judge a coupled model with its coupling and without."""

    model: str = "coupled"
    """A model of coupled oscillators: of the package, or a file from `millijoule train`."""

    prompts_per_family: int = 834
    """Prompts of each of the six families, two images each."""

    seed: int = 0
    """Seed of prompts and images."""


def run(options: BenchOptions) -> int:
    from millijoule.workers.generators.file_hashes import file_sha256
    from millijoule.workers.generators.registry import model_path
    from millijoule.workers.judging import quality
    from millijoule.workers.judging.verifier import Verifier, packaged_weights
    from millijoule.workers.oscillators.draw import Drawing, Painter
    from millijoule.workers.oscillators.model_file import load_model
    from millijoule.workers.scenes.scenes import complete, scene_tokens

    if options.prompts_per_family < 1:
        raise InputError("--prompts-per-family: at least 1")
    path = model_path(options.model)
    painter, name = load_model(path)
    network = painter.network
    if network.coupling is None:
        raise InputError(f"--model {options.model}: its oscillators have no coupling")
    items = list_items(
        EvaluateOptions("", "", prompts_per_family=options.prompts_per_family, seed=options.seed),
        network.config.nouns,
    )
    tokens = scene_tokens([complete(i.scene, i.seed) for i in items])
    seeds = np.array([i.seed for i in items], np.uint64)
    verifier = Verifier.load(packaged_weights(network.config.nouns))
    families, prompts = np.array([i.family for i in items]), np.array([i.prompt for i in items])

    def judged(painter: Painter) -> dict[str, Any]:
        drawing = Drawing(painter)
        batches = [slice(k, k + 64) for k in range(0, len(items), 64)]
        images = np.concatenate([drawing.draw(tokens[some], seeds[some]) for some in batches])
        readings = verifier.read(images)
        verdicts = [quality.judge(i.scene, i.family, r) for i, r in zip(items, readings, strict=True)]
        return quality.family_means(np.array([v.correct for v in verdicts]), families, prompts)

    result = {
        **describe("a coupled model with its coupling and without", options),
        "model": {"name": name, "sha256": file_sha256(path)},
        "images": len(items),
        "score": judged(painter),
        "score_coupling_removed": judged(Painter.of(network.without_coupling())),
        "events": _events(network),
    }
    write_result(result, options.result)
    return COMPLETE


def _events(network: Any) -> dict[str, Any]:
    """Of every icon at every size, by step."""
    import torch

    from millijoule.workers.oscillators.config import VARIANTS
    from millijoule.workers.oscillators.events import count_events

    nouns = network.config.nouns
    counted = [
        count_events(network, noun, variant)
        for noun, variant in zip(
            torch.arange(nouns).repeat_interleave(VARIANTS).split(512),
            torch.arange(VARIANTS).repeat(nouns).split(512),
            strict=True,
        )
    ]
    weights = [min(512, nouns * VARIANTS - 512 * k) for k in range(len(counted))]
    return {
        name: [
            round(float(x), 5)
            for x in np.average([getattr(c, name) for c in counted], axis=0, weights=weights)
        ]
        for name in ("unchanged", "at_rest")
    }
