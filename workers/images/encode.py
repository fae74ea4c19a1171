"""Turn drawn images into bytes that carry their own provenance, in the format a job asks for. Nothing here touches a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from millijoule.workers.errors import RowError
from millijoule.workers.images import jpeg, png, webp
from millijoule.workers.images.formats import MAX_SIDE, ImageFormat
from millijoule.workers.images.provenance import ModelProvenance
from millijoule.workers.schemas import ImageRequest


class Drawn(NamedTuple):
    """One image to encode.

    Attributes:
        image: uint8 `[height, width, 3]`.
        request: what was asked for; its prompt may hold any Unicode text.
        steps: the `num_inference_steps` that were really run.
    """

    image: np.ndarray
    request: ImageRequest
    steps: int


def encode_images(
    image_format: ImageFormat, drawn: Sequence[Drawn], model: ModelProvenance
) -> list[bytes | RowError]:
    """Encode images with their provenance inside, or say why the format does not hold one; all in one call of compiled code.

    The same input gives the same bytes, in any company.

    Raises:
        ValueError: an image is not uint8 `[height, width, 3]`.
        MemoryError: there is no room for the files.
    """
    provenances = [model.of(*one) for one in drawn]
    if image_format.name == "png":
        return list(png.encode_with_provenance([one.image for one in drawn], provenances))
    assert image_format.quality is not None
    most = MAX_SIDE[image_format.name]
    fits = [max(one.image.shape) <= most for one in drawn]
    encode = jpeg.encode_with_provenance if image_format.name == "jpeg" else webp.encode_with_provenance
    encoded = iter(
        encode(
            [one.image for one, does in zip(drawn, fits, strict=True) if does],
            [provenance for provenance, does in zip(provenances, fits, strict=True) if does],
            image_format.quality,
        )
    )
    return [
        next(encoded) if does else _too_large(one.image, image_format)
        for one, does in zip(drawn, fits, strict=True)
    ]


def encode_image(
    image_format: ImageFormat,
    image: np.ndarray,
    request: ImageRequest,
    *,
    steps: int,
    model_name: str,
    model_sha256: str,
) -> bytes:
    """`encode_images` of one image of the model `model_name`.

    Raises:
        RowError: the format holds no image of that size.
        ValueError: `image` is not uint8 `[height, width, 3]`.
    """
    model = ModelProvenance(model_name, model_sha256)
    (encoded,) = encode_images(image_format, [Drawn(image, request, steps)], model)
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


def _too_large(image: np.ndarray, image_format: ImageFormat) -> RowError:
    height, width, _ = image.shape
    return RowError(
        f"{width}x{height}: {image_format.name} has at most {MAX_SIDE[image_format.name]} pixels a side; "
        "--image-format png has no such limit"
    )
