"""One batch of requests through a generator: what comes back is checked, and requests that fail are found by halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from millijoule.workers.errors import RowError
from millijoule.workers.generators.protocol import GeneratedBatch, Generator
from millijoule.workers.schemas import ImageRequest

T = TypeVar("T")


class AttemptCancelled(Exception):
    """The driver called this attempt off between two batches."""


Outcome = Exception | GeneratedBatch


def draw(generator: Generator, requests: Sequence[ImageRequest]) -> GeneratedBatch:
    """What `generator` makes of `requests`, looked at: one image, and one tuple of warnings, for each.

    Raises:
        ValueError: the generator returned something else.
        Exception: what the generator raises.
    """
    try:
        out = generator.generate(requests)
    # of the model's own making: nothing here ends because of it
    except (KeyboardInterrupt, SystemExit) as error:
        raise RuntimeError(f"{type(error).__name__} {error}".strip()) from error
    if not isinstance(getattr(out, "images", None), np.ndarray):
        raise ValueError(
            f"the generator returned {type(out).__name__}, not a GeneratedBatch of an array of uint8"
        )
    images, n = out.images, len(requests)
    if images.dtype != np.uint8:
        raise ValueError(f"the generator returned images as {images.dtype}, not as uint8")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ValueError(
            f"the generator returned images of shape {images.shape}, not [{n}, height, width, 3]"
        )
    if len(images) != n:
        raise ValueError(f"the generator returned {len(images)} images for {n} requests")
    info = generator.info
    for request in requests:
        asked = (request.height or info.height, request.width or info.width)
        if images.shape[1:3] != asked:
            got = f"{images.shape[2]}x{images.shape[1]}"
            raise ValueError(
                f"the generator returned images of {got} pixels where {asked[1]}x{asked[0]} were asked for"
            )
    warnings = out.warnings or tuple(() for _ in requests)
    if len(warnings) != n:
        raise ValueError(f"the generator returned warnings for {len(warnings)} images of {n}")
    rejected = out.rejected or (None,) * n
    if len(rejected) != n:
        raise ValueError(f"the generator returned rejections for {len(rejected)} images of {n}")
    return GeneratedBatch(images, tuple(warnings), tuple(rejected))


def isolate(
    generator: Generator, batch: Sequence[ImageRequest], check_health: Callable[[], None]
) -> Iterator[tuple[Sequence[ImageRequest], Outcome]]:
    """Generate `batch`; where that fails, halve until the failing requests stand alone.

    Yields `(requests, batch)` for parts that worked, `([request], error)` for one that did not.
    `check_health` is called after each failure that the generator does not put down to a request itself, and may raise
    to say that no request is to blame.
    """
    try:
        drawn = draw(generator, batch)
    except AttemptCancelled:
        raise
    except Exception as error:
        if not isinstance(error, RowError):
            check_health()
        if len(batch) == 1:
            yield batch, error
            return
        middle = len(batch) // 2
        yield from isolate(generator, batch[:middle], check_health)
        yield from isolate(generator, batch[middle:], check_health)
        return
    yield batch, drawn


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
