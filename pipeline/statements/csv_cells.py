"""CSV that a spreadsheet can open without obeying it: text that would begin a formula begins with an apostrophe instead."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from millijoule.workers.visible_text import visible

#: What spreadsheets take for the beginning of a formula, the wide forms of East Asian keyboards too.
_FORMULA = tuple("=+-@\t\r\n|%＝＋－＠")


def safe_text(text: str) -> str:
    """`text` as a cell: one line, no control characters, and never the beginning of a formula."""
    shown = visible(text)
    return f"'{shown}" if text.startswith(_FORMULA) or shown.lstrip().startswith(_FORMULA) else shown


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
