"""A model for rehearsals of `make gpu`: it draws noise at once, so that what is tried out is everything around a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millijoule.workers.generators.protocol import GeneratedBatch, GeneratorInfo
from millijoule.workers.schemas import ImageRequest

SIZE = 64


class NoiseModel:
    """Images `[n, 64, 64, 3]` of noise that follows from each request's seed."""

    info = GeneratorInfo(
        name="noise", sha256="0" * 64, width=SIZE, height=SIZE, num_inference_steps=1, batch_size=4
    )

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        return GeneratedBatch(
            np.stack(
                [np.random.default_rng(r.seed).integers(256, size=(SIZE, SIZE, 3)) for r in requests]
            ).astype(np.uint8)
        )


def noise(device: str) -> NoiseModel:
    """For `--model python:millijoule.jobs.gpu.rehearsal:noise`."""
    return NoiseModel()
