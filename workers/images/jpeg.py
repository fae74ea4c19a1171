"""Encode one drawn image as JPEG: of photographs half of PNG's size, and pixels that are nearly the same.

EXIF carries the provenance. Its segment holds 64 KiB; where the record does not fit in it beside the text, comment segments
take it, one after another.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from millijoule.workers.images.exif import exif_of
from millijoule.workers.images.provenance import Provenance

#: From this quality on colours keep the resolution of brightness, as ImageMagick does it: who asks for so much, sees it.
FULL_COLOUR_QUALITY = 90

#: What a segment holds beside its own length.
MAX_SEGMENT_BYTES = 65_533
#: Of EXIF's own directories, and some air.
_EXIF_FRAME_BYTES = 200


def encode_jpeg(image: np.ndarray, provenance: Provenance, quality: int) -> bytes:
    """`image`, uint8 `[height, width, 3]`, as a JPEG of `quality` 1 to 100. The same input gives the same bytes."""
    exif, comments = exif_of(provenance), b""
    if len(exif) > MAX_SEGMENT_BYTES:
        most = MAX_SEGMENT_BYTES - _EXIF_FRAME_BYTES
        exif = exif_of(provenance, with_record=False, most_comment_bytes=most // 2 * 2)
        comments = _comments(provenance.record.encode("ascii"))
    buffer = io.BytesIO()
    subsampling = "4:4:4" if quality >= FULL_COLOUR_QUALITY else "4:2:0"
    Image.fromarray(np.ascontiguousarray(image)).save(
        buffer, "JPEG", quality=quality, subsampling=subsampling, exif=exif
    )
    encoded = buffer.getvalue()
    if not comments:
        return encoded
    after_jfif = 4 + int.from_bytes(encoded[4:6], "big")  # the first segment, which must stay the first
    return encoded[:after_jfif] + comments + encoded[after_jfif:]


def _comments(text: bytes) -> bytes:
    parts = [text[at : at + MAX_SEGMENT_BYTES] for at in range(0, len(text), MAX_SEGMENT_BYTES)]
    return b"".join(b"\xff\xfe" + (len(part) + 2).to_bytes(2, "big") + part for part in parts)
