"""The values of known columns: checked, in the types of the plan, and the first thing wrong with each row.

In go columns as files have them, text, numbers or what pandas made of them; out come Arrow arrays of one type each. A
value that cannot be used becomes null and a problem of its row, never something like it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.planning.raw_chunks import Values, has_surrogates, python_values, shown
from millijoule.workers.errors import InputError
from millijoule.workers.loras.words import read_cell
from millijoule.workers.schemas import PLAN_ROW_SCHEMA

#: Smallest and largest allowed value of the columns of numbers.
LIMITS = {
    "seed": (0, 2**64 - 1),
    "num_images": (1, 10_000),
    "width": (8, 8192),
    "height": (8, 8192),
    "num_inference_steps": (1, 1000),
    "guidance_scale": (0, 100),
}

MAX_ID_CHARS = 512

#: Above this, a float no longer tells one integer from the next.
_EXACT_FLOAT = 2**53

#: What other programs write where no seed is given, and where the size is the model's own.
_NO_SEED = -1
_NO_SIZE = ("", "auto")

#: Control characters that a prompt must not have: all of C0 but line feed and tab.
_CONTROL = r"[\x00-\x08\x0b-\x1f]"

_WHOLE_NUMBER = re.compile(r"(\+?[0-9]{1,40}|-1)(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]*),([0-9]+)")
_SIZE = re.compile(r"\s*(?P<width>[0-9]{1,9})\s*[xX×*]\s*(?P<height>[0-9]{1,9})\s*", re.ASCII)


class Problems:
    """The first thing wrong with each row of a chunk."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, rows: np.ndarray, column: str, reason: Callable[[int], str]) -> None:
        """Note a problem of the rows where bool `rows` `[n]` is set; `reason` is asked per row."""
        for i in np.flatnonzero(rows).tolist():
            self.note(i, column, reason(i))

    def note(self, row: int, column: str, reason: str) -> None:
        """Note a problem of one row, counted within the chunk."""
        self.found.setdefault(row, (column, reason))


def check_ids(values: Values, column: str, problems: Problems, file: str, from_text: bool) -> pa.Array:
    """Ids as text, from text or integers, also those that pandas made floats of; null where a row has none.

    With `from_text` an empty field says that there is none.
    """
    if isinstance(values, pa.Array):
        if pa.types.is_integer(values.type):
            values = pc.cast(values, pa.string())
        elif pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
            values = values.to_pylist()
    if isinstance(values, list):
        values = [v if type(v) is str else _id_text(v) for v in values]
        if from_text:
            values = [None if v is not None and not v.strip() else v for v in values]
    ids = as_text(values, column, problems, file, "text or an integer")
    problems.add(_blank(ids), column, lambda i: "the id is blank")
    _limit_length(ids, MAX_ID_CHARS, column, problems, "the id has ")
    control = mask(pc.match_substring_regex(ids, r"[\x00-\x1f\x7f]"))
    problems.add(control, column, lambda i: "the id has a control character")
    return ids


def _limit_length(text: pa.Array, chars: int, column: str, problems: Problems, beginning: str = "") -> None:
    length = pc.utf8_length(text)
    problems.add(
        mask(pc.greater(length, chars)),
        column,
        lambda i: f"{beginning}{length[i].as_py():,} characters; at most {chars:,} are allowed",
    )


def _id_text(value: Any) -> Any:
    """A whole number as text, a NaN as null, everything else as it is."""
    if type(value) is int:
        return str(value)
    if isinstance(value, float | Decimal):
        if value != value:
            return None
        exact = isinstance(value, Decimal) or abs(value) <= _EXACT_FLOAT
        return str(int(value)) if exact and value == value // 1 else value
    return value


