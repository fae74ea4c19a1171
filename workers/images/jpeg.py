"""Images as JPEG: of photographs half of PNG's size, and pixels that are nearly the same.

EXIF carries the provenance. Its segment holds 64 KiB; where the record does not fit in it beside the text, comment segments
take it, one after another, before it. `kernels.jpeg` does the encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millijoule.kernels.jpeg import encode_jpegs
from millijoule.workers.images.exif import exif_of
from millijoule.workers.images.provenance import Provenance

#: From this quality on colours keep the resolution of brightness, as ImageMagick does it: who asks for so much, sees it.
FULL_COLOUR_QUALITY = 90

#: What a segment holds beside its own length.
MAX_SEGMENT_BYTES = 65_533
#: Of EXIF's own directories, and some air.
_EXIF_FRAME_BYTES = 200


def encode_with_provenance(
    images: Sequence[np.ndarray], provenances: Sequence[Provenance], quality: int
) -> list[bytes]:
    """`images`, uint8 `[height, width, 3]` each, as JPEGs of `quality` 1 to 100. The same input gives the same bytes."""
    segments = [_segments(provenance) for provenance in provenances]
    return encode_jpegs(images, segments, quality, halved=quality < FULL_COLOUR_QUALITY)


def _segments(provenance: Provenance) -> bytes:
    """What carries it: behind the first segment, which must stay the first."""
    exif, comments = exif_of(provenance), b""
    if len(exif) > MAX_SEGMENT_BYTES:
        most = MAX_SEGMENT_BYTES - _EXIF_FRAME_BYTES
        exif = exif_of(provenance, with_record=False, most_comment_bytes=most // 2 * 2)
        comments = _comments(provenance.record.encode("ascii"))
    return comments + _segment(b"\xff\xe1", exif)


def _comments(text: bytes) -> bytes:
    parts = [text[at : at + MAX_SEGMENT_BYTES] for at in range(0, len(text), MAX_SEGMENT_BYTES)]
    return b"".join(_segment(b"\xff\xfe", part) for part in parts)


def _segment(marker: bytes, content: bytes) -> bytes:
    return marker + (len(content) + 2).to_bytes(2, "big") + content
