"""The second stage of an attempt: drawn images become bytes of the output's format, on threads beside the device's.

What goes in is a part of a batch, what comes out the same part with its encoded images, in order. Images of a part are encoded in one
call of compiled code. It works outside Python's lock, as do zlib, libjpeg and libwebp below Pillow where nothing was compiled: encoders
run beside the thread that draws and beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from millijoule.workers.errors import NodeError, RowError
from millijoule.workers.generators.protocol import GeneratorInfo
from millijoule.workers.images.encode import Drawn, encode_images
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.images.provenance import ModelProvenance
from millijoule.workers.schemas import ImageRow

#: Small images are encoded so many bytes of pixels at a time: handing one over costs as much as encoding 32x32 pixels, and threads that
#: take turns often make each other's data leave the cache; a usual batch of small images is one task.
TASK_BYTES = 1 << 22

#: Every encoder can do this one.
HEALTHY = np.zeros((16, 16, 3), np.uint8)


class DrawnImage(NamedTuple):
    """The outcome of one request: its row, and unless it has none its image, uint8 `[height, width, 3]`.

    `at` is (row, image index) within the shard's plan rows. `is_suspect`: that there is no image is this worker's word alone.
    """

    at: tuple[int, int]
    row: ImageRow
    image: np.ndarray | None = None
    is_suspect: bool = False


@dataclass(frozen=True)
class EncodedPart:
    """Part of a batch on its way: `outcome` is, for each image in order, its bytes, why it has none, or None."""

    drawn: Sequence[DrawnImage]
    n_bytes: int  # of pixels
    outcome: Future[list[bytes | RowError | None]]


class Encoders:
    """The threads of one worker that encode; one per CPU it has.

    Args:
        info: of the generator, as images name it.
    """

    def __init__(self, threads: int, image_format: ImageFormat, info: GeneratorInfo) -> None:
        self._pool = ThreadPoolExecutor(threads, "encoder")
        self._format = image_format
        self._info = info
        self._model = ModelProvenance(info.name, info.sha256)

    def begin(self, drawn: Sequence[DrawnImage]) -> Future[list[bytes | RowError | None]]:
        """Encode `drawn`, see `parts_of`, in the background."""
        return self._pool.submit(self._encode, drawn)

    def close(self) -> None:
        """End the threads, once they have done what was begun."""
        self._pool.shutdown()

    def _encode(self, drawn: Sequence[DrawnImage]) -> list[bytes | RowError | None]:
        """Raises NodeError where there is no memory for it, or this worker encodes nothing."""
        own_steps = self._info.num_inference_steps
        images = [
            Drawn(one.image, one.row.request, one.row.num_inference_steps or own_steps)
            for one in drawn
            if one.image is not None
        ]
        try:
            encoded = iter(encode_images(self._format, images, self._model))
        except MemoryError as error:
            raise NodeError("no memory to encode an image") from error
        except Exception:
            encoded = iter([self._encode_alone(one) for one in images])
        return [None if one.image is None else next(encoded) for one in drawn]

    def _encode_alone(self, image: Drawn) -> bytes | RowError:
        """An image of a part that failed: it is to blame only if another one can be encoded here."""
        try:
            return encode_images(self._format, [image], self._model)[0]
        except MemoryError as error:
            raise NodeError("no memory to encode an image") from error
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            try:
                encode_images(self._format, [image._replace(image=HEALTHY)], self._model)
            except Exception as other:
                raise NodeError(f"no image can be encoded here: {type(other).__name__}: {other}") from other
            return RowError(f"it cannot be encoded: {why}")


def parts_of(batch: Sequence[DrawnImage]) -> Iterator[Sequence[DrawnImage]]:
    """`batch` in order, in parts of about `TASK_BYTES` of pixels: at least an image each."""
    part: list[DrawnImage] = []
    n_bytes = 0
    for drawn in batch:
        part.append(drawn)
        n_bytes += drawn.image.nbytes if drawn.image is not None else 0
        if n_bytes >= TASK_BYTES:
            yield part
            part, n_bytes = [], 0
    if part:
        yield part
