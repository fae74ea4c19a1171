"""The protocol every image model is used through, and the values that pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS
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
class Rejection:
    """Why there is no image of a request, beside the others of its batch.

    Attributes:
        status: "filtered" (the model's own safety checker hid it) or "quarantined" (it cannot be drawn: its pixels are not
            finite numbers, say).
        certain: whether the request alone decides it, before anything is drawn, so that no other worker is asked before it
            counts, and no energy is its own.
    """

    status: Literal["filtered", "quarantined"]
    reason: str
    certain: bool = False

    @property
    def may_be_the_device(self) -> bool:
        """Whether another worker could well draw it."""
        return self.status == "quarantined" and not self.certain


@dataclass(frozen=True)
class GeneratedBatch:
    """`images` is uint8 `[batch, height, width, 3]`, sRGB. `warnings[i]` are words for the user about image i; where
    `rejected[i]` is not None, image i is no image."""

    images: np.ndarray
    warnings: tuple[tuple[str, ...], ...] = ()
    rejected: tuple[Rejection | None, ...] = ()


def every_image(batch: GeneratedBatch, requests: Sequence[ImageRequest]) -> np.ndarray:
    """The images of `batch`, uint8 `[batch, height, width, 3]`, for what compares or times images: one is needed of each of `requests`.

    Raises:
        InputError: the model has rejected some.
    """
    rejected = [(r.prompt, why) for r, why in zip(requests, batch.rejected, strict=False) if why is not None]
    if rejected:
        prompt, why = rejected[0]
        raise InputError(
            f"the model gives no image of {len(rejected)} of {len(requests)} requests, so nothing can be compared or timed: the first is "
            f"{why.status} ({why.reason}), prompt {prompt[:200]!r}"
        )
    return batch.images


class Generator(Protocol):
    """A prompt-to-image model on one device.

    `generate` must not depend on what else is in the batch: the same request gives the same image at any batch
    size. It may raise for a whole batch; the caller then bisects to find the request that is at fault.
    """

    info: GeneratorInfo

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """Draw one image per request (all of one size and step count)."""


@runtime_checkable
class ReportsSteps(Protocol):
    """What a generator whose batches take minutes may have besides: the worker sets `on_step`, and the generator
    calls it whenever its batch got further, as often as it likes. Without it a batch has to end within --lease-seconds.
    """

    on_step: Callable[[], None]


@dataclass(frozen=True)
class BatchLimits:
    """Images per call: a first guess, and how many are never worth a try on this device."""

    first: int
    most: int


@runtime_checkable
class SizesBatches(Protocol):
    """What a generator may have besides whose batches depend on an image's size. Without it `info.batch_size` serves all."""

    def batch_limits(self, width: int, height: int) -> BatchLimits:
        """Limits for images of that many pixels."""


@runtime_checkable
class SavesMemory(Protocol):
    """What a generator may have besides that can do with less memory at the price of time."""

    def save_memory(self) -> str | None:
        """Take the next memory saver, for good, and return what it is; None: none is left.

        Called where not even one image fits the device, and then as often as it takes.
        """


@runtime_checkable
class GroupsRequests(Protocol):
    """What a generator may have besides that cannot draw all requests of one size and step count in one call."""

    def call_group(self, request: ImageRequest) -> Hashable:
        """Requests of which this is equal can share a call."""


@runtime_checkable
class NamesKernels(Protocol):
    """What a generator may have besides that knows which of several kernels draw.

    Attributes:
        kernels: "triton" on a GPU, a form of the CPU's compiled functions ("avx2"), "pytorch", for the worker's record.
    """

    @property
    def kernels(self) -> str: ...


@runtime_checkable
class StatesSettings(Protocol):
    """What a generator may have besides that was loaded in one of several ways, for the worker's record.

    Attributes:
        engine_name: of what runs its networks, as `--engine` has it; None: its own kernels do.
        rungs_words: what makes it cheaper, as options; "none" where nothing does.
    """

    @property
    def engine_name(self) -> str | None: ...

    @property
    def rungs_words(self) -> str: ...


@runtime_checkable
class LeavesNoGarbage(Protocol):
    """What a generator may say of itself whose calls leave nothing that only the collector of cyclic garbage finds.

    Where images are small, looking for garbage costs a worker a twentieth of its time.

    Attributes:
        leaves_no_garbage: the collector may run rarely in this process.
    """

    @property
    def leaves_no_garbage(self) -> bool: ...


@runtime_checkable
class KnowsNouns(Protocol):
    """What a generator of icon scenes may have besides that knows other nouns than the first 80.

    Attributes:
        nouns: how many of the vocabulary's first it knows (`scenes.vocabulary`).
    """

    nouns: int


def known_nouns(generator: Generator) -> int:
    """How many of the vocabulary's first nouns a generator of icon scenes knows."""
    return generator.nouns if isinstance(generator, KnowsNouns) else DEFAULT_NOUNS


@runtime_checkable
class CountsOperations(Protocol):
    """What a generator may have besides that can tell how many operations its images take."""

    def operations_of(
        self, requests: Sequence[ImageRequest], *, dense: bool = False
    ) -> dict[str, np.ndarray]:
        """Operations of each request's image by part, int64 `[images]`, a multiply-accumulate as two; with `dense` what they
        would be if nothing of one image was left out that another needs. Requests are of one size and step count."""


@runtime_checkable
class HoldsProcesses(Protocol):
    """What a generator may have besides that computes in other processes, too.

    Attributes:
        cpu_ns: processor time that those have used, up to the end of the last call.
    """

    @property
    def cpu_ns(self) -> int: ...

    def close(self) -> None:
        """End them; nothing is drawn any more."""


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another without loading it: part of a job's fingerprint."""

    name: str
    sha256: str
