"""Requests through a generator: what comes back is checked, batches are made to fit its memory, and requests that fail are
found by halving."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.out_of_memory import is_out_of_memory, release_memory
from millijoule.workers.errors import NodeError, RowError
from millijoule.workers.generators.protocol import (
    BatchLimits,
    GeneratedBatch,
    Generator,
    GeneratorInfo,
    GroupsRequests,
    SavesMemory,
    SizesBatches,
)
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Hashable)


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
    for height, width in {(r.height or info.height, r.width or info.width) for r in requests}:
        if images.shape[1:3] != (height, width):
            got = f"{images.shape[2]}x{images.shape[1]}"
            raise ValueError(
                f"the generator returned images of {got} pixels where {width}x{height} were asked for"
            )
    warnings = out.warnings or ((),) * n
    if len(warnings) != n:
        raise ValueError(f"the generator returned warnings for {len(warnings)} images of {n}")
    rejected = out.rejected or (None,) * n
    if len(rejected) != n:
        raise ValueError(f"the generator returned rejections for {len(rejected)} images of {n}")
    return GeneratedBatch(images, tuple(warnings), tuple(rejected))


class FittedGenerator:
    """A generator with the batch size that fits its device: memory that runs out is never a request's fault.

    A call for which memory does not suffice is halved, and the smaller size remembered; where one request alone does not fit,
    the generator takes its memory savers, one after another (`SavesMemory`).

    Args:
        device: the words for it in messages.
    """

    def __init__(self, generator: Generator, sizer: BatchSizer, device: str = "cpu") -> None:
        self.generator = generator
        self.sizer = sizer
        self.device = device
        self._savers = 0  # taken by the generator
        # asked once: to ask for a protocol costs as much as half an icon
        self._groups = generator if isinstance(generator, GroupsRequests) else None

    def batches(self, requests: Mapping[T, ImageRequest]) -> Iterator[list[T]]:
        """The keys of `requests`, those together that can share a call, in slices of as many as then fit one.

        Keys keep their order within a group, and groups come in the order of their first keys.
        """
        for keys in self._call_groups(requests):
            while keys:
                rows = self.rows_for(requests[keys[0]])
                yield keys[:rows]
                del keys[:rows]

    def _call_groups(self, requests: Mapping[T, ImageRequest]) -> Iterable[list[T]]:
        if self._groups is None:
            return [list(requests)]
        groups: dict[Hashable, list[T]] = {}
        for key, request in requests.items():
            groups.setdefault(self._group(self._groups, key, request), []).append(key)
        return groups.values()

    @staticmethod
    def _group(of: GroupsRequests, key: Hashable, request: ImageRequest) -> Hashable:
        try:
            return "together", of.call_group(request)
        except Exception:  # of a prompt's making: `generate` will say so, of this request alone
            return "alone", key

    def rows_for(self, request: ImageRequest) -> int:
        """How many requests like this one the next call gets."""
        return self.sizer.rows(_size(request, self.generator.info))

    def isolate(
        self, batch: Sequence[ImageRequest], check_health: Callable[[], None]
    ) -> Iterator[tuple[Sequence[ImageRequest], Outcome]]:
        """Generate `batch`, in calls that fit; where that fails, halve until the failing requests stand alone.

        Yields `(requests, batch)` for parts that worked, `([request], error)` for one that did not.
        `check_health` is called after each failure that the generator does not put down to a request itself, and may raise
        to say that no request is to blame.

        Raises:
            NodeError: memory does not suffice for one request, whatever the generator does to save it.
        """
        fits = self.rows_for(batch[0])
        if len(batch) > fits:
            for part in _slices(batch, fits):
                yield from self.isolate(part, check_health)
            return
        outcome = self._try(batch)
        if outcome is None:
            yield from self.isolate(batch, check_health)
        elif isinstance(outcome, GeneratedBatch):
            yield batch, outcome
        else:
            if not isinstance(outcome, RowError):
                check_health()
            if len(batch) == 1:
                yield batch, outcome
                return
            for part in _slices(batch, len(batch) - len(batch) // 2):
                yield from self.isolate(part, check_health)

    def draw_one(self, request: ImageRequest) -> GeneratedBatch:
        """Draw one request.

        Raises:
            NodeError: memory does not suffice, whatever the generator does to save it.
            Exception: what the generator raises.
        """
        while (outcome := self._try([request])) is None:
            pass
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _try(self, batch: Sequence[ImageRequest]) -> Outcome | None:
        """One call; None where memory did not suffice, and the next is smaller or needs less."""
        size = _size(batch[0], self.generator.info)
        while self._savers < self.sizer.savers(size) and self._save_memory(size):
            pass
        failure: Exception
        try:
            drawn = draw(self.generator, batch)
        except (AttemptCancelled, NodeError):
            raise
        except Exception as error:
            failure = error
        else:
            self.sizer.fitted(size, len(batch))
            return drawn
        if not is_out_of_memory(failure):
            return failure
        words = str(failure).split("\n")[0][:200]
        _forget_frames(failure)  # which hold what the call had allocated
        del failure
        release_memory()
        if len(batch) > 1:
            self.sizer.ran_out(size, len(batch))
            log.warning(
                "%s: out of memory with %d images of %dx%d pixels in a call (%s): %d from now on",
                *(self.device, len(batch), *size, words, self.sizer.rows(size)),
            )
            return None
        self.sizer.ran_out(size, 1)
        if not self._save_memory(size):
            raise NodeError(
                f"{self.device}: out of memory with a single image of {size[0]}x{size[1]} pixels, and nothing is left "
                f"that saves memory ({words}). Draw smaller images, use a device with more memory, or fewer workers "
                "on this one"
            )
        self.sizer.relieved(size)
        return None

    def _save_memory(self, size: tuple[int, int]) -> bool:
        taken = self.generator.save_memory() if isinstance(self.generator, SavesMemory) else None
        if taken is None:
            return False
        self._savers += 1
        log.warning("%s: saves memory for images of %dx%d pixels: %s", self.device, *size, taken)
        return True


def batch_limits(generator: Generator, batch_size: int | None) -> Callable[[int, int], BatchLimits]:
    """Limits of batches by width and height: as the user says with `batch_size`, else as the generator does."""

    def limits(width: int, height: int) -> BatchLimits:
        if batch_size is not None:
            return BatchLimits(batch_size, batch_size)
        if isinstance(generator, SizesBatches):
            return generator.batch_limits(width, height)
        return BatchLimits(generator.info.batch_size, generator.info.batch_size)

    return limits


def _size(request: ImageRequest, info: GeneratorInfo) -> tuple[int, int]:
    return request.width or info.width, request.height or info.height


def _slices(items: Sequence[ImageRequest], size: int) -> Iterator[Sequence[ImageRequest]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _forget_frames(error: BaseException) -> None:
    """Let go of the frames that `error` and what it came from hold."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
