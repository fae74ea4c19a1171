"""Provenance as EXIF, which JPEG and WebP carry: `parameters` as UserComment, where A1111 and its family look for it, and the
record as ImageDescription.

Source: EXIF 2.32 (CIPA DC-008), sections 4.5 and 4.6.
"""

from __future__ import annotations

import struct

from PIL import Image

from millijoule.workers.images.provenance import Provenance

#: Tags of EXIF 2.32: the first is one of the image itself, the second of its Exif directory.
IMAGE_DESCRIPTION = 0x010E
EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286
#: UserComment begins with its encoding in eight bytes; "UNICODE" is read as UTF-16, and by A1111 as big-endian.
_UNICODE = b"UNICODE\x00"


#: Field types of TIFF 6.0.
_BYTE, _ASCII, _LONG = 1, 2, 4
_HEAD = b"Exif\x00\x00"
#: Big-endian, and where the first directory is.
_TIFF_HEAD = b"MM\x00\x2a\x00\x00\x00\x08"
_FIELD = struct.Struct(">HHLL")  # tag, type, count, where the value is, from the TIFF head on
_FIRST_VALUE = len(_TIFF_HEAD) + 2 + 2 * _FIELD.size + 4  # behind a directory of two fields


def exif_of(
    provenance: Provenance, *, with_record: bool = True, most_comment_bytes: int | None = None
) -> bytes:
    """An EXIF block, "Exif" and two NULs before it; `parameters` is cut to `most_comment_bytes`, an even number.

    Two directories, one after the other, with one or two fields each; Pillow takes as long to write them as to encode 64x64 pixels.
    """
    text = provenance.parameters.replace("\x00", "").encode("utf-16-be", "replace")[:most_comment_bytes]
    comment = _UNICODE + text
    record = provenance.record.encode("ascii") + b"\x00" if with_record else b""
    own = _FIRST_VALUE if with_record else _FIRST_VALUE - _FIELD.size
    directory = own + len(record) + len(record) % 2
    fields = [_FIELD.pack(EXIF_DIRECTORY, _LONG, 1, directory)]
    if with_record:
        fields.insert(0, _FIELD.pack(IMAGE_DESCRIPTION, _ASCII, len(record), own))
    comment_at = directory + 2 + _FIELD.size + 4
    return b"".join(
        (
            _HEAD,
            _TIFF_HEAD,
            len(fields).to_bytes(2, "big"),
            *fields,
            bytes(4),  # no further directory
            record,
            bytes(len(record) % 2),
            b"\x00\x01",
            _FIELD.pack(USER_COMMENT, _BYTE, len(comment), comment_at),
            bytes(4),
            comment,
        )
    )


def read_exif(exif: Image.Exif) -> tuple[str, str]:
    """(parameters, record) from an image's EXIF; "" for what is not there."""
    comment = exif.get_ifd(EXIF_DIRECTORY).get(USER_COMMENT, b"")
    record = exif.get(IMAGE_DESCRIPTION, "")
    return bytes(comment).removeprefix(_UNICODE).decode("utf-16-be", "replace"), str(record)