def check_text(
    values: Values, column: str, problems: Problems, file: str, max_chars: int, blank: bool
) -> pa.Array:
    """Prompts: text of bounded length without control characters; where `blank` is allowed, it means null.

    Whatever ends a line within a prompt becomes a line feed.
    """
    text = as_text(values, column, problems, file, "text")
    control = mask(pc.match_substring_regex(text, _CONTROL))
    if control.any():
        text = pc.replace_substring_regex(text, r"\r\n?", "\n")
        control = mask(pc.match_substring_regex(text, _CONTROL))
    if not blank:
        problems.add(mask(pc.is_null(text)), column, lambda i: "the prompt is empty (null)")
        problems.add(_blank(text), column, lambda i: "the prompt is blank")
    _limit_length(text, max_chars, column, problems)
    problems.add(control, column, lambda i: f"control character {_control_character(text[i].as_py())}")
    return pc.if_else(pa.array(_blank(text)), pa.scalar(None, pa.string()), text) if blank else text


def _blank(text: pa.Array) -> np.ndarray:
    """bool `[n]`: there is a value, but nothing to see in it."""
    return mask(pc.or_(pc.equal(text, ""), pc.utf8_is_space(text)))


def _control_character(text: str) -> str:
    position, character = next((k, c) for k, c in enumerate(text) if c < " " and c not in "\n\t")
    return f"U+{ord(character):04X} at character {position + 1} (only line feed and tab are allowed)"


def as_text(values: Values, column: str, problems: Problems, file: str, expected: str) -> pa.Array:
    """The values as an Arrow string array; a value that is none becomes null and a problem.

    Raises:
        InputError: the whole column has another type.
    """
    if isinstance(values, pa.Array):
        try:
            raw = pc.cast(values, pa.large_binary())
        except pa.ArrowNotImplementedError:  # neither text nor null
            hint = "; name the right one with --prompt-column" if expected == "text" else ""
            raise InputError(
                f"{file}: column {column!r} is {values.type}, but must be {expected}{hint}"
            ) from None
        try:
            return pc.cast(raw, pa.string())  # only this direction looks at the encoding
        except pa.ArrowInvalid:
            values = [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw.to_pylist()]
    try:
        return pa.array(values, pa.string())
    except (UnicodeEncodeError, pa.ArrowTypeError, pa.ArrowInvalid):
        pass
    wrong = np.array([v is not None and not isinstance(v, str) for v in values], bool)
    problems.add(wrong, column, lambda i: f"must be {expected}, not {shown(values[i], 40)}")
    encoding = np.array([isinstance(v, str) and has_surrogates(v) for v in values], bool)
    problems.add(encoding, column, lambda i: _encoding_problem(values[i]))
    return pa.array([None if w else v for w, v in zip(wrong | encoding, values, strict=True)], pa.string())


