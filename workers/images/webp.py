"""Images as lossy WebP: smaller than JPEG, for more time than PNG. EXIF carries the provenance.

`kernels.webp` does the encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from millijoule.kernels.webp import encode_webps
from millijoule.workers.images.exif import exif_of
from millijoule.workers.images.provenance import Provenance

#: libwebp's effort, 0 to 6: from 2 to its default 4 the time doubles for files one per cent smaller.
METHOD = 2


def encode_with_provenance(
    images: Sequence[np.ndarray], provenances: Sequence[Provenance], quality: int
) -> list[bytes]:
    """`images`, uint8 `[height, width, 3]` each, as WebPs of `quality` 1 to 100. The same input gives the same bytes."""
    return encode_webps(images, [exif_of(provenance) for provenance in provenances], quality, METHOD)
