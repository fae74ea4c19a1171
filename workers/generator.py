"""The protocol every image model is used through, and the one function that loads a model by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from millijoule.workers.schemas import ImageRequest


@dataclass(frozen=True)
class GeneratorInfo:
    """What a loaded model is and which requests it can serve."""

    name: str
    sha256: str  # of the weights file(s): part of the job's fingerprint
    width: int  # native size in pixels
    height: int
    num_inference_steps: int  # default
    batch_size: int  # the batch it runs best at on this device
    max_steps: int = 1000
    sizes: tuple[tuple[int, int], ...] = ()  # every (width, height) it can make; empty: any


@dataclass(frozen=True)
class GeneratedBatch:
    """`images` is uint8 `[batch, height, width, 3]`, sRGB. `warnings[i]` are words for the user about image i."""

    images: np.ndarray
    warnings: tuple[tuple[str, ...], ...] = field(default=())


class Generator(Protocol):
    """A prompt-to-image model on one device.

    `generate` must not depend on what else is in the batch: the same request gives the same image at any batch
    size. It may raise for a whole batch; the caller then bisects to find the request that is at fault.
    """

    info: GeneratorInfo

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """Draw one image per request (all of one size and step count)."""
        ...


def load_generator(model: str, *, device: str = "cpu") -> Generator:
    """Load `model`: "default" for the weights in the package, else a path to a `.safetensors` file.

    Raises:
        InputError: the file is missing, is not safetensors (pickled files are never opened), or is not a model
            this version knows.
    """
    from millijoule.workers.oscillator import OscillatorGenerator

    return OscillatorGenerator.load(model, device=device)
