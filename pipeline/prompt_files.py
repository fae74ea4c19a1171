"""Prompt files of every format as chunks of raw rows: columns as the file has them, and the rows that cannot be read.

In go files, out come chunks bounded in rows and characters, so memory stays the same whatever the file size. Nothing
here knows what a column means; `pipeline.prompts` does.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.workers.errors import InputError
from millijoule.workers.storage import InputFile, open_input_file

#: Rows in a chunk at most. Larger chunks are hardly faster and cost memory.
CHUNK_ROWS = 16_384

#: A chunk ends early after this many characters (Parquet: bytes), so that long rows do not add up.
CHUNK_CHARS = 16 * 2**20

#: A longer line of a text format cannot be one row.
MAX_LINE_CHARS = 16 * 2**20

#: Characters of a prompt that a bad row repeats.
SHOWN_CHARS = 200

FORMATS = ("txt", "csv", "tsv", "jsonl", "ndjson", "parquet", "pq")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of the input that yields no image, and why.

    `row` is 1-based: in txt and jsonl the line, in csv and tsv the record after the header, in Parquet the row.
    `column` is the file's own name, None where the row as a whole is at fault. `prompt` is cut to `SHOWN_CHARS`.
    """

    file: str
    row: int
    column: str | None
    reason: str
    prompt_id: str | None = None
    prompt: str | None = None

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column is not None else ""
        return f"{self.file}:{self.row}{column}: {self.reason}"


class RawChunk(Protocol):
    """Some rows of one file, before anything is checked.

    `rows` is int64 `[n]`, the row numbers; `last_row` the number of the last row read, bad rows included.
    """

    rows: np.ndarray
    bad: list[BadRow]
    last_row: int

    @property
    def names(self) -> Collection[str]:
        """All columns that some row of the chunk has."""
        ...

    def column(self, name: str) -> pa.Array | list[Any]:
        """The values of a column of the chunk, or nulls where the chunk does not have it."""
        ...

    def missing(self, name: str) -> np.ndarray:
        """bool `[n]`: the row does not even have the column (jsonl)."""
        ...

    def extra(self, used: Collection[str]) -> list[str | None] | None:
        """Per row a JSON object of all columns but `used`; None where there are no others."""
        ...


@dataclass
class ColumnChunk:
    """Rows of a format that has columns."""

    rows: np.ndarray
    bad: list[BadRow]
    last_row: int
    columns: dict[str, pa.Array | list[Any]]

    @property
    def names(self) -> Collection[str]:
        return self.columns.keys()

    def column(self, name: str) -> pa.Array | list[Any]:
        return self.columns[name]

    def missing(self, name: str) -> np.ndarray:
        return np.zeros(len(self.rows), bool)

    def extra(self, used: Collection[str]) -> list[str | None] | None:
        others = [name for name in self.columns if name not in used]
        if not others:
            return None
        values = [python_values(self.columns[name]) for name in others]
        return [to_json(dict(zip(others, row, strict=True))) for row in zip(*values, strict=True)]


@dataclass
class RecordChunk:
    """Rows of jsonl: each a mapping with keys of its own."""

    rows: np.ndarray
    bad: list[BadRow]
    last_row: int
    records: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self._names = dict.fromkeys(name for record in self.records for name in record)

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    def column(self, name: str) -> list[Any]:
        return [record.get(name) for record in self.records]

    def missing(self, name: str) -> np.ndarray:
        return np.array([name not in record for record in self.records], bool)

    def extra(self, used: Collection[str]) -> list[str | None] | None:
        if set(self.names) <= set(used):
            return None
        others = [{k: v for k, v in record.items() if k not in used} for record in self.records]
        return [to_json(record) if record else None for record in others]


def file_format(url: str) -> tuple[str, bool]:
    """The format and whether the file is gzip-compressed, from its name; raises InputError where that tells nothing."""
    name = url.rsplit("/", 1)[-1].lower()
    compressed = name.endswith(".gz")
    extension = name.removesuffix(".gz").rpartition(".")[2]
    if extension not in FORMATS or "." not in name.removesuffix(".gz"):
        raise InputError(
            f"{url}: unknown prompt format; name the file *.txt, *.csv, *.tsv, *.jsonl, *.ndjson (each also .gz) or "
            "*.parquet"
        )
    extension = {"ndjson": "jsonl", "pq": "parquet"}.get(extension, extension)
    if extension == "parquet" and compressed:
        raise InputError(
            f"{url}: gzip around Parquet cannot be read; decompress it (Parquet compresses itself)"
        )
    return extension, compressed


