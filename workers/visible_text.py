"""Text of others where people see it: nothing in it can colour, move or clear a terminal, hide, or turn the words around it.

Prompts, names and messages keep such characters in every file. On terminals, pages and pictures each is written as its
code point instead, so that whoever looks sees that it is there.
"""

from __future__ import annotations

import logging
import re
import sys

#: What is obeyed or not seen: control characters but for line feed and tab, soft hyphen, marks and controls of direction,
#: blanks without width, separators of lines, annotations, tags, halves of pairs. Joiners stay: emoji and whole
#: scripts need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)

_BLANKS = re.compile(r"\r\n|[\r\n\t]")


def visible(text: str) -> str:
    """`text` on one line: a blank for each line end and tab, and as `visible_lines`."""
    return visible_lines(_BLANKS.sub(" ", text))


def visible_lines(text: str) -> str:
    """`text` with its line feeds and tabs; every other character that is obeyed or not seen as `[U+202E]`."""
    return _HIDDEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


class VisibleFormatter(logging.Formatter):
    """Log lines in which whatever files and models put into them is visible."""

    def format(self, record: logging.LogRecord) -> str:
        return visible_lines(super().format(record))


def log_to_stderr(line_format: str) -> None:
    """Log from INFO up in `line_format`, visibly, unless the process has set up its logging already."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter(line_format))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def without_secrets(url: str) -> str:
    """`url` without its login and its query, which may be secrets, for messages; a path as it is."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    path, asked, _ = path.partition("?")
    return f"{scheme}://{'...@' if at else ''}{host}{slash}{path}{'?...' if asked else ''}"
