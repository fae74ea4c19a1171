"""One block of a comparison: draw for a while with one generator between two reads of the energy counters.

The loop is the plainest there is: batch, draw, hash the pixels, next batch. Beside it a thread samples power once a second,
where there is any. Drawing and hashing are in the measured stretch; loading a model, judging and storing images are not.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import GeneratedBatch, Generator
from millijoule.workers.meters.meter import CounterMeter, EnergyMeter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.schemas import CounterRead, ImageRequest, PowerTrace

#: Between reads within a block: often enough for counters that wrap, too seldom to disturb those that mind.
READ_PERIOD_S = 1.0
#: Power samples kept of one block: a day of them. A block is as long as its registration and its last batch say.
MAX_BLOCK_SAMPLES = 86_400


@dataclass(frozen=True)
class DrawnBlock:
    """What happened in one block.

    `reads` begins with the read that opens the block and ends with the one that closes it. Image i is of request
    `first_request + i`, counted round the list; `digests[i]` is the SHA-256 of its pixels. `new_pixels` has
    the images whose digest was not known before. `power` is what was sampled during the block, and once after it.
    """

    reads: tuple[CounterRead, ...]
    first_request: int = 0
    digests: tuple[str, ...] = ()
    new_pixels: dict[str, np.ndarray] = field(default_factory=dict)
    power: tuple[PowerTrace, ...] = ()


def draw_block(
    generator: Generator,
    requests: Sequence[ImageRequest],
    first_request: int,
    meter: EnergyMeter,
    *,
    batch_size: int,
    seconds: float = 0.0,
    images: int = 1,
    telemetry: bool = True,
    known: Collection[str] = (),
    sampler: PowerSampler | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> DrawnBlock:
    """Draw batches until at least `seconds` and at least `images` are done, and one batch in any case.

    Args:
        requests: gone through from index `first_request` on, round and round, `batch_size` of them per call.
        meter: is read before the first and after the last batch.
        telemetry: read the meter in between as well, every `READ_PERIOD_S`, and sample power.
        known: digests whose pixels need not be returned.
        sampler: not started yet, of this block alone; None: power is not sampled.

    Raises:
        InputError: the generator returned something else than the images asked for.
    """
    digests: list[str] = []
    new_pixels: dict[str, np.ndarray] = {}
    with _sampling(sampler if telemetry else None) as power:
        reads = [meter.read()]
        began = read_at = clock()
        while True:
            start = first_request + len(digests)
            batch = [requests[(start + k) % len(requests)] for k in range(batch_size)]
            for image in _checked(generator.generate(batch), batch_size, generator.info.name):
                digest = hash_pixels(image)
                digests.append(digest)
                if digest not in known and digest not in new_pixels:
                    new_pixels[digest] = image
            now = clock()
            if now - began >= seconds and len(digests) >= images:
                break
            if telemetry and now - read_at >= READ_PERIOD_S:
                reads.append(meter.read())
                read_at = now
        reads.append(meter.read())
    return DrawnBlock(
        tuple(reads), first_request % len(requests), tuple(digests), new_pixels, power=tuple(power)
    )


def rest_block(
    meter: EnergyMeter,
    seconds: float,
    *,
    sampler: PowerSampler | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> DrawnBlock:
    """Do nothing for `seconds`, with the reads and the samples of a busy block."""
    with _sampling(sampler) as power:
        reads = [meter.read()]
        left = seconds
        while left > 0:
            sleep(min(left, READ_PERIOD_S))
            left -= READ_PERIOD_S
            reads.append(meter.read())
    return DrawnBlock(tuple(reads), power=tuple(power))


def open_sampler(meter: CounterMeter) -> PowerSampler | None:
    """A sampler for one block; None where no board of `meter` could have power fields."""
    return PowerSampler(meter, MAX_BLOCK_SAMPLES) if meter.boards.powers else None


@contextmanager
def _sampling(sampler: PowerSampler | None) -> Iterator[list[PowerTrace]]:
    """Sample power while a block runs, and once after its last read; the list is filled when it ends."""
    traces: list[PowerTrace] = []
    if sampler is None:
        yield traces
        return
    sampler.start()
    try:
        yield traces
    finally:
        sampler.stop()
    sampler.look()
    traces.extend(sampler.take())


def hash_pixels(image: np.ndarray) -> str:
    """SHA-256 of uint8 `[height, width, 3]`: of its height and width, 4 bytes each, big-endian, and its bytes in C order."""
    size = image.shape[0].to_bytes(4, "big") + image.shape[1].to_bytes(4, "big")
    return hashlib.sha256(size + np.ascontiguousarray(image).tobytes()).hexdigest()


def _checked(batch: GeneratedBatch, batch_size: int, name: str) -> np.ndarray:
    """The images; what the model rejected is blank, and so never accepted, while its energy counts."""
    images = batch.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[::3] != (batch_size, 3):
        raise InputError(
            f"model {name}: asked for {batch_size} images, got {images.dtype} {list(images.shape)} in place of "
            f"uint8 [{batch_size}, height, width, 3]"
        )
    rejected = [why is not None for why in batch.rejected]
    if any(rejected):
        images = images.copy()
        images[rejected] = 0
    return images
