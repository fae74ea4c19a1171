"""Provenance as EXIF, which JPEG and WebP carry: `parameters` as UserComment, where A1111 and its family look for it, and the
record as ImageDescription.
"""

from __future__ import annotations

from PIL import Image

from millijoule.workers.images.provenance import Provenance

#: Tags of EXIF 2.32: the first is one of the image itself, the second of its Exif directory.
IMAGE_DESCRIPTION = 0x010E
EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286
#: UserComment begins with its encoding in eight bytes; "UNICODE" is read as UTF-16, and by A1111 as big-endian.
_UNICODE = b"UNICODE\x00"


def exif_of(
    provenance: Provenance, *, with_record: bool = True, most_comment_bytes: int | None = None
) -> bytes:
    """An EXIF block, "Exif" and two NULs before it; `parameters` is cut to `most_comment_bytes`."""
    exif = Image.Exif()
    comment = provenance.parameters.replace("\x00", "").encode("utf-16-be", "replace")[:most_comment_bytes]
    exif.get_ifd(EXIF_DIRECTORY)[USER_COMMENT] = _UNICODE + comment
    if with_record:
        exif[IMAGE_DESCRIPTION] = provenance.record
    return exif.tobytes()


def read_exif(exif: Image.Exif) -> tuple[str, str]:
    """(parameters, record) from an image's EXIF; "" for what is not there."""
    comment = exif.get_ifd(EXIF_DIRECTORY).get(USER_COMMENT, b"")
    record = exif.get(IMAGE_DESCRIPTION, "")
    return bytes(comment).removeprefix(_UNICODE).decode("utf-16-be", "replace"), str(record)
