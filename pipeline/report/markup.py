"""Tables and search boxes of the report page as HTML. Whatever text goes in comes out escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from millijoule.pipeline.report import words

#: Longer texts in a table may break anywhere.
LONG_CELL_CHARS = 24


@dataclass(frozen=True)
class Row:
    """A table row of plain texts; `attributes` become data-* for the filters; a section's one cell spans the table."""

    cells: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)
    is_section: bool = False

    def render(self, right: set[int], columns: int) -> str:
        """The row as HTML; columns in `right` are right-aligned."""
        if self.is_section:
            return f'<tr><th class="section" colspan="{columns}">{escape(self.cells[0])}</th></tr>'
        data = "".join(f' data-{k}="{escape(v)}"' for k, v in self.attributes.items())
        return f"<tr{data}>{''.join(_cell(text, i in right) for i, text in enumerate(self.cells))}</tr>"


def _cell(text: str, is_number: bool) -> str:
    kinds = ["number"] if is_number else ["text"] if len(text) > LONG_CELL_CHARS else []
    if text in (words.NOT_MEASURED, words.NOT_GIVEN, words.NOT_KNOWN, "-"):
        kinds.append("missing")
    classes = f' class="{" ".join(kinds)}"' if kinds else ""
    return f"<td{classes}>{escape(text)}</td>"


def table(heads: Sequence[str], rows: Iterable[Row], *, numbers: Iterable[int] = (), name: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page; columns `numbers` are right-aligned."""
    right = set(numbers)
    head = "".join(
        f"<th{' class=number' if i in right else ''}>{escape(text)}</th>" for i, text in enumerate(heads)
    )
    body = "".join(row.render(right, len(heads)) for row in rows)
    identity = f' id="{name}"' if name else ""
    return (
        f'<div class="scroll" tabindex="0"><table{identity}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def search_box(target: str, text: str) -> str:
    """A box that hides the rows or items of element `target` without its words."""
    return (
        f'<div class="filters"><label><input type="search" data-search="{target}" placeholder="{text}" '
        f'aria-label="{text}"> <output></output></label></div>'
    )
