"""The switches of the ladder, as one value: which of them a pipeline runs with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rungs:
    """Each field is one rung; the default of each changes nothing.

    Attributes:
        precision: of weights and activations; None: what suits weights and device.
    """

    precision: Literal["float32", "bfloat16", "float16"] | None = None
