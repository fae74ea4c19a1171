"""What the verifier says of scenes that a network of oscillators draws, beside a whole `millijoule evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from millijoule.jobs.evaluate import Item

if TYPE_CHECKING:
    from millijoule.workers.oscillators.draw import Painter


def judge_scenes(painter: Painter, items: Sequence[Item]) -> np.ndarray:
    """Whether each image shows what its prompt says, bool `[items]`, by the packaged verifier that knows the painter's nouns."""
    from millijoule.workers.judging.quality import judge
    from millijoule.workers.judging.verifier import Verifier, packaged_weights
    from millijoule.workers.oscillators.draw import Drawing
    from millijoule.workers.oscillators.generator import BATCH_SIZE

    drawing = Drawing(painter)
    tokens, seeds = scene_arrays(items)
    batches = [slice(k, k + BATCH_SIZE) for k in range(0, len(items), BATCH_SIZE)]
    images = np.concatenate([drawing.draw(tokens[some], seeds[some]) for some in batches])
    readings = Verifier.load(packaged_weights(painter.network.config.nouns)).read(images)
    verdicts = (judge(i.scene, i.family, r) for i, r in zip(items, readings, strict=True))
    return np.array([verdict.correct for verdict in verdicts])


def scene_arrays(items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the completed scenes, and seeds, uint64."""
    from millijoule.workers.scenes.scenes import complete, scene_tokens

    tokens = scene_tokens([complete(item.scene, item.seed) for item in items])
    return tokens, np.array([item.seed for item in items], np.uint64)
