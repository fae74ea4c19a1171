"""The values of known columns: checked, in the types of the plan, and the first thing wrong with each row.

In go columns as files have them, text, numbers or what pandas made of them; out come Arrow arrays of one type each. A
value that cannot be used becomes null and a problem of its row, never something like it.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.planning.raw_chunks import has_surrogates, python_values, shown, to_json
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import PLAN_ROW_SCHEMA

#: Smallest and largest allowed value of the integer columns.
INTEGER_LIMITS = {
    "seed": (0, 2**64 - 1),
    "num_images": (1, 10_000),
    "width": (8, 8192),
    "height": (8, 8192),
    "num_inference_steps": (1, 1000),
}
GUIDANCE_LIMITS = (0.0, 100.0)

MAX_ID_CHARS = 512

#: Above this, a float no longer tells one integer from the next.
_EXACT_FLOAT = 2**53

#: What other programs write where no seed is given, and where the size is the model's own.
_NO_SEED = -1
_NO_SIZE = ("", "auto")

#: Control characters that a prompt must not have: all of C0 but line feed and tab.
_CONTROL = r"[\x00-\x08\x0b-\x1f]"

_SIZE = r"^\s*(?P<width>[0-9]{1,9})\s*[xX×*]\s*(?P<height>[0-9]{1,9})\s*$"


class Problems:
    """The first thing wrong with each row of a chunk."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, rows: np.ndarray, column: str, reason: Callable[[int], str]) -> None:
        """Note a problem of the rows where bool `rows` `[n]` is set; `reason` is asked per row."""
        for i in np.flatnonzero(rows).tolist():
            if i not in self.found:
                self.found[i] = (column, reason(i))