def _encoding_problem(text: str) -> str:
    position, character = next((k, c) for k, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    if "\udc80" <= character <= "\udcff":  # how `surrogateescape` writes a byte
        byte = ord(character) - 0xDC00
        return f"byte 0x{byte:02X} at character {position + 1} is not UTF-8; save the file as UTF-8"
    return f"half a surrogate pair, U+{ord(character):04X}, at character {position + 1}"


def check_numbers(
    values: Values, column: str, problems: Problems, ours: str, decimal_comma: bool
) -> pa.Array:
    """Numbers within the limits of column `ours`, from numbers or their text; empty text and NaN are null.

    Whole floats are integers, too. A seed of -1 is null.
    """
    low, high = LIMITS[ours]
    kind = PLAN_ROW_SCHEMA.field(ours).type
    integral = pa.types.is_integer(kind)
    if isinstance(values, pa.Array) and pa.types.is_integer(values.type):
        found = pc.min_max(values).as_py()
        if found["min"] is None or (low <= found["min"] and found["max"] <= high):
            return pc.cast(values, kind)
    wrong = (
        f"must be {'an integer' if integral else 'a number'} from {low} to "
        f"{'2**64 - 1' if high == 2**64 - 1 else high}"
    )

    def parse(value: Any) -> float | None:
        number: float | None = None
        if type(value) is int or isinstance(value, float):
            number = value
        else:
            text = _number_text(value, decimal_comma)
            if not text:
                return None
            if integral and _WHOLE_NUMBER.fullmatch(text):
                number = int(text.partition(".")[0])
            elif not integral and _NUMBER.fullmatch(text):
                number = float(text)
        if integral and isinstance(number, float):
            if _EXACT_FLOAT < number <= high:
                raise ValueError(
                    f"{_quoted(value)} came as a float, which is not exact above 2**53; store the column as uint64"
                )
            number = int(number) if number.is_integer() else None
        if ours == "seed" and number == _NO_SEED:
            return None
        if number is None or not low <= number <= high:
            raise ValueError(f"{wrong}, not {_quoted(value)}")
        return number

    return _parsed(values, column, problems, parse, kind)


def _parsed(
    values: Values, column: str, problems: Problems, parse: Callable[[Any], Any], kind: pa.DataType
) -> pa.Array:
    """`parse` of each value; one for which it raises ValueError becomes null and a problem.

    NaN is how pandas writes that a number is missing: null.
    """
    parsed: list[Any] = []
    met: dict[str, Any] = {}  # text is parsed once: a size or a number of steps stands in many rows
    for i, value in enumerate(python_values(values)):
        if type(value) is str and value in met:
            parsed.append(met[value])
            continue
        try:
            parsed.append(None if value is None or value != value else parse(value))
        except ValueError as error:
            problems.note(i, column, str(error))
            parsed.append(None)
        else:
            if type(value) is str:
                met[value] = parsed[-1]
    return pa.array(parsed, kind)


def _number_text(value: Any, decimal_comma: bool) -> str:
    """Text of a number without surrounding blanks, with a point for a decimal comma; JSON of what is none."""
    if isinstance(value, Decimal):
        return f"{value:f}"
    text = value.strip() if isinstance(value, str) else shown(value) or ""
    return _DECIMAL_COMMA.sub(r"\1.\2", text) if decimal_comma and _DECIMAL_COMMA.fullmatch(text) else text


def check_size(
    values: Values, column: str, width: pa.Array, height: pa.Array, problems: Problems
) -> tuple[pa.Array, pa.Array, str | None]:
    """Width and height of rows, where they have none of their own, from a size such as 1024x768.

    Args:
        values: sizes; empty and "auto" leave the size to the model.
        width, height: int32 `[n]`, null where a row does not give its own.

    Returns:
        Width, height, and the first value that is no size in pixels; such values count as none.
    """
    unread = None
    sides = {"width": width.to_pylist(), "height": height.to_pylist()}
    for i, value in enumerate(python_values(values)):
        if value is None or value != value:
            continue
        text = value if isinstance(value, str) else shown(value) or ""
        size = _SIZE.fullmatch(text)
        if size is None:
            if unread is None and text.strip().lower() not in _NO_SIZE:
                unread = shown(text, 40)
            continue
        for name, own in sides.items():
            side, (low, high) = int(size[name]), LIMITS[name]
            if not low <= side <= high:
                problems.note(i, column, f"{name} must be from {low} to {high}, not {_quoted(text)}")
            elif own[i] is None:
                own[i] = side
            elif own[i] != side:
                reason = f"{_quoted(text)} contradicts the row's {name} of {own[i]}; give one of them"
                problems.note(i, column, reason)
    return pa.array(sides["width"], pa.int32()), pa.array(sides["height"], pa.int32()), unread


def check_lora(values: Values, column: str, problems: Problems, declared: Mapping[str, float]) -> pa.Array:
    """The LoRAs that rows choose among those `declared`, as `loras.words.read_cell` writes them; null: all of them."""

    def parse(value: Any) -> str | None:
        if not isinstance(value, str):
            raise ValueError(f"must be text such as {next(iter(declared))}=0.5, not {shown(value, 40)}")
        return read_cell(value, declared)

    return _parsed(values, column, problems, parse, pa.string())


def mask(array: pa.Array) -> np.ndarray:
    """A boolean Arrow array as NumPy, null as False."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _quoted(value: Any) -> str:
    text = f"{value:f}" if isinstance(value, Decimal) else shown(value)
    return str(text) if type(value) in (int, float) else repr(text)
