"""RGB images as PNG files, many in one call: no pixel is lost.

Source: PNG specification, third edition (W3C). The compiled form (`cpp/png`) looks at an image's pixels first. At most 256
colours, often enough used: a palette of 1, 2, 4 or 8 bits and no filter, repeats looked for in the pixel before, the row above
and, of larger images, one place more. More colours, but many pixels like their left neighbour: the same as RGB. Anything else, such
as photographs: the filter by which four rows' differences are least, runs, and Huffman codes for every 64 KiB.

The reference knows one way for all: RGB, every row less the one above, zlib's run-length strategy. Both decode to the same
pixels; the files are others, the reference's larger and dearer, and its bytes depend on the machine's zlib. The compiled ones do not
depend on the processor.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import numpy as np

from millijoule.kernels.image_batch import ImageBatch, check_images, files_of
from millijoule.kernels.native_library import native_form, native_library

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_UP_FILTER = 2
CHUNK_FRAME_BYTES = 12

#: Bytes of pixels from which on the reference encodes an image: it streams, the compiled form holds everything at once.
MAX_COMPILED_BYTES = 1 << 30


def encode_pngs(images: Sequence[np.ndarray], chunks: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Each image as an 8-bit sRGB PNG, palette or RGB. The same image and chunks give the same bytes.

    Args:
        images: uint8 `[height, width, 3]` each, of any sizes, or `[n, height, width, 3]`.
        chunks: for each image as many: what stands before its pixels, type and content of each chunk, such as b"tEXt" and a text.

    Raises:
        ValueError: an image is not such an array or has no pixels, or images have different numbers of chunks.
        MemoryError: there is no room for the files.
    """
    _check(images, chunks)
    library = native_library()
    if library is None or not len(images):
        return encode_pngs_reference(images, chunks)
    if any(image.nbytes > MAX_COMPILED_BYTES for image in images):
        return [
            encode_pngs_reference([image], [own])[0]
            if image.nbytes > MAX_COMPILED_BYTES
            else _encode_compiled(library, [image], [own])[0]
            for image, own in zip(images, chunks, strict=True)
        ]
    return _encode_compiled(library, images, chunks)


def encode_pngs_reference(images: Sequence[np.ndarray], chunks: Sequence[Sequence[bytes]]) -> list[bytes]:
    """`encode_pngs` with zlib and NumPy."""
    _check(images, chunks)
    return [_encode_with_zlib(image, own) for image, own in zip(images, chunks, strict=True)]


def encoder_name() -> str:
    """Which of the two writes this process' files: "compiled" or "zlib"."""
    return "zlib" if native_library() is None else "compiled"


def _check(images: Sequence[np.ndarray], chunks: Sequence[Sequence[bytes]]) -> None:
    check_images(images)
    if len(images) != len(chunks) or len(set(map(len, chunks))) > 1:
        raise ValueError(f"{len(images)} images, {len(chunks)} lists of chunks: one for each, all as long")
    if any(len(chunk) < 4 for own in chunks for chunk in own):
        raise ValueError("a chunk begins with the four letters of its type")


def _encode_compiled(
    library: ctypes.CDLL, images: Sequence[np.ndarray], chunks: Sequence[Sequence[bytes]]
) -> list[bytes]:
    _declare(library)
    count, per_image = len(images), len(chunks[0])
    batch = ImageBatch(images)
    flat = [chunk for own in chunks for chunk in own]
    texts = b"".join(flat)
    offsets = np.array([0, *accumulate(map(len, flat))], np.int64)
    room = len(texts) + CHUNK_FRAME_BYTES * len(flat)
    for (height, width), many in _tally(batch.sizes).items():
        room += many * library.millijoule_png_bound(height, width)
    out = np.empty(room, np.uint8)
    ends = np.empty(count + 1, np.int64)
    failed = library.millijoule_encode_pngs(
        native_form(),
        count,
        batch.addresses.ctypes.data,
        batch.sizes.ctypes.data,
        texts,
        offsets.ctypes.data,
        per_image,
        out.ctypes.data,
        ends.ctypes.data,
    )
    if failed:
        raise MemoryError("no memory to encode images")
    return files_of(out, ends)


def _tally(sizes: np.ndarray) -> dict[tuple[int, int], int]:
    """How many images have each (height, width)."""
    found: dict[tuple[int, int], int] = {}
    for height, width in sizes.tolist():
        found[height, width] = found.get((height, width), 0) + 1
    return found


@cache
def _declare(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.millijoule_png_bound.argtypes = [number, number]
    library.millijoule_png_bound.restype = number
    library.millijoule_encode_pngs.argtypes = [
        *(ctypes.c_int32, number, pointer, pointer, ctypes.c_char_p, pointer, number, pointer, pointer),
    ]
    library.millijoule_encode_pngs.restype = number


def _encode_with_zlib(image: np.ndarray, chunks: Sequence[bytes]) -> bytes:
    height, width, _ = image.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    whole = (b"IHDR" + header, b"sRGB\x00", *chunks, b"IDAT" + _compress_rows(image), b"IEND")
    return PNG_SIGNATURE + b"".join(map(_framed, whole))


def _compress_rows(image: np.ndarray) -> bytes:
    height, width, _ = image.shape
    pixels = image.reshape(height, width * 3)  # [height, 3 * width] uint8
    rows = np.empty((height, 1 + width * 3), np.uint8)  # each row: filter byte, then differences modulo 256
    rows[:, 0] = PNG_UP_FILTER
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packer.compress(rows.data) + packer.flush()


def _framed(chunk: bytes) -> bytes:
    """Its length before, its checksum behind; `chunk` is type and content."""
    return b"".join(((len(chunk) - 4).to_bytes(4, "big"), chunk, zlib.crc32(chunk).to_bytes(4, "big")))
