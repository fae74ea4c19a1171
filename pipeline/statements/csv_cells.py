"""CSV that a spreadsheet can open without obeying it: text that would begin a formula begins with an apostrophe instead."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from millijoule.workers.visible_text import visible

#: What spreadsheets take for the beginning of a formula, the wide forms of East Asian keyboards too.
_FORMULA = tuple("=+-@\t\r\n|%＝＋－＠")
#: Texts that `safe_text` may change: they begin so, or have a character in them that is not plainly printed.
_SUSPICIOUS = r"^[\s=+\-@|%＝＋－＠]|[^ -~]"


def safe_text(text: str) -> str:
    """`text` as a cell: one line, no control characters, and never the beginning of a formula."""
    shown = visible(text)
    return f"'{shown}" if text.startswith(_FORMULA) or shown.lstrip().startswith(_FORMULA) else shown


def safe_table(rows: pa.Table) -> pa.Table:
    """`rows` in which no text, nor the name of a column, begins a formula or holds a control character."""
    for i, (name, column) in enumerate(zip(rows.column_names, rows.columns, strict=True)):
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = _safe_column(column.cast(kind))
        rows = rows.set_column(i, safe_text(name), column)
    return rows


def _safe_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    odd = pc.match_substring_regex(column, _SUSPICIOUS)
    if not pc.any(odd).as_py():
        return column
    safe = [
        t if t is None or not o else safe_text(t) for t, o in zip(*map(_listed, (column, odd)), strict=True)
    ]
    return pa.chunked_array([pa.array(safe, column.type)])


def _listed(column: pa.ChunkedArray) -> list[Any]:
    return column.to_pylist()


def as_csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """`rows` below `heads`; None is an empty cell, a number is written with all its digits."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([safe_text(head) for head in heads])
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return sink.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if type(value) in (int, float) else safe_text(str(value))
