"""RGB images as JPEG files, many in one call: baseline, with the tables that most encoders have.

Source: ITU-T T.81 (1992), annexes A, F and K; JFIF 1.02. The reference is Pillow, over libjpeg-turbo in its wheels. The compiled form
(`cpp/jpeg`) computes the same integers: the files are the same, byte for byte, at any quality and on any processor. It is for small
images, many in a call: of an icon Pillow's own work takes longer than libjpeg's.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np
from PIL import Image

from millijoule.kernels.image_batch import ImageBatch, check_images, files_of
from millijoule.kernels.native_library import native_form, native_library

#: Pillow encodes images with more bytes of pixels, above about 104x104: there a call is no longer what takes the time, and
#: libjpeg-turbo's vectors are faster than what a compiler makes of ours.
MAX_COMPILED_BYTES = 1 << 15

#: Pixels a side, as the frame's header holds them; libjpeg stops a little earlier.
MAX_SIDE = 65_500

#: Steps of luminance and of colour at quality 50, in zigzag order: T.81, tables K.1 and K.2.
_STEPS = np.array(
    [
        [
            *(16, 11, 12, 14, 12, 10, 16, 14, 13, 14, 18, 17, 16, 19, 24, 40, 26, 24, 22, 22, 24, 49, 35, 37, 29, 40),
            *(58, 51, 61, 60, 57, 51, 56, 55, 64, 72, 92, 78, 64, 68, 87, 69, 55, 56, 80, 109, 81, 87, 95, 98, 103),
            *(104, 103, 62, 77, 113, 121, 112, 100, 120, 92, 101, 103, 99),
        ],
        [17, 18, 18, 24, 21, 24, 47, 26, 26, 47, 99, 66, 56, 66, *[99] * 50],
    ]
)  # fmt: skip

#: Where in a block, row by row, the values of the zigzag order are: T.81, figure A.6.
_ZIGZAG = sorted(range(64), key=lambda at: (at // 8 + at % 8, at // 8 if (at // 8 + at % 8) % 2 else at % 8))

_MEANS = bytes(range(12))
#: Huffman tables of luminance, then of colour, of means and of the other coefficients: how many codes of each length, and the symbols.
#: T.81, tables K.3 to K.6.
_CODES = (
    bytes([0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]) + _MEANS,
    bytes([0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 125])
    + bytes.fromhex(
        "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728292a3435363738393a434445464748494a"
        "535455565758595a636465666768696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7"
        "c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
    ),
    bytes([0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]) + _MEANS,
    bytes([0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 119])
    + bytes.fromhex(
        "000102031104052131061241510761711322328108144291a1b1c109233352f0156272d10a162434e125f11718191a262728292a35363738393a43444546474849"
        "4a535455565758595a636465666768696a737475767778797a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5"
        "c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa"
    ),
)
_TABLE_NUMBERS = (0x00, 0x10, 0x01, 0x11)

#: Start of the image and JFIF 1.01 without a density, which must be its first segment.
_BEGIN = bytes.fromhex("ffd8 ffe0 0010 4a46494600 0101 00 0001 0001 0000")


def encode_jpegs(
    images: Sequence[np.ndarray], segments: Sequence[bytes], quality: int, *, halved: bool
) -> list[bytes]:
    """Each image as a baseline JPEG. The same image and segments give the same bytes.

    Args:
        images: uint8 `[height, width, 3]` each, of any sizes up to `MAX_SIDE`.
        segments: for each image what stands behind the JFIF segment: whole segments, marker and length included.
        quality: 1 to 100, as libjpeg counts.
        halved: colour in half the rows and columns (4:2:0), else in all (4:4:4).

    Raises:
        ValueError: an image is not such an array, or there are not as many segments.
        MemoryError: there is no room for the files.
    """
    _check(images, segments, quality)
    library = native_library()
    if library is None or not len(images):
        return encode_jpegs_reference(images, segments, quality, halved=halved)
    if any(image.nbytes > MAX_COMPILED_BYTES for image in images):
        return [
            encode_jpegs_reference([image], [own], quality, halved=halved)[0]
            if image.nbytes > MAX_COMPILED_BYTES
            else _encode_compiled(library, [image], [own], quality, halved)[0]
            for image, own in zip(images, segments, strict=True)
        ]
    return _encode_compiled(library, images, segments, quality, halved)


def encode_jpegs_reference(
    images: Sequence[np.ndarray], segments: Sequence[bytes], quality: int, *, halved: bool
) -> list[bytes]:
    """`encode_jpegs` with Pillow, which lets other threads run while libjpeg works."""
    _check(images, segments, quality)
    return [
        _encode_with_pillow(image, own, quality, halved) for image, own in zip(images, segments, strict=True)
    ]


def _check(images: Sequence[np.ndarray], segments: Sequence[bytes], quality: int) -> None:
    check_images(images, MAX_SIDE)
    if len(images) != len(segments):
        raise ValueError(f"{len(images)} images, {len(segments)} segments: one for each")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality {quality}: from 1 to 100")


def _encode_with_pillow(image: np.ndarray, segments: bytes, quality: int, halved: bool) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0" if halved else "4:4:4"
    )
    encoded = buffer.getvalue()
    after_jfif = 4 + int.from_bytes(encoded[4:6], "big")
    return encoded[:after_jfif] + segments + encoded[after_jfif:]


def _encode_compiled(
    library: ctypes.CDLL, images: Sequence[np.ndarray], segments: Sequence[bytes], quality: int, halved: bool
) -> list[bytes]:
    _declare(library)
    count = len(images)
    batch = ImageBatch(images)
    heads = [
        b"".join((_BEGIN, own, _tables_segment(quality), _frame(height, width, halved)))
        for (height, width), own in zip(batch.sizes.tolist(), segments, strict=True)
    ]
    offsets = np.array([0, *accumulate(map(len, heads))], np.int64)
    room = int(offsets[-1]) + sum(library.millijoule_jpeg_bound(*size) for size in batch.sizes.tolist())
    tables = np.empty((2, 64), np.uint8)
    tables[:, _ZIGZAG] = quantization(quality)
    codes = (ctypes.c_char_p * 4)(*_CODES)
    out = np.empty(room, np.uint8)
    ends = np.empty(count + 1, np.int64)
    failed = library.millijoule_encode_jpegs(
        native_form(),
        count,
        batch.addresses.ctypes.data,
        batch.sizes.ctypes.data,
        b"".join(heads),
        offsets.ctypes.data,
        tables.ctypes.data,
        codes,
        int(halved),
        out.ctypes.data,
        ends.ctypes.data,
    )
    if failed:
        raise MemoryError("no memory to encode images")
    return files_of(out, ends)


def quantization(quality: int) -> np.ndarray:
    """Steps of luminance and of colour, uint8 `[2, 64]` in zigzag order, at libjpeg's `quality`."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.clip((_STEPS * scale + 50) // 100, 1, 255).astype(np.uint8)