def read_chunks(file: InputFile) -> Iterator[RawChunk]:
    """All rows of one file, chunk by chunk in file order; nothing for a file without rows.

    Raises:
        InputError: the file cannot be read any further; the message names the file and how far it went.
        StoreError: storage failed.
    """
    kind, compressed = file_format(file.url)
    if kind == "parquet":
        yield from _read_parquet(file.url)
        return
    with open_input_file(file.url) as raw:
        lines = _Lines(file.url, raw, compressed, newline="" if kind in ("csv", "tsv") else "\n")
        if kind == "txt":
            yield from _read_txt(lines)
        elif kind == "jsonl":
            yield from _read_jsonl(lines)
        else:
            yield from _read_csv(lines, "," if kind == "csv" else "\t")


class _Lines:
    """The lines of a UTF-8 file, each with its end; bytes that are not UTF-8 become lone surrogates.

    A line longer than `MAX_LINE_CHARS` is passed over and comes as None.
    """

    def __init__(self, url: str, raw: Any, compressed: bool, newline: str) -> None:
        self.url = url
        self.number = 0  # lines read so far
        self._stream = gzip.GzipFile(fileobj=raw) if compressed else raw
        self._newline = newline

    def __iter__(self) -> Iterator[str | None]:
        try:
            if self._stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise InputError(
                    f"{self.url}: this is UTF-16, and prompts are read as UTF-8; convert it with iconv -f UTF-16 -t UTF-8"
                )
            self._stream.seek(0)
            text = io.TextIOWrapper(
                self._stream, encoding="utf-8-sig", errors="surrogateescape", newline=self._newline
            )
            while line := text.readline(MAX_LINE_CHARS):
                self.number += 1
                if len(line) == MAX_LINE_CHARS and not line.endswith("\n"):
                    while (rest := text.readline(MAX_LINE_CHARS)) and not rest.endswith("\n"):
                        pass
                    yield None
                else:
                    yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(
                f"{self.url}: broken gzip data after line {self.number} ({error}); compress or copy the file again"
            ) from error
        except OSError as error:
            raise InputError(f"{self.url}: cannot read on after line {self.number}: {error}") from error


def _read_txt(lines: _Lines) -> Iterator[ColumnChunk]:
    prompts: list[str] = []
    rows: list[int] = []
    bad: list[BadRow] = []
    chars = 0
    for row, line in enumerate(lines, start=1):
        if line is None:
            bad.append(_too_long(lines.url, row))
        elif not line.isspace():
            prompts.append(line.removesuffix("\n").removesuffix("\r"))
            rows.append(row)
            chars += len(line)
        if len(rows) + len(bad) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield ColumnChunk(np.array(rows, np.int64), bad, row, {"prompt": prompts})
            prompts, rows, bad, chars = [], [], [], 0
    if rows or bad:
        yield ColumnChunk(np.array(rows, np.int64), bad, lines.number, {"prompt": prompts})


def _read_jsonl(lines: _Lines) -> Iterator[RecordChunk]:
    records: list[dict[str, Any]] = []
    rows: list[int] = []
    bad: list[BadRow] = []
    chars = 0
    for row, line in enumerate(lines, start=1):
        if line is None:
            bad.append(_too_long(lines.url, row))
        elif not line.isspace():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                bad.append(BadRow(lines.url, row, None, _json_problem(error), None, shown(line.strip())))
            else:
                if type(record) is dict:
                    records.append(record)
                    rows.append(row)
                    chars += len(line)
                else:
                    reason = f"each line must be a JSON object, not {shown(line.strip(), 40)}"
                    bad.append(BadRow(lines.url, row, None, reason))
        if len(rows) + len(bad) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield RecordChunk(np.array(rows, np.int64), bad, row, records)
            records, rows, bad, chars = [], [], [], 0
    if rows or bad:
        yield RecordChunk(np.array(rows, np.int64), bad, lines.number, records)


