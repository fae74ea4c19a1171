"""Images of any sizes, as compiled encoders take many of them in one call, and the files that come back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def check_images(images: Sequence[np.ndarray], most_side: int | None = None) -> None:
    """Raises ValueError: not uint8 `[height, width, 3]`, without pixels, or with more than `most_side` a side."""
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"expected uint8 [height, width, 3] with pixels, got {image.dtype} {list(image.shape)}"
            )
        if most_side is not None and max(image.shape) > most_side:
            raise ValueError(f"{image.shape[1]}x{image.shape[0]}: at most {most_side} pixels a side")


class ImageBatch:
    """Where images are, while this lives.

    Attributes:
        addresses: `[count]`.
        sizes: int64 `[count, 2]`, height and width.
    """

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._held = [np.ascontiguousarray(image) for image in images]
        self.addresses = np.array([image.__array_interface__["data"][0] for image in self._held], np.uintp)
        self.sizes = np.array([image.shape[:2] for image in self._held], np.int64)

    def __len__(self) -> int:
        return len(self._held)


def files_of(out: np.ndarray, ends: np.ndarray) -> list[bytes]:
    """The files that lie one behind the other in `out`, each from `ends[i]` to `ends[i + 1]`."""
    return [out[begin:end].tobytes() for begin, end in pairwise(ends.tolist())]