def check_ids(
    values: pa.Array | list[Any], column: str, problems: Problems, file: str, *, from_text: bool
) -> pa.Array:
    """Ids as text, from text or integers, also those that pandas made floats of; null where a row has none.

    Args:
        from_text: an empty field says that there is none.
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
    length = pc.utf8_length(ids)
    problems.add(_blank(ids), column, lambda i: "the id is blank")
    problems.add(
        mask(pc.greater(length, MAX_ID_CHARS)),
        column,
        lambda i: f"the id has {length[i].as_py():,} characters; at most {MAX_ID_CHARS} are allowed",
    )
    control = mask(pc.match_substring_regex(ids, r"[\x00-\x1f\x7f]"))
    problems.add(control, column, lambda i: "the id has a control character")
    return ids


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
    values: pa.Array | list[Any],
    column: str,
    problems: Problems,
    file: str,
    *,
    max_chars: int,
    blank: bool,
) -> pa.Array:
    """Prompts: text of bounded length without control characters; where `blank` is allowed, it means null.

    Whatever ends a line within a prompt becomes a line feed.
    """
    text = as_text(values, column, problems, file, "text")
    control = mask(pc.match_substring_regex(text, _CONTROL))
    if control.any():
        text = pc.replace_substring_regex(text, r"\r\n?", "\n")
        control = mask(pc.match_substring_regex(text, _CONTROL))
    length = pc.utf8_length(text)
    if not blank:
        problems.add(mask(pc.is_null(text)), column, lambda i: "the prompt is empty (null)")
        problems.add(_blank(text), column, lambda i: "the prompt is blank")
    problems.add(
        mask(pc.greater(length, max_chars)),
        column,
        lambda i: f"{length[i].as_py():,} characters; at most {max_chars:,} are allowed",
    )
    problems.add(control, column, lambda i: f"control character {_control_character(text[i].as_py())}")
    return pc.if_else(pa.array(_blank(text)), pa.scalar(None, pa.string()), text) if blank else text


def _blank(text: pa.Array) -> np.ndarray:
    """bool `[n]`: there is a value, but nothing to see in it."""
    return mask(pc.or_(pc.equal(text, ""), pc.utf8_is_space(text)))


def _control_character(text: str) -> str:
    position, character = next((k, c) for k, c in enumerate(text) if c < " " and c not in "\n\t")
    return f"U+{ord(character):04X} at character {position + 1} (only line feed and tab are allowed)"


def as_text(
    values: pa.Array | list[Any], column: str, problems: Problems, file: str, expected: str
) -> pa.Array:
    """The values as an Arrow string array; a value that is none becomes null and a problem.

    Raises:
        InputError: the whole column has another type.
    """
    if isinstance(values, pa.Array):
        kind = values.type
        if pa.types.is_null(kind):
            return pa.nulls(len(values), pa.string())
        if not _is_text(kind):
            hint = "; name the right one with --prompt-column" if expected == "text" else ""
            raise InputError(f"{file}: column {column!r} is {kind}, but must be {expected}{hint}")
        try:
            # From bytes, since only that direction looks at the encoding.
            return pc.cast(pc.cast(values, pa.large_binary()), pa.string())
        except pa.ArrowInvalid:
            raw = pc.cast(values, pa.large_binary()).to_pylist()
            values = [None if v is None else v.decode("utf-8", "surrogateescape") for v in raw]
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


def _is_text(kind: pa.DataType) -> bool:
    checks = (
        "string",
        "large_string",
        "string_view",
        "binary",
        "large_binary",
        "binary_view",
        "fixed_size_binary",
    )
    return any(getattr(pa.types, f"is_{check}")(kind) for check in checks)


def check_integers(
    values: pa.Array | list[Any], ours: str, column: str, problems: Problems, *, decimal_comma: bool = False
) -> pa.Array:
    """Integers within their limits, from integers, whole floats or their text; empty text and NaN are null.

    A seed of -1 is null, too.
    """
    low, high = INTEGER_LIMITS[ours]
    array = _numbers(values)
    none = _NO_SEED if ours == "seed" else None
    target = PLAN_ROW_SCHEMA.field(ours).type
    kind = array.type
    if pa.types.is_integer(kind):
        wide = pc.cast(array, pa.uint64() if pa.types.is_unsigned_integer(kind) else pa.int64())
        if none is not None and pa.types.is_signed_integer(kind):
            wide = _without(wide, none)
        top = high if pa.types.is_unsigned_integer(kind) else min(high, 2**63 - 1)
        wrong = mask(
            pc.or_(pc.less(wide, pa.scalar(low, wide.type)), pc.greater(wide, pa.scalar(top, wide.type)))
        )
        parsed = wide
    elif pa.types.is_floating(kind):
        wide = pc.cast(array, pa.float64())
        wide = wide if none is None else _without(wide, float(none))
        floats = pc.fill_null(wide, float(low)).to_numpy(zero_copy_only=False)
        top = min(high, _EXACT_FLOAT)
        with np.errstate(invalid="ignore"):
            wrong = ~((floats == np.floor(floats)) & (floats >= low) & (floats <= top))
        parsed = pa.array(np.where(wrong, low, floats).astype(np.uint64))
        parsed = pc.if_else(wide.is_valid(), parsed, None)
    else:
        parsed, wrong = _integers_from_text(_number_text(array, decimal_comma), low, high, none)

    def reason(i: int) -> str:
        if array[i].as_py() is not None and pa.types.is_floating(kind) and array[i].as_py() > _EXACT_FLOAT:
            return f"{_quoted(array, i)} came as a float, which is not exact above 2**53; store the column as uint64"
        return f"must be an integer from {low} to {_limit(high)}, not {_quoted(array, i)}"

    problems.add(wrong, column, reason)
    if wrong.any():
        parsed = pc.if_else(pa.array(wrong), pa.scalar(None, parsed.type), parsed)
    return pc.cast(parsed, target)


def _without(array: pa.Array, value: float) -> pa.Array:
    """The array with null in place of `value`."""
    found = pc.equal(array, pa.scalar(value, array.type))
    return pc.if_else(found, pa.scalar(None, array.type), array) if pc.any(found).as_py() else array


def _integers_from_text(text: pa.Array, low: int, high: int, none: int | None) -> tuple[pa.Array, np.ndarray]:
    """The integers, and which rows hold none; text of `none` is null."""
    if none is not None:
        found = pc.match_substring_regex(text, rf"^{none}(\.0*)?$")
        text = pc.if_else(found, pa.scalar(None, pa.string()), text)
    whole = mask(pc.match_substring_regex(text, r"^\+?[0-9]{1,40}(\.0*)?$"))
    wrong = mask(pc.is_valid(text)) & ~whole
    digits = pc.replace_substring_regex(text, r"^\+|\.0*$", "")
    digits = pc.if_else(pa.array(wrong), pa.scalar(None, pa.string()), digits)
    try:
        parsed = pc.cast(digits, pa.uint64())
    except pa.ArrowInvalid:  # some do not fit
        numbers = [None if d is None else int(d) for d in digits.to_pylist()]
        parsed = pa.array([None if v is None or v >= 2**64 else v for v in numbers], pa.uint64())
        wrong = wrong | np.array([v is not None and v >= 2**64 for v in numbers], bool)
    bounds = pa.scalar(low, pa.uint64()), pa.scalar(high, pa.uint64())
    return parsed, wrong | mask(pc.or_(pc.less(parsed, bounds[0]), pc.greater(parsed, bounds[1])))


def check_guidance(
    values: pa.Array | list[Any], column: str, problems: Problems, *, decimal_comma: bool = False
) -> pa.Array:
    """Finite floats within their limits, from numbers or their text; empty text and NaN are null."""
    array = _numbers(values)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        parsed = pc.cast(array, pa.float64(), safe=False)
        wrong = np.zeros(len(array), bool)
    else:
        text = _number_text(array, decimal_comma)
        number = mask(pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"))
        wrong = mask(pc.is_valid(text)) & ~number
        numbers = [float(v) if ok else None for ok, v in zip(number, text.to_pylist(), strict=True)]
        parsed = pa.array(numbers, pa.float64())
    low, high = GUIDANCE_LIMITS
    # A NaN is not within any limits, so ask for what is good.
    within = pc.and_(pc.greater_equal(parsed, low), pc.less_equal(parsed, high))
    wrong = wrong | ~mask(pc.fill_null(within, True))
    problems.add(
        wrong, column, lambda i: f"must be a number from {low:g} to {high:g}, not {_quoted(array, i)}"
    )
    return parsed


def _numbers(values: pa.Array | list[Any]) -> pa.Array:
    """The values as an integer, floating or string array; what is neither number nor text becomes its JSON.

    NaN is how pandas writes that a number is missing: null.
    """
    if isinstance(values, pa.Array):
        kind = values.type
        if pa.types.is_floating(kind):
            nan = pc.is_nan(values)
            return pc.if_else(nan, pa.scalar(None, kind), values) if pc.any(nan).as_py() else values
        if pa.types.is_integer(kind) or (pa.types.is_string(kind) and _is_utf8(values)):
            return values
        if pa.types.is_null(kind):
            return pa.nulls(len(values), pa.string())
        if pa.types.is_decimal(kind):
            return pc.cast(values, pa.string())
        values = python_values(values)
    values = [None if v != v else v for v in values]
    kinds = {type(v) for v in values} - {type(None)}
    if kinds == {int}:
        try:
            return pa.array(values, pa.int64())
        except OverflowError:
            pass
    elif kinds == {float}:
        return pa.array(values, pa.float64())
    elif kinds == {str}:
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError:
            pass
    return pa.array([None if v is None else shown(v) for v in values], pa.string())


def _is_utf8(text: pa.Array) -> bool:
    try:
        text.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _number_text(array: pa.Array, decimal_comma: bool) -> pa.Array:
    """Text of numbers without surrounding blanks, null where nothing is left, with a point for a decimal comma."""
    text = pc.utf8_trim_whitespace(array)
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    return pc.replace_substring_regex(text, r"^([+-]?[0-9]*),([0-9]+)$", r"\1.\2") if decimal_comma else text


def check_size(
    values: pa.Array | list[Any],
    column: str,
    width: pa.Array,
    height: pa.Array,
    problems: Problems,
    unreadable: Callable[[str], None],
) -> tuple[pa.Array, pa.Array]:
    """Width and height of rows, where they have none of their own, from a size such as 1024x768.

    Args:
        values: sizes; empty and "auto" leave the size to the model.
        width, height: int32 `[n]`, null where a row does not give its own.
        unreadable: takes the first value that is no size in pixels; such values count as none.
    """
    text = _numbers(values)
    text = text if pa.types.is_string(text.type) else pc.cast(text, pa.string())
    parts = pc.extract_regex(text, _SIZE)
    other = mask(pc.is_valid(text)) & ~mask(pc.is_valid(parts))
    for i in np.flatnonzero(other).tolist():
        if text[i].as_py().strip().lower() not in _NO_SIZE:
            unreadable(shown(text[i].as_py(), 40) or "")
            break
    return (
        _side(parts, "width", width, text, column, problems),
        _side(parts, "height", height, text, column, problems),
    )


def _side(
    parts: pa.Array, name: str, own: pa.Array, text: pa.Array, column: str, problems: Problems
) -> pa.Array:
    """A row's own width or height, else the size's; int32 `[n]`."""
    low, high = INTEGER_LIMITS[name]
    part = pc.cast(pc.struct_field(parts, name), pa.int32())
    outside = mask(pc.or_(pc.less(part, low), pc.greater(part, high)))
    problems.add(outside, column, lambda i: f"{name} must be from {low} to {high}, not {_quoted(text, i)}")
    differs = mask(pc.not_equal(part, own))
    problems.add(
        differs,
        column,
        lambda i: f"{_quoted(text, i)} contradicts the row's {name} of {own[i]}; give one of them",
    )
    return pc.coalesce(own, pc.if_else(pa.array(outside), pa.scalar(None, pa.int32()), part))


def mask(array: pa.Array) -> np.ndarray:
    """A boolean Arrow array as NumPy, null as False."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _quoted(array: pa.Array, i: int) -> str:
    value = array[i].as_py()
    return repr(value) if isinstance(value, str) else to_json(value)


def _limit(value: int) -> str:
    return "2**64 - 1" if value == 2**64 - 1 else str(value)