def _read_csv(lines: _Lines, delimiter: str) -> Iterator[ColumnChunk]:
    reader = csv.reader(_whole_lines(lines), delimiter=delimiter, strict=True)
    header = _csv_header(reader, lines.url)
    if header is None:
        return
    records: list[list[str]] = []
    rows: list[int] = []
    bad: list[BadRow] = []
    chars, row = 0, 0
    line = reader.line_num
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            row += 1
            bad.append(
                BadRow(lines.url, row, None, f"{_span(line + 1, reader.line_num)}: malformed: {error}")
            )
        else:
            if fields:
                row += 1
                if len(fields) == len(header):
                    records.append(fields)
                    rows.append(row)
                    chars += sum(map(len, fields))
                else:
                    where = _span(line + 1, reader.line_num)
                    reason = f"{where}: {len(fields)} fields, but the header has {len(header)}"
                    bad.append(BadRow(lines.url, row, None, reason))
        line = reader.line_num
        if len(rows) + len(bad) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield ColumnChunk(np.array(rows, np.int64), bad, row, _columns(header, records))
            records, rows, bad, chars = [], [], [], 0
    # A header alone still says which columns there are, so that a missing prompt column is found.
    if rows or bad or not row:
        yield ColumnChunk(np.array(rows, np.int64), bad, row, _columns(header, records))


def _whole_lines(lines: _Lines) -> Iterator[str]:
    for line in lines:
        if line is None:
            raise InputError(
                f"{lines.url}: line {lines.number} is longer than {MAX_LINE_CHARS:,} characters; this is no table of prompts"
            )
        yield line


def _csv_header(reader: Iterator[list[str]], url: str) -> list[str] | None:
    try:
        header = next((fields for fields in reader if fields), None)
    except csv.Error as error:
        raise InputError(f"{url}: malformed header: {error}") from error
    if header is None:
        return None
    header = [name.strip() for name in header]
    if any(has_surrogates(name) for name in header):
        raise InputError(f"{url}: the header is not UTF-8; save the file as UTF-8")
    _refuse_duplicates(header, url)
    return header


def _columns(header: list[str], records: list[list[str]]) -> dict[str, pa.Array | list[Any]]:
    columns = zip(*records, strict=True) if records else ([] for _ in header)
    return {name: list(values) for name, values in zip(header, columns, strict=True)}


def _read_parquet(url: str) -> Iterator[ColumnChunk]:
    row = 0
    with open_input_file(url) as raw:
        try:
            file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
            _refuse_duplicates(file.schema_arrow.names, url)
            batches = file.iter_batches(_parquet_chunk_rows(file.metadata), use_threads=False)
            if not file.metadata.num_rows:
                empty = file.schema_arrow.empty_table()
                yield ColumnChunk(
                    np.empty(0, np.int64), [], 0, {n: empty[n].combine_chunks() for n in empty.column_names}
                )
            for batch in batches:
                rows = np.arange(row + 1, row + 1 + len(batch), dtype=np.int64)
                row += len(batch)
                yield ColumnChunk(
                    rows, [], row, dict(zip(batch.schema.names, map(_plain, batch.columns), strict=True))
                )
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{url}: unreadable Parquet after row {row}: {error}") from error


def _parquet_chunk_rows(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    bytes_per_row = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=1)
    return max(1, min(CHUNK_ROWS, int(CHUNK_CHARS / max(bytes_per_row, 1))))


def _plain(column: pa.Array) -> pa.Array:
    """The column without dictionary encoding or extension type."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


def _refuse_duplicates(names: list[str], url: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"{url}: more than one column is named {', '.join(map(repr, twice))}; rename them")


def _too_long(url: str, row: int) -> BadRow:
    return BadRow(url, row, None, f"the line is longer than {MAX_LINE_CHARS:,} characters")


def _json_problem(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at character {error.pos + 1}"
    return f"not valid JSON: {error}"


def _span(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first}-{last}"


def has_surrogates(text: str) -> bool:
    """Whether `text` has a code point that UTF-8 cannot hold: a byte that was not UTF-8, or half a pair from JSON."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def shown(value: Any, chars: int = SHOWN_CHARS) -> str | None:
    """`value` as a bad row repeats it: text that can be stored, cut to `chars`; None stays None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else to_json(value)
    text = text if len(text) <= chars else text[: chars - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def python_values(column: pa.Array | list[Any]) -> list[Any]:
    """The values as Python objects; text that is not UTF-8 holds lone surrogates."""
    if isinstance(column, list):
        return column
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_date(kind):
        column = pc.cast(column, pa.string())  # Python's own types have no nanoseconds
    elif pa.types.is_duration(kind):
        column = pc.cast(column, pa.int64())
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise
        raw = column.view(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw.to_pylist()]


def to_json(value: Any) -> str:
    """Compact JSON. NaN and infinities become strings; bytes text where they are UTF-8, else {"base64": ...}."""
    try:
        return _ENCODER.encode(value)
    except ValueError:
        return _ENCODER.encode(_finite(value))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def _json_default(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            import base64

            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_json_default)
