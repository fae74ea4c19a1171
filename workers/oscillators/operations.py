"""How many operations images take: those that are really done, counted from what is drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from millijoule.workers.oscillators.canvas import Icons
from millijoule.workers.oscillators.config import SIDES
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.integer_network import Layer
from millijoule.workers.scenes.scenes import CELL, IMAGE_SIZE

#: Multiplications, additions, shifts and look-ups per oscillator and step beside the coupling's sums; counted from
#: `IntegerNetwork.phases`, and from `kernels.oscillator.relax` with a coupling.
ELEMENTWISE, ELEMENTWISE_COUPLED = 11, 23

#: Per pixel of an icon: its share looked up, and three levels blended of two.
BLENDING = 16

#: Per pixel of an image: three levels of its ground set.
GROUND = 3


def operations(
    painter: Painter, tokens: np.ndarray, *, dense: bool = False, steps: int | None = None
) -> dict[str, Tensor]:
    """Operations of each image by part ("text", "dynamics", "decoder", "canvas"), int64 `[images]`; a multiply-accumulate is two.

    A shape that an image shows several times is drawn once. `dense`: as if all cells of its window were drawn.
    """
    network, config = painter.network, painter.network.config
    steps = steps or config.steps
    icons = Icons.of(torch.from_numpy(tokens))
    once = torch.unique(torch.stack([icons.image, icons.whole.long(), icons.noun, icons.size], 1), dim=0)
    image, whole, noun, size = once.unbind(1)
    counts = torch.stack([painter.ink.counts(bool(kind)) for kind in range(len(SIDES))])
    sides = torch.tensor(SIDES)
    cells = sides[whole] ** 2 if dense else counts[whole, noun, size]
    text = _sums(network.read_code) + _sums(network.drive)
    coupled = network.coupling is not None
    per_step = (ELEMENTWISE_COUPLED if coupled else ELEMENTWISE) * config.oscillators
    if coupled:
        per_step += 2 * 2 * config.oscillators * (5 * config.channels + 2 * config.rank)
    common = config.cells * _sums(network.near)
    enlarged = config.cells * _sums(network.enlarge)
    per_cell = _sums(network.near_again) + _sums(network.mix) + _sums(network.share)
    drawn = common + whole * enlarged + cells * per_cell
    shown = (sides[icons.whole.long()] * CELL) ** 2 * BLENDING
    result = {}
    for name, of, values in (
        ("text", image, torch.full_like(image, text)),
        ("dynamics", image, torch.full_like(image, steps * per_step)),
        ("decoder", image, drawn),
        ("canvas", icons.image, shown),
    ):
        result[name] = torch.zeros(len(tokens), dtype=torch.int64).index_add_(0, of, values)
    result["canvas"] += GROUND * IMAGE_SIZE**2
    return result


def _sums(layer: Layer) -> int:
    return 2 * layer.weights.numel()
