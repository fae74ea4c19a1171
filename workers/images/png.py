"""Images as PNG: no pixel is lost. Two text chunks carry the provenance: `parameters` and `millijoule`.

`kernels.png` does the encoding.

Source: PNG specification, third edition (W3C), section 11.3.3 (text chunks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millijoule.kernels.png import encode_pngs
from millijoule.workers.images.provenance import Provenance


def encode_with_provenance(images: Sequence[np.ndarray], provenances: Sequence[Provenance]) -> list[bytes]:
    """`images`, uint8 `[height, width, 3]` each, as 8-bit sRGB PNGs. The same input gives the same bytes."""
    return encode_pngs(images, [text_chunks(provenance) for provenance in provenances])


def text_chunks(provenance: Provenance) -> tuple[bytes, bytes]:
    """The chunks that carry it, type and content."""
    return _parameters_chunk(provenance.parameters), b"tEXtmillijoule\x00" + provenance.record.encode("ascii")


def _parameters_chunk(text: str) -> bytes:
    """Type and content: `text` as tEXt where Latin-1 holds it, else as uncompressed iTXt; NUL, which PNG forbids, is removed."""
    text = text.replace("\x00", "")
    try:
        return b"tEXtparameters\x00" + text.encode("latin-1")
    except UnicodeEncodeError:
        # keyword, NUL, uncompressed, method 0, no language tag, no translated keyword
        return b"iTXtparameters\x00\x00\x00\x00\x00" + text.encode("utf-8", "replace")
