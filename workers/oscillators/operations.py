"""How many operations images take: those that are really done, counted from what is drawn."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.oscillator import STENCIL
from millijoule.workers.oscillators.canvas import Icons
from millijoule.workers.oscillators.config import SIDES, OscillatorConfig, layer_shapes
from millijoule.workers.oscillators.ink import InkCells
from millijoule.workers.scenes.scenes import CELL, IMAGE_SIZE

#: Multiplications, additions, shifts and look-ups per oscillator and step beside the coupling's sums; counted from
#: `IntegerNetwork.phases`, and from `kernels.oscillator.relax` with a coupling.
ELEMENTWISE, ELEMENTWISE_COUPLED = 11, 23

#: Per pixel of an icon: its share looked up, and three levels blended of two.
BLENDING = 16

#: Per pixel of an image: three levels of its ground set.
GROUND = 3


def operations(
    config: OscillatorConfig,
    ink: InkCells,
    tokens: np.ndarray,
    *,
    dense: bool = False,
    steps: int | None = None,
) -> dict[str, Tensor]:
    """Operations of each image by part ("text", "dynamics", "decoder", "canvas"), int64 `[images]`; a multiply-accumulate is two.

    A shape that an image shows several times is drawn once. `dense`: as if all cells of its window were drawn.
    """
    icons = Icons.of(torch.from_numpy(tokens))
    once = torch.unique(torch.stack([icons.image, icons.whole.long(), icons.noun, icons.size], 1), dim=0)
    image, whole, noun, size = once.unbind(1)
    counts = torch.stack([ink.counts(bool(kind)) for kind in range(len(SIDES))])
    sides = torch.tensor(SIDES)
    cells = sides[whole] ** 2 if dense else counts[whole, noun, size]
    sums = {name: 2 * outputs * inputs for name, (outputs, inputs) in layer_shapes(config).items()}
    text = sums["read_code"] + sums["drive"]
    common = config.cells * sums["near"]
    enlarged = config.cells * sums["enlarge"]
    per_cell = sums["near_again"] + sums["mix"] + sums["share"]
    drawn = common + whole * enlarged + cells * per_cell
    shown = (sides[icons.whole.long()] * CELL) ** 2 * BLENDING
    result = {}
    for name, of, values in (
        ("text", image, torch.full_like(image, text)),
        ("dynamics", image, torch.full_like(image, dynamics(config, steps or config.steps))),
        ("decoder", image, drawn),
        ("canvas", icons.image, shown),
    ):
        result[name] = torch.zeros(len(tokens), dtype=torch.int64).index_add_(0, of, values)
    result["canvas"] += GROUND * IMAGE_SIZE**2
    return result


def dynamics(config: OscillatorConfig, steps: int) -> int:
    """Of the oscillators of one icon, or of what stands in their place."""
    c = config.channels
    if config.coupling == "mlp":
        return config.cells * 2 * (3 * c * 2 * c + 2 * c * 2 * c)
    if config.coupling == "none":
        return steps * ELEMENTWISE * config.oscillators
    sums = 2 * 2 * config.oscillators * (len(STENCIL) * c + 2 * config.rank)  # of sines and of cosines
    return steps * (sums + ELEMENTWISE_COUPLED * config.oscillators)
