"""RGB images as lossy WebP files, many in one call.

The reference is Pillow, an image at a time. The compiled form (`cpp/webp.cpp`) calls the very libwebp that Pillow has loaded, without
Python between images: the files are the same, byte for byte.

Source: libwebp's encoder; RIFF container (WebP Container Specification, "Extended File Format").
"""

from __future__ import annotations

import ctypes
import io
import logging
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image

from millijoule.kernels.image_batch import ImageBatch, check_images
from millijoule.kernels.native_library import native_library

log = logging.getLogger(__name__)

#: Pixels a side, as a frame's header holds them.
MAX_SIDE = 16_383

#: What the compiled form calls of libwebp, in the order in which it takes them.
_FUNCTIONS = (
    *("WebPConfigInitInternal", "WebPValidateConfig", "WebPPictureInitInternal"),
    *("WebPPictureImportRGB", "WebPEncode", "WebPPictureFree"),
)
#: Of the second ABI of libwebp's encoder, see `cpp/webp.cpp`: versions 0.5 (2015) and later.
_ENCODER_VERSIONS = range(0x000500, 0x020000)

_EXIF_FLAG = 0x08
_NO_MEMORY = -1


def encode_webps(
    images: Sequence[np.ndarray], exifs: Sequence[bytes], quality: int, method: int
) -> list[bytes]:
    """Each image as a lossy WebP. The same image and EXIF give the same bytes.

    Args:
        images: uint8 `[height, width, 3]` each, of any sizes up to `MAX_SIDE`.
        exifs: for each image its EXIF block, which begins with "Exif" and two NULs.
        quality: 1 to 100.
        method: libwebp's effort, 0 to 6.

    Raises:
        ValueError: an image is not such an array, or there are not as many EXIF blocks.
        MemoryError: there is no room for the files.
    """
    _check(images, exifs)
    library, functions = native_library(), _libwebp()
    if library is not None and functions is not None and len(images):
        plain = _encode_compiled(library, functions, images, quality, method)
        if plain is not None:
            return [
                _with_exif(file, image.shape[0], image.shape[1], exif)
                for file, image, exif in zip(plain, images, exifs, strict=True)
            ]
    return encode_webps_reference(images, exifs, quality, method)


def encode_webps_reference(
    images: Sequence[np.ndarray], exifs: Sequence[bytes], quality: int, method: int
) -> list[bytes]:
    """`encode_webps` with Pillow, which lets other threads run while libwebp works."""
    _check(images, exifs)
    files = []
    for image, exif in zip(images, exifs, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(
            buffer, "WEBP", quality=quality, method=method, exif=exif
        )
        files.append(buffer.getvalue())
    return files


def _check(images: Sequence[np.ndarray], exifs: Sequence[bytes]) -> None:
    check_images(images, MAX_SIDE)
    if len(images) != len(exifs):
        raise ValueError(f"{len(images)} images, {len(exifs)} EXIF blocks: one for each")


@cache
def _libwebp() -> ctypes.Array[ctypes.c_void_p] | None:
    """The functions of the libwebp that Pillow has; None where they cannot be found."""
    try:
        from PIL import _webp

        # a look-up in a library goes through those that it needs
        pillow = ctypes.CDLL(_webp.__file__)
        version = int(pillow.WebPGetEncoderVersion())
        found = [ctypes.cast(getattr(pillow, name), ctypes.c_void_p) for name in _FUNCTIONS]
    except (ImportError, OSError, AttributeError) as error:
        log.info("WebP by Pillow, an image at a time: libwebp's functions cannot be called (%s)", error)
        return None
    if version not in _ENCODER_VERSIONS:
        log.info("WebP by Pillow, an image at a time: libwebp %#x is not known here", version)
        return None
    return (ctypes.c_void_p * len(found))(*found)


def _encode_compiled(
    library: ctypes.CDLL,
    functions: ctypes.Array[ctypes.c_void_p],
    images: Sequence[np.ndarray],
    quality: int,
    method: int,
) -> list[bytes] | None:
    """Files without metadata; None where libwebp does not take the call."""
    _declare(library)
    batch = ImageBatch(images)
    ends = np.empty(len(batch) + 1, np.int64)
    out = ctypes.c_void_p()
    failed = library.millijoule_encode_webps(
        functions,
        len(batch),
        batch.addresses.ctypes.data,
        batch.sizes.ctypes.data,
        quality,
        method,
        ctypes.byref(out),
        ends.ctypes.data,
    )
    if failed == _NO_MEMORY:
        raise MemoryError("no memory to encode images")
    if failed:
        return None
    try:
        assert out.value is not None
        return [ctypes.string_at(out.value + begin, end - begin) for begin, end in pairwise(ends.tolist())]
    finally:
        library.millijoule_free_webps(out)


def _with_exif(file: bytes, height: int, width: int, exif: bytes) -> bytes:
    """A file in the simple format as one in the extended format, with EXIF: as libwebp's own multiplexer writes it."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    metadata = exif.removeprefix(b"Exif\x00\x00")
    chunks = b"".join(
        (
            b"WEBP",
            *(b"VP8X", (10).to_bytes(4, "little"), bytes([_EXIF_FLAG, 0, 0, 0]), size),
            file[12:],
            *(b"EXIF", len(metadata).to_bytes(4, "little"), metadata, bytes(len(metadata) % 2)),
        )
    )
    return b"RIFF" + len(chunks).to_bytes(4, "little") + chunks


@cache
def _declare(library: ctypes.CDLL) -> None:
    pointer = ctypes.c_void_p
    library.millijoule_encode_webps.argtypes = [
        *(pointer, ctypes.c_int64, pointer, pointer, ctypes.c_float, ctypes.c_int32, pointer, pointer),
    ]
    library.millijoule_encode_webps.restype = ctypes.c_int64
    library.millijoule_free_webps.argtypes = [pointer]
    library.millijoule_free_webps.restype = None
