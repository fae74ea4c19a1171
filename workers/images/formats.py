"""What images are encoded as: PNG, JPEG or WebP, and how well. `workers.images.encode` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from millijoule.workers.errors import UsageError

ImageFormatName = Literal["png", "jpeg", "webp"]

SUFFIXES = {"png": "png", "jpeg": "jpg", "webp": "webp"}
#: Where none is asked for: differences that one does not see beside each other.
DEFAULT_QUALITY = {"jpeg": 95, "webp": 90}
#: Most pixels a side, of formats that have such a limit.
MAX_SIDE = {"jpeg": 65_500, "webp": 16_383}


@dataclass(frozen=True)
class ImageFormat:
    """How every image of a job is encoded; `quality` is 1 to 100, None for PNG, which loses nothing."""

    name: ImageFormatName = "png"
    quality: int | None = None

    @property
    def suffix(self) -> str:
        """Of file names, without the dot."""
        return SUFFIXES[self.name]


def read_image_format(name: ImageFormatName, quality: int | None) -> ImageFormat:
    """What --image-format and --quality say; raises InputError."""
    if name == "png":
        if quality is not None:
            raise UsageError(f"--quality {quality}: for --image-format jpeg or webp; png loses nothing")
        return ImageFormat()
    if quality is not None and not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality}: from 1 to 100")
    return ImageFormat(name, DEFAULT_QUALITY[name] if quality is None else quality)