@cache
def _tables_segment(quality: int) -> bytes:
    return b"".join(
        b"\xff\xdb\x00\x43" + bytes([number]) + steps.tobytes()
        for number, steps in enumerate(quantization(quality))
    )


@cache
def _code_segments() -> bytes:
    return b"".join(
        b"\xff\xc4" + (3 + len(codes)).to_bytes(2, "big") + bytes([number]) + codes
        for number, codes in zip(_TABLE_NUMBERS, _CODES, strict=True)
    )


def _frame(height: int, width: int, halved: bool) -> bytes:
    """The frame's header, the Huffman tables and the scan's header."""
    size = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    sampling = b"\x22" if halved else b"\x11"
    frame = b"\xff\xc0\x00\x11\x08" + size + b"\x03\x01" + sampling + b"\x00\x02\x11\x01\x03\x11\x01"
    return frame + _code_segments() + b"\xff\xda\x00\x0c\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"


@cache
def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.millijoule_jpeg_bound.argtypes = [number, number]
    library.millijoule_jpeg_bound.restype = number
    library.millijoule_encode_jpegs.argtypes = [
        *(ctypes.c_int32, number, pointer, pointer, ctypes.c_char_p, pointer, pointer, pointer),
        *(ctypes.c_int32, pointer, pointer),
    ]
    library.millijoule_encode_jpegs.restype = number
