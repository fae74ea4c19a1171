"""Text files as lines or blocks of characters, whatever ends their lines.

Line feed, carriage return and both are one and the same line end, in a file from an old Mac and inside a quoted field of
Excel alike: what comes out has line feeds only.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from millijoule.pipeline.planning.raw_chunks import BadRow
from millijoule.workers.errors import InputError

#: A longer line of a text format cannot be one row.
MAX_LINE_CHARS = 16 * 2**20

#: First bytes of what is no UTF-8 text of prompts, whatever its name says, and what to do about it.
_UTF_16 = "UTF-16, and prompts are read as UTF-8; in Excel save as 'CSV UTF-8', or convert it with iconv -f UTF-16 -t UTF-8"
_SIGNATURES = {
    b"\xff\xfe": _UTF_16,
    b"\xfe\xff": _UTF_16,
    b"PK\x03\x04": "a zip archive or a spreadsheet; save the sheet as 'CSV UTF-8', or unpack the archive",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as 'CSV UTF-8'",
    b"\x1f\x8b": "gzip data; give its name the ending .gz",
    b"PAR1": "Parquet; give its name the ending .parquet",
    b"version https://git-lfs.github.com/": "a Git LFS pointer and not the file itself; fetch it with git lfs pull",
}


class TextFile:
    """A UTF-8 file, with or without byte order mark; bytes that are not UTF-8 become lone surrogates.

    Args:
        raw: the seekable binary file.

    Raises:
        InputError: the file is no such text.
    """

    def __init__(self, url: str, raw: Any, compressed: bool) -> None:
        self.url = url
        self.number = 0  #: lines read so far
        stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        with self._reading():
            start = stream.read(max(map(len, _SIGNATURES)))
            stream.seek(0)
        for signature, meaning in _SIGNATURES.items():
            if start.startswith(signature):
                raise InputError(f"{self.url}: this is {meaning}")
        if start[1:4:2] == b"\0\0" or start[:3:2] == b"\0\0":  # every other byte of plain letters
            raise InputError(f"{self.url}: this is {_UTF_16}")
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=None)

    def lines(self) -> Iterator[str | None]:
        """The lines, each with its end, if it has one. One longer than `MAX_LINE_CHARS` is passed over and comes as None.

        Raises:
            InputError: the file cannot be read any further.
        """
        with self._reading():
            while line := self._text.readline(MAX_LINE_CHARS):
                self.number += 1
                if len(line) == MAX_LINE_CHARS and not line.endswith("\n"):
                    while (rest := self._text.readline(MAX_LINE_CHARS)) and not rest.endswith("\n"):
                        pass
                    yield None
                else:
                    yield line

    def read(self, chars: int) -> str:
        """The next characters, fewer at the end; raises like `lines`."""
        with self._reading():
            block = self._text.read(chars)
        self.number += block.count("\n")
        return block

    def rewind(self) -> None:
        """Start again at the first line."""
        with self._reading():
            self._text.seek(0)
        self.number = 0

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self.url}: broken gzip data after line {self.number} ({error}); compress or copy the file again"
            ) from error
        except OSError as error:
            raise InputError(f"{self.url}: cannot read on after line {self.number}: {error}") from error


def too_long(url: str, row: int) -> BadRow:
    """The row of a line that `TextFile.lines` passed over."""
    return BadRow(url, row, None, f"the line is longer than {MAX_LINE_CHARS:,} characters")
