"""Delimited text as rows: csv and tsv, whatever stands between their fields."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator

import numpy as np

from millijoule.pipeline.planning.column_names import KnownNames, Remarks
from millijoule.pipeline.planning.prompt_text import TextFile, too_long
from millijoule.pipeline.planning.raw_chunks import (
    BadRow,
    RawChunk,
    gathered,
    has_surrogates,
    refuse_repeated_names,
)
from millijoule.workers.errors import InputError

#: What may stand between fields, with words for messages.
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "pipes"}

#: What a line of empty fields is made of.
_EMPTY = "".join(DELIMITERS) + ' "\n'

#: Excel's first line that says what stands between fields.
_SEP_LINE = re.compile(r'"?sep=([^\n])"?\s*', re.IGNORECASE)


def read_csv(
    text: TextFile, usual: str, forced: str | None, known: KnownNames, remarks: Remarks
) -> Iterator[RawChunk]:
    """Rows of delimited text with a header.

    Args:
        usual: what stands between the fields of a file of this name.
        forced: what stands there for sure, None to find out from the header.

    Raises:
        InputError: the header or the whole file cannot be read.
    """
    lines = _whole_lines(text)
    first = list(_first_lines(lines))
    if not first:
        return
    said = _SEP_LINE.fullmatch(first[-1])
    if said:
        first = list(_first_lines(lines))
    delimiter = forced or (said[1] if said else _recognised(first, usual, known))
    if delimiter != usual and forced is None:
        words = DELIMITERS.get(delimiter, repr(delimiter))
        remarks.add(text.url, f"fields are separated by {words}; --delimiter forces another")
    reader = csv.reader(itertools.chain(first, lines), delimiter=delimiter, strict=True)
    header = _header(reader, text.url)
    if not header:
        return

    def chunk(rows: np.ndarray, bad: list[BadRow], last: int, records: list[list[str]]) -> RawChunk:
        columns = map(list, zip(*records, strict=True)) if records else ([] for _ in header)
        named = dict(zip(header, columns, strict=True))
        return RawChunk(rows, bad, last, named, from_text=True, decimal_comma=delimiter != ",")

    yield from gathered(_records(reader, text, header), chunk)


def _whole_lines(text: TextFile) -> Iterator[str]:
    for line in text.lines():
        if line is None:
            reason = too_long(text.url, text.number).reason.replace("the line", f"line {text.number}")
            raise InputError(f"{text.url}: {reason}; this is no table of prompts")
        yield line


def _first_lines(lines: Iterator[str]) -> Iterator[str]:
    """Lines up to the first that has more than empty fields."""
    for line in lines:
        yield line
        if line.strip(_EMPTY):
            return


def _recognised(lines: list[str], usual: str, known: KnownNames) -> str:
    """The delimiter with which the header has a prompt column; the usual one where that does not settle it."""
    header = lines[-1] if lines else ""
    fitting = [d for d in DELIMITERS if known.hold_prompt(_split(header, d))]
    return fitting[0] if len(fitting) == 1 else usual


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for fields in csv.reader([line], delimiter=delimiter) for name in fields]
    except csv.Error:  # reading it as a header will say so
        return []


def _header(reader: Iterator[list[str]], url: str) -> list[str]:
    try:
        fields = next((fields for fields in reader if _has_content(fields)), [])
    except csv.Error as error:
        raise InputError(f"{url}: malformed header: {error}") from error
    header = [name.strip() for name in fields]
    if any(has_surrogates(name) for name in header):
        raise InputError(f"{url}: the header is not UTF-8; save the file as UTF-8")
    while len(header) > 1 and not header[-1]:  # empty columns at the right edge of a sheet
        header.pop()
    header = [name or f"column {i}" for i, name in enumerate(header, start=1)]
    refuse_repeated_names(header, url)
    return header


def _records(
    reader: Iterator[list[str]], text: TextFile, header: list[str]
) -> Iterator[tuple[int, list[str] | BadRow, int]]:
    row, n = 0, len(header)
    while True:
        line = text.number + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wrong = f"malformed: {error}"
        else:
            if not _has_content(fields) and fields != [""]:
                continue
            if len(fields) > n and not _has_content(fields[n:]):
                del fields[n:]
            if len(fields) == n:
                row += 1
                yield row, fields, sum(map(len, fields))
                continue
            wrong = f"{len(fields)} fields, but the header has {n}"
        row += 1
        lines = f"line {line}" if line >= text.number else f"lines {line}-{text.number}"
        yield row, BadRow(text.url, row, None, f"{lines}: {wrong}"), 0


def _has_content(fields: list[str]) -> bool:
    """Whether a record says anything; sheets are exported with the empty rows and columns at their edges."""
    return bool(fields and fields[0].strip()) or any(not field.isspace() for field in fields if field)
