"""`millijoule bench coupling [RESULT.json]`: what a coupled oscillator model's K carries, and how often its oscillators change.

The model draws the suite as it is and with K set to zero, all else as it was trained; the verifier reads both. Of every step it
is counted how many oscillators keep their sine and cosine, and so need send nothing to others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.evaluate import EvaluateOptions, list_items
from millijoule.jobs.measuring.icon_scores import judge_scenes
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.workers.errors import InputError, UsageError


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
    from millijoule.workers.judging.quality import family_means
    from millijoule.workers.oscillators.draw import Painter
    from millijoule.workers.oscillators.model_file import load_model

    if options.prompts_per_family < 1:
        raise UsageError("--prompts-per-family: at least 1")
    path = model_path(options.model)
    painter, name = load_model(path)
    network = painter.network
    if network.coupling is None:
        raise InputError(f"--model {options.model}: its oscillators have no coupling")
    items = list_items(
        EvaluateOptions("", "", prompts_per_family=options.prompts_per_family, seed=options.seed),
        network.config.nouns,
    )
    families, prompts = np.array([i.family for i in items]), np.array([i.prompt for i in items])

    def score(painter: Painter) -> dict[str, Any]:
        return family_means(judge_scenes(painter, items), families, prompts)

    result = {
        **describe("a coupled model with its coupling and without", options),
        "model": {"name": name, "sha256": file_sha256(path)},
        "images": len(items),
        "score": score(painter),
        "score_coupling_removed": score(Painter.of(network.without_coupling())),
        "events": _events(network),
    }
    write_result(result, options.result)
    return COMPLETE


def _events(network: Any) -> dict[str, Any]:
    """Of every icon at every size, by step."""
    import torch

    from millijoule.workers.oscillators.config import VARIANTS
    from millijoule.workers.oscillators.events import count_events

    noun, variant = torch.arange(network.config.nouns), torch.arange(VARIANTS)
    counted = count_events(network, noun.repeat_interleave(VARIANTS), variant.repeat(len(noun)))
    return {name: [round(share, 5) for share in shares] for name, shares in asdict(counted).items()}
