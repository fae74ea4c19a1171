"""Turn one drawn image into bytes that carry their own provenance, in the format a job asks for. Nothing here touches a file."""

from __future__ import annotations

import numpy as np

from millijoule.workers.errors import RowError
from millijoule.workers.images.formats import MAX_SIDE, ImageFormat
from millijoule.workers.images.jpeg import encode_jpeg
from millijoule.workers.images.png import encode_png
from millijoule.workers.images.provenance import provenance_of
from millijoule.workers.images.webp import encode_webp
from millijoule.workers.schemas import ImageRequest


def encode_image(
    image_format: ImageFormat,
    image: np.ndarray,
    request: ImageRequest,
    *,
    steps: int,
    model_name: str,
    model_sha256: str,
) -> bytes:
    """Encode `image` with its provenance inside; the same input gives the same bytes.

    Args:
        image: uint8 `[height, width, 3]`.
        request: what was asked for; its prompt may hold any Unicode text.
        steps: the `num_inference_steps` that were really run.
        model_name, model_sha256: as in `GeneratorInfo`.

    Raises:
        RowError: the format holds no image of that size.
        ValueError: `image` is not uint8 `[height, width, 3]`.
    """
    provenance = provenance_of(image, request, steps=steps, model_name=model_name, model_sha256=model_sha256)
    most = MAX_SIDE.get(image_format.name)
    if most is not None and max(image.shape[:2]) > most:
        raise RowError(
            f"{provenance.width}x{provenance.height}: {image_format.name} has at most {most} pixels a side; "
            "--image-format png has no such limit"
        )
    if image_format.name == "png":
        return encode_png(image, provenance)
    assert image_format.quality is not None
    encode = encode_jpeg if image_format.name == "jpeg" else encode_webp
    return encode(image, provenance, image_format.quality)
