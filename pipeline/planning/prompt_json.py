"""JSON as rows: lines, one list of records, or what a data set or a batch of requests wraps around them.

A .json file is read in pieces, twice at most: once to find where its rows are, once to read them. Only one value at a
time is in memory, so it may be of any size, but no record in it longer than `MAX_VALUE_CHARS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from millijoule.pipeline.planning.column_names import KnownNames, Remarks
from millijoule.pipeline.planning.prompt_text import TextFile, too_long
from millijoule.pipeline.planning.raw_chunks import BadRow, RawChunk, RecordChunk, gathered, shown
from millijoule.workers.errors import InputError

#: A longer record, or another value of a file's outermost object that is no list, cannot be read.
MAX_VALUE_CHARS = 16 * 2**20

#: Characters read at a time.
BLOCK_CHARS = 2**18

#: What may come after a number.
_ENDS = tuple(",]} \t\n")

#: Members of an object that a message lists.
_SHOWN_MEMBERS = 8

Record = dict[str, Any]


def read_jsonl(text: TextFile, known: KnownNames) -> Iterator[RawChunk]:
    """A record per line."""

    def items() -> Iterator[tuple[int, Record | BadRow, int]]:
        for row, line in enumerate(text.lines(), start=1):
            if line is None:
                yield row, too_long(text.url, row), 0
            elif not line.isspace():
                yield row, _from_line(line, row, text.url, known), len(line)

    return gathered(items(), RecordChunk)


def read_json(text: TextFile, known: KnownNames, remarks: Remarks) -> Iterator[RawChunk]:
    """The records of one JSON text: a list of objects or of prompts, an object with one such list in it (COCO's
    `annotations`), an object of records by id, a single record, or JSON lines under another name.

    Raises:
        InputError: it is not valid JSON, or it has no rows of these kinds; the message says what was found.
    """
    scanner = _Scanner(text)
    start = scanner.peek()
    if not start:
        return
    if start == "[":
        values = scanner.elements()
    elif start == "{":
        outline = _outline(scanner, known)
        text.rewind()
        if outline is None:
            remarks.add(text.url, "read as JSON lines, a record per line")
            yield from read_jsonl(text, known)
            return
        scanner = _Scanner(text)
        values = _values(scanner, outline, known, remarks)
    else:
        raise InputError(f"{text.url}: a list of records is needed, but this begins with {start!r}")

    def items() -> Iterator[tuple[int, Record | BadRow, int]]:
        at = scanner.characters
        for row, value in enumerate(values, start=1):
            yield row, _from_value(value, row, text.url, known), max(1, scanner.characters - at)
            at = scanner.characters
        if start == "[" and (rest := scanner.peek()):
            raise InputError(f"{text.url}: after the end of the list comes {rest!r}")

    yield from gathered(items(), RecordChunk)


def _from_line(line: str, row: int, url: str, known: KnownNames) -> Record | BadRow:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    else:
        if type(record) is dict:
            return _unwrapped(record, row, url, known)
        return BadRow(url, row, None, f"each line must be a JSON object, not {shown(line.strip(), 40)}")
    return BadRow(url, row, None, f"not valid JSON: {problem}", None, shown(line.strip()))


def _from_value(value: Any, row: int, url: str, known: KnownNames) -> Record | BadRow:
    if type(value) is str:
        return {known.prompt_column or "prompt": value}
    if type(value) is dict:
        return _unwrapped(value, row, url, known)
    return BadRow(url, row, None, f"each element must be a JSON object or text, not {shown(value, 40)}")


def _unwrapped(record: Record, row: int, url: str, known: KnownNames) -> Record | BadRow:
    """The record of a batch of requests (`custom_id`, `body`) with the fields of its body as its own."""
    body = record.get("body")
    if type(body) is not dict or known.hold_prompt(record) or not known.hold_prompt(body):
        return record
    outer = {name: value for name, value in record.items() if name != "body"}
    twice = outer.keys() & body.keys()
    if twice:
        names = ", ".join(map(repr, sorted(twice)))
        return BadRow(url, row, None, f"{names} stands both beside and in 'body'; remove one of them")
    return outer | body


@dataclass
class _Outline:
    """What the outermost object of a file holds, as far as it decides where the rows are; bounded in memory."""

    kinds: dict[str, str] = field(default_factory=dict)  # of the first members
    prompts: list[str] = field(default_factory=list)  # the first lists that begin with a prompt
    records: list[str] = field(default_factory=list)  # the first lists that begin with an object
    first: Any = None  # value of the first member
    objects_only: bool = True
    is_record: bool = False


def _outline(scanner: _Scanner, known: KnownNames) -> _Outline | None:
    """Walk through the outermost object; None where something comes after it, as in JSON lines."""
    outline = _Outline()
    for n, name in enumerate(scanner.members()):
        if scanner.peek() == "[":
            first, count = None, 0
            for count, value in enumerate(scanner.elements(), start=1):
                first = value if count == 1 else first
            if _has_prompt(first, name, known) and len(outline.prompts) < _SHOWN_MEMBERS:
                outline.prompts.append(name)
            if type(first) is dict and len(outline.records) < _SHOWN_MEMBERS:
                outline.records.append(name)
            kind = f"list of {count:,}"
            outline.objects_only = False
        else:
            value = scanner.value()
            kind = "object" if type(value) is dict else "text" if type(value) is str else "value"
            outline.first = value if n == 0 else outline.first
            outline.objects_only &= type(value) is dict
            outline.is_record |= type(value) is str and known.meaning(name) == "prompt"
        if n <= _SHOWN_MEMBERS:
            outline.kinds[name] = kind
    return None if scanner.peek() else outline


def _values(scanner: _Scanner, outline: _Outline, known: KnownNames, remarks: Remarks) -> Iterator[Any]:
    """The records in an object, wherever they are."""
    url = scanner.text.url
    if outline.is_record:
        yield scanner.value()
        return
    chosen = outline.prompts or outline.records
    if len(chosen) == 1:
        remarks.add(url, f"the rows are those of the list {chosen[0]!r}")
        for name in scanner.members():
            if name == chosen[0]:
                yield from scanner.elements()
                return
            scanner.skip()
    if len(chosen) > 1:
        names = ", ".join(map(repr, chosen))
        raise InputError(
            f"{url}: several lists could be the rows: {names}; write the right one as a list of its own"
        )
    if outline.objects_only and type(outline.first) is dict and known.hold_prompt(outline.first):
        has_id = any(known.meaning(name) == "prompt_id" for name in outline.first)
        names = "" if has_id else ", their names the prompt ids"
        remarks.add(url, f"the rows are the members of the object{names}")
        for name in scanner.members():
            value = scanner.value()
            yield value if has_id else {"prompt_id": name} | value
        return
    members = [f"{k!r} ({v})" for k, v in outline.kinds.items()]
    if len(members) > _SHOWN_MEMBERS:
        members[_SHOWN_MEMBERS:] = ["..."]
    hint = "; pandas writes one with to_json(orient='records')" if known.hold_prompt(outline.kinds) else ""
    raise InputError(
        f"{url}: no list of records in this JSON object, which has {', '.join(members) or 'nothing'}; write a list of objects with a prompt "
        f"each{hint}"
    )


def _has_prompt(first: Any, name: str, known: KnownNames) -> bool:
    """Whether a list with this first element holds prompts: records with one, or prompts under the name of one."""
    if type(first) is dict:
        body = first.get("body")
        return known.hold_prompt(first) or (type(body) is dict and known.hold_prompt(body))
    return type(first) is str and known.meaning(name) == "prompt"


class _Scanner:
    """The values of a JSON text one by one, from a buffer that never holds much more than one of them."""

    def __init__(self, text: TextFile) -> None:
        self.text = text
        self._buffer = ""
        self._at = 0  # in the buffer
        self._before = 0  # characters of the text before the buffer
        self._ended = False
        self._decode = json.JSONDecoder().raw_decode

    @property
    def characters(self) -> int:
        """Characters consumed so far."""
        return self._before + self._at

    def peek(self) -> str:
        """The next character that is no blank, "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in " \t\n":
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value.

        Raises:
            InputError: it is not valid JSON, or longer than `MAX_VALUE_CHARS`.
        """
        self.peek()
        while True:
            try:
                value, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # Broken, or not all there yet.
                position = self._before + error.pos
                if not self._more():
                    raise self._broken(error.msg, position) from None
                continue
            except (ValueError, RecursionError) as error:
                raise self._broken(str(error), self.characters) from None
            # A number goes on behind the buffer's end, unless something else than a number ends it.
            if (
                not isinstance(value, str | dict | list)
                and self._buffer[end : end + 1] not in _ENDS
                and self._more()
            ):
                continue
            self._at = end
            return value

    def elements(self) -> Iterator[Any]:
        """The elements of the list that comes next."""
        for _ in self._items("[", "]"):
            yield self.value()

    def members(self) -> Iterator[str]:
        """The names in the object that comes next; after each one the caller takes the value."""
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._broken("a name in quotes is missing", self.characters)
            name = self.value()
            self._take(":")
            yield name

    def skip(self) -> None:
        """Pass over the next value, a list element by element."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        """Stop before each item between two brackets; the caller takes it."""
        self._take(opening)
        if self.peek() == closing:
            self._take(closing)
            return
        while True:
            yield
            if self._take(f",{closing}") == closing:
                return

    def _take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            what = " or ".join(map(repr, expected))
            raise self._broken(f"{what} is missing", self.characters)
        self._at += 1
        return found

    def _more(self) -> bool:
        """Read on, and forget what was consumed; False at the end of the text."""
        if self._ended:
            return False
        rest = self._buffer[self._at :]
        if len(rest) > MAX_VALUE_CHARS:
            raise InputError(
                f"{self.text.url}: the value at character {self.characters + 1:,} is broken or longer than "
                f"{MAX_VALUE_CHARS:,} characters; write JSON lines, a record per line"
            )
        block = self.text.read(max(BLOCK_CHARS, len(rest)))
        self._ended = not block
        self._before += self._at
        self._buffer, self._at = rest + block, 0
        return bool(block)

    def _broken(self, message: str, position: int) -> InputError:
        return InputError(f"{self.text.url}: not valid JSON: {message} at character {position + 1:,}")
