"""Sizes of the oscillator generator's network, and the order of what it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from millijoule.workers.scenes.scenes import CELL, MIN_NOUNS, SIZES
from millijoule.workers.scenes.vocabulary import NOUNS

#: Oscillators stand on a square of so many cells for every icon, however large it is drawn.
GRID = 4

#: An icon in a half window and in the whole image is drawn on so many cells of `CELL` pixels in each direction.
SIDES = (4, 8)

#: Ways an icon's shape is drawn: a size in a half window, then a size in the whole image.
VARIANTS = len(SIDES) * len(SIZES)

PIXELS = CELL * CELL

Size = Annotated[int, Meta(ge=1, le=4096)]

#: Step counts that keep the integer step in range and the model in the regime it was trained for.
MIN_STEPS, MAX_STEPS = 4, 100


@dataclass(frozen=True)
class OscillatorConfig:
    """Sizes of the network: `cells * channels` oscillators draw an icon.

    `coupling` is what stands between the oscillators: "none", a "trained" K, or one "frozen" as drawn at random; "mlp" has
    a network of two layers per cell in their place.
    """

    nouns: Annotated[int, Meta(ge=MIN_NOUNS, le=len(NOUNS))] = 80  # the first of the vocabulary
    coupling: Literal["none", "trained", "frozen", "mlp"] = "none"
    code: Size = 96  # numbers that a noun is
    hidden: Size = 128
    channels: Size = 32  # oscillators per cell
    rank: Size = 32  # of the coupling of all with all
    width: Size = 112  # channels of the decoder's convolutions
    mix: Size = 256  # channels of the last layer but one
    steps: Annotated[int, Meta(ge=MIN_STEPS, le=MAX_STEPS)] = 10
    horizon: Annotated[float, Meta(gt=0, lt=100)] = 1.0

    @property
    def cells(self) -> int:
        return GRID * GRID

    @property
    def oscillators(self) -> int:
        """Of one icon."""
        return self.cells * self.channels


def layer_shapes(config: OscillatorConfig) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of each layer."""
    width = config.width
    return {
        "read_code": (config.hidden, config.code),
        "drive": (config.cells * 3 * config.channels, config.hidden),
        "near": (width, 9 * 2 * config.channels),
        "enlarge": (4 * width, width),
        "near_again": (width, 9 * width),
        "mix": (config.mix, width),
        "share": (PIXELS, config.mix),
    }
