"""Rows of a prompt file before anything is checked: chunks bounded in rows and characters, and the rows that cannot be read.

Every format is read into these. Nothing here knows what a column means.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.workers.errors import InputError

#: Rows in a chunk at most. Larger chunks are hardly faster and cost memory.
CHUNK_ROWS = 16_384

#: A chunk ends early after this many characters (Parquet: bytes), so that long rows do not add up.
CHUNK_CHARS = 16 * 2**20

#: Characters of a prompt that a bad row repeats.
SHOWN_CHARS = 200

Value = TypeVar("Value")

#: A column as its file has it.
Values: TypeAlias = pa.Array | list[Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row of the input that yields no image, and why.

    `row` is 1-based: in txt and jsonl the line, in csv and tsv the record after the header, in json the element of the
    list, in Parquet the row. `column` is the file's own name, None where the row as a whole is at fault. `prompt` is cut
    to `SHOWN_CHARS`.
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


@dataclass
class RawChunk:
    """Some rows of one file, before anything is checked; here of a format that has columns.

    `rows` is int64 `[n]`, the row numbers; `last_row` the number of the last row read, bad rows included. `columns` are
    all that some row has; `column` gives the values of one, null where a row does not have it. In a chunk
    `from_text` an empty field is the only way to say that there is none; with `decimal_comma` 7,5 is a number.
    """

    rows: np.ndarray
    bad: list[BadRow]
    last_row: int
    columns: dict[str, Values]
    from_text: bool = False
    decimal_comma: bool = False

    def column(self, name: str) -> Values:
        return self.columns[name]

    def add_columns(self, constants: Mapping[str, str | None]) -> None:
        """Give every row these columns."""
        self.columns |= {name: [value] * len(self.rows) for name, value in constants.items()}

    def extra(self, used: Collection[str]) -> list[str | None]:
        """Per row a JSON object of all columns but `used`; None where there are no others."""
        others = {name: python_values(values) for name, values in self.columns.items() if name not in used}
        if not others:
            return [None] * len(self.rows)
        return [to_json(dict(zip(others, row, strict=True))) for row in zip(*others.values(), strict=True)]


class RecordChunk(RawChunk):
    """Rows of JSON: each a mapping with keys of its own; `columns` has their names alone."""

    def __init__(
        self, rows: np.ndarray, bad: list[BadRow], last_row: int, records: list[dict[str, Any]]
    ) -> None:
        super().__init__(rows, bad, last_row, {name: [] for record in records for name in record})
        self.records = records

    def column(self, name: str) -> list[Any]:
        return [record.get(name) for record in self.records]

    def add_columns(self, constants: Mapping[str, str | None]) -> None:
        super().add_columns(constants)
        self.records = [record | dict(constants) for record in self.records]

    def extra(self, used: Collection[str]) -> list[str | None]:
        others = ({k: v for k, v in record.items() if k not in used} for record in self.records)
        return [to_json(record) if record else None for record in others]


def gathered(
    items: Iterable[tuple[int, Value | BadRow, int]],
    chunk: Callable[[np.ndarray, list[BadRow], int, list[Value]], RawChunk],
) -> Iterator[RawChunk]:
    """Rows as they are read, by chunks; one without rows where there are no items.

    Args:
        items: row number, value or what is wrong with it, and its size in characters.
        chunk: makes a chunk of row numbers int64 `[n]`, bad rows, the last row's number and the `n` values.
    """
    values: list[Value] = []
    rows: list[int] = []
    bad: list[BadRow] = []
    chars, row = 0, 0
    for row, value, size in items:
        if isinstance(value, BadRow):
            bad.append(value)
        else:
            values.append(value)
            rows.append(row)
            chars += size
        if len(rows) + len(bad) >= CHUNK_ROWS or chars >= CHUNK_CHARS:
            yield chunk(np.array(rows, np.int64), bad, row, values)
            values, rows, bad, chars = [], [], [], 0
    if rows or bad or not row:
        yield chunk(np.array(rows, np.int64), bad, row, values)


def refuse_repeated_names(names: list[str], url: str) -> None:
    """Raise InputError where two columns have the same name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{url}: more than one column is named {', '.join(map(repr, twice))}; rename them")


def has_surrogates(text: str) -> bool:
    """Whether `text` has a code point that UTF-8 cannot hold: a byte that was not UTF-8, or half a pair from JSON."""
    return re.search(r"[\ud800-\udfff]", text) is not None


def shown(value: Any, chars: int = SHOWN_CHARS) -> str | None:
    """`value` as a bad row repeats it: text that can be stored, cut to `chars`; None stays None."""
    if value is None:
        return None
    text = value if isinstance(value, str) else to_json(value)
    text = text if len(text) <= chars else text[: chars - 3] + "..."
    return text.encode("utf-8", "backslashreplace").decode()


def python_values(column: Values) -> list[Any]:
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
        if pa.types.is_nested(kind):
            raise
        raw = pc.cast(column, pa.large_binary()).to_pylist()
        return [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw]


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
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_json_default)
