"""Prompt files as checked rows: every row of every file either becomes a row of the plan or a bad row with a reason.

In go input files and the few options that say how to read them; out come chunks of normalised rows and bad rows, in
input order, at bounded memory. Nothing here assigns ids, applies job defaults or knows about shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.prompt_files import (
    BadRow,
    RawChunk,
    has_surrogates,
    python_values,
    read_chunks,
    shown,
    to_json,
)
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.storage import InputFile

#: The names a column may have in a file, ours first.
COLUMN_NAMES = {
    "prompt": ("prompt", "text", "caption", "TEXT"),
    "prompt_id": ("prompt_id", "id", "custom_id"),
    "negative_prompt": ("negative_prompt",),
    "seed": ("seed",),
    "num_images": ("num_images", "n"),
    "width": ("width",),
    "height": ("height",),
    "num_inference_steps": ("num_inference_steps", "steps"),
    "guidance_scale": ("guidance_scale", "cfg_scale"),
}

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
MAX_EXTRA_BYTES = 2**20

#: Above this, a float no longer tells one integer from the next.
_EXACT_FLOAT = 2**53

#: `PLAN_ROW_SCHEMA` before ids and defaults: `prompt_id` and `num_images` may still be null.
PROMPT_ROW_SCHEMA = pa.schema(
    [f.with_nullable(True) if f.name in ("prompt_id", "num_images") else f for f in PLAN_ROW_SCHEMA]
)

BAD_ROW_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("column", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How prompt files are read.

    `prompt_column` names the column that holds the prompt where it has none of the usual names, or several.
    """

    prompt_column: str | None = None
    max_prompt_chars: int = 10_000


@dataclass(frozen=True)
class PromptChunk:
    """Some rows of file number `file_index`.

    `rows` has `PROMPT_ROW_SCHEMA`; `row_numbers` is int64 `[len(rows)]`, 1-based; `last_row` the number of the last
    row read, good or bad. `names` maps our column names to the file's.
    """

    file_index: int
    names: Mapping[str, str]
    rows: pa.RecordBatch
    row_numbers: np.ndarray
    bad: list[BadRow]
    last_row: int


def read_prompts(files: Sequence[InputFile], options: PromptOptions) -> Iterator[PromptChunk]:
    """Read and check all files in order. A file without rows yields no chunk.

    Raises:
        InputError: a file cannot be read, lacks a prompt column or has two columns of one meaning; or all files
            together have no row.
        StoreError: storage failed.
    """
    any_row = False
    for index, file in enumerate(files):
        columns = _Columns(file.url, options.prompt_column)
        for raw in read_chunks(file):
            columns.meet(raw)
            if raw.last_row:
                any_row = True
                yield _check(index, file.url, raw, columns, options)
    if not any_row:
        names = ", ".join(file.url for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise InputError(f"no prompts: no row in {names or 'no file'}")


class _Columns:
    """Which column of one file has which meaning."""

    def __init__(self, file: str, prompt_column: str | None) -> None:
        self.file = file
        self.names: dict[str, str] = {}  # our name -> the file's
        self._meanings = {name: ours for ours, names in COLUMN_NAMES.items() for name in names}
        if prompt_column is not None:
            for name in COLUMN_NAMES["prompt"]:
                del self._meanings[name]
            self._meanings[prompt_column] = "prompt"
        self._expected = [name for name, ours in self._meanings.items() if ours == "prompt"]

    def meet(self, chunk: RawChunk) -> None:
        """Take note of the chunk's columns; raises InputError where they are contradictory or hold no prompt."""
        for name in chunk.names:
            ours = self._meanings.get(name)
            if ours is None:
                continue
            known = self.names.setdefault(ours, name)
            if known != name:
                hint = f"--prompt-column {known}" if ours == "prompt" else "remove or rename one of them"
                raise InputError(
                    f"{self.file}: columns {known!r} and {name!r} both mean {ours!r}; say which one counts: {hint}"
                )
        if "prompt" not in self.names and (chunk.names or not chunk.bad):
            raise InputError(
                f"{self.file}: no prompt column (looked for {', '.join(self._expected)}); the file has "
                f"{', '.join(map(str, chunk.names)) or 'no columns'}. Name the right one with --prompt-column"
            )


class _Problems:
    """The first thing wrong with each row of a chunk."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[str, str]] = {}

    def add(self, rows: np.ndarray, column: str, reason: Callable[[int], str]) -> None:
        """Note a problem of the rows where bool `rows` `[n]` is set; `reason` is asked per row."""
        for i in np.flatnonzero(rows).tolist():
            if i not in self.found:
                self.found[i] = (column, reason(i))


def _check(index: int, file: str, raw: RawChunk, columns: _Columns, options: PromptOptions) -> PromptChunk:
    """The chunk with every column in its type and the rows that break a rule set aside."""
    n, names, problems = len(raw.rows), dict(columns.names), _Problems()
    values = {ours: raw.column(name) for ours, name in names.items() if name in raw.names}

    out: dict[str, pa.Array] = {field.name: pa.nulls(n, field.type) for field in PROMPT_ROW_SCHEMA}
    if "prompt_id" in values:
        out["prompt_id"] = _check_ids(
            values["prompt_id"], raw.missing(names["prompt_id"]), names["prompt_id"], problems, file
        )
    prompts = values.get("prompt", [None] * n)
    out["prompt"] = _check_text(prompts, names.get("prompt", "prompt"), problems, options, file, blank=False)
    if "negative_prompt" in values:
        out["negative_prompt"] = _check_text(
            values["negative_prompt"], names["negative_prompt"], problems, options, file, blank=True
        )
    for ours in (name for name in INTEGER_LIMITS if name in values):
        out[ours] = _check_integers(values[ours], ours, names[ours], problems)
    if "guidance_scale" in values:
        out["guidance_scale"] = _check_guidance(values["guidance_scale"], names["guidance_scale"], problems)
    out["extra"] = _check_extra(raw, columns, problems)
    out["source"] = pc.binary_join_element_wise(file, pc.cast(pa.array(raw.rows), pa.string()), ":")

    rows = pa.RecordBatch.from_arrays(
        [out[name] for name in PROMPT_ROW_SCHEMA.names], names=PROMPT_ROW_SCHEMA.names
    )
    numbers, bad = raw.rows, list(raw.bad)
    if problems.found:
        ids = python_values(values["prompt_id"]) if "prompt_id" in values else [None] * n
        prompts = python_values(prompts)
        bad += [
            BadRow(file, int(numbers[i]), column, reason, shown(ids[i], MAX_ID_CHARS), shown(prompts[i]))
            for i, (column, reason) in problems.found.items()
        ]
        good = np.ones(n, bool)
        good[list(problems.found)] = False
        rows, numbers = rows.filter(pa.array(good)), numbers[good]
    bad.sort(key=lambda b: b.row)
    return PromptChunk(index, names, rows.cast(PROMPT_ROW_SCHEMA), numbers, bad, raw.last_row)


def _check_ids(
    values: pa.Array | list[Any], missing: np.ndarray, column: str, problems: _Problems, file: str
) -> pa.Array:
    """Ids as text; null only where the row has no such column at all."""
    if isinstance(values, pa.Array) and pa.types.is_integer(values.type):
        values = pc.cast(values, pa.string())
    elif isinstance(values, list):
        values = [str(v) if type(v) is int else v for v in values]
    ids = _text(values, column, problems, file, "text or an integer")
    problems.add(_mask(pc.is_null(ids)) & ~missing, column, lambda i: "the id is empty")
    length = pc.utf8_length(ids)
    problems.add(_blank(ids), column, lambda i: "the id is blank")
    problems.add(
        _mask(pc.greater(length, MAX_ID_CHARS)),
        column,
        lambda i: f"the id has {length[i].as_py():,} characters; at most {MAX_ID_CHARS} are allowed",
    )
    control = _mask(pc.match_substring_regex(ids, r"[\x00-\x1f\x7f]"))
    problems.add(control, column, lambda i: "the id has a control character")
    return ids


def _check_text(
    values: pa.Array | list[Any],
    column: str,
    problems: _Problems,
    options: PromptOptions,
    file: str,
    *,
    blank: bool,
) -> pa.Array:
    """Prompts: text of bounded length without control characters; where `blank` is allowed, it means null."""
    text = _text(values, column, problems, file, "text")
    length = pc.utf8_length(text)
    if not blank:
        problems.add(_mask(pc.is_null(text)), column, lambda i: "the prompt is empty (null)")
        problems.add(_blank(text), column, lambda i: "the prompt is blank")
    problems.add(
        _mask(pc.greater(length, options.max_prompt_chars)),
        column,
        lambda i: f"{length[i].as_py():,} characters; at most {options.max_prompt_chars:,} are allowed",
    )
    control = _mask(pc.match_substring_regex(text, r"[\x00-\x08\x0b-\x1f]"))
    problems.add(control, column, lambda i: f"control character {_control_character(text[i].as_py())}")
    return pc.if_else(pa.array(_blank(text)), pa.scalar(None, pa.string()), text) if blank else text


def _blank(text: pa.Array) -> np.ndarray:
    """bool `[n]`: there is a value, but nothing to see in it."""
    return _mask(pc.or_(pc.equal(text, ""), pc.utf8_is_space(text)))


def _control_character(text: str) -> str:
    position, character = next((k, c) for k, c in enumerate(text) if c < " " and c not in "\n\t")
    return f"U+{ord(character):04X} at character {position + 1} (only line feed and tab are allowed)"


def _text(
    values: pa.Array | list[Any], column: str, problems: _Problems, file: str, expected: str
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


def _check_integers(values: pa.Array | list[Any], ours: str, column: str, problems: _Problems) -> pa.Array:
    """Integers within their limits, from integers, whole floats or their text; empty text is null."""
    low, high = INTEGER_LIMITS[ours]
    array = _numbers(values)
    target = PLAN_ROW_SCHEMA.field(ours).type
    kind = array.type
    if pa.types.is_integer(kind):
        wide = pc.cast(array, pa.uint64() if pa.types.is_unsigned_integer(kind) else pa.int64())
        top = high if pa.types.is_unsigned_integer(kind) else min(high, 2**63 - 1)
        wrong = _mask(
            pc.or_(pc.less(wide, pa.scalar(low, wide.type)), pc.greater(wide, pa.scalar(top, wide.type)))
        )
        parsed = wide
    elif pa.types.is_floating(kind):
        floats = pc.fill_null(pc.cast(array, pa.float64()), float(low)).to_numpy(zero_copy_only=False)
        top = min(high, _EXACT_FLOAT)
        with np.errstate(invalid="ignore"):
            wrong = ~((floats == np.floor(floats)) & (floats >= low) & (floats <= top))
        parsed = pa.array(np.where(wrong, low, floats).astype(np.uint64))
        parsed = pc.if_else(array.is_valid(), parsed, None)
    else:
        parsed, wrong = _integers_from_text(array, low, high)

    def reason(i: int) -> str:
        if array[i].as_py() is not None and pa.types.is_floating(kind) and array[i].as_py() > _EXACT_FLOAT:
            return f"{_quoted(array, i)} came as a float, which is not exact above 2**53; store the column as uint64"
        return f"must be an integer from {low} to {_limit(high)}, not {_quoted(array, i)}"

    problems.add(wrong, column, reason)
    if wrong.any():
        parsed = pc.if_else(pa.array(wrong), pa.scalar(None, parsed.type), parsed)
    return pc.cast(parsed, target)


def _integers_from_text(array: pa.Array, low: int, high: int) -> tuple[pa.Array, np.ndarray]:
    text = _trimmed(array)
    whole = _mask(pc.match_substring_regex(text, r"^\+?[0-9]{1,40}(\.0*)?$"))
    wrong = _mask(pc.is_valid(text)) & ~whole
    digits = pc.replace_substring_regex(text, r"^\+|\.0*$", "")
    digits = pc.if_else(pa.array(wrong), pa.scalar(None, pa.string()), digits)
    try:
        parsed = pc.cast(digits, pa.uint64())
    except pa.ArrowInvalid:  # some do not fit
        numbers = [None if d is None else int(d) for d in digits.to_pylist()]
        parsed = pa.array([None if v is None or v >= 2**64 else v for v in numbers], pa.uint64())
        wrong = wrong | np.array([v is not None and v >= 2**64 for v in numbers], bool)
    bounds = pa.scalar(low, pa.uint64()), pa.scalar(high, pa.uint64())
    return parsed, wrong | _mask(pc.or_(pc.less(parsed, bounds[0]), pc.greater(parsed, bounds[1])))


def _check_guidance(values: pa.Array | list[Any], column: str, problems: _Problems) -> pa.Array:
    """Finite floats within their limits, from numbers or their text; empty text is null."""
    array = _numbers(values)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        parsed = pc.cast(array, pa.float64(), safe=False)
        wrong = np.zeros(len(array), bool)
    else:
        text = _trimmed(array)
        number = _mask(pc.match_substring_regex(text, r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"))
        wrong = _mask(pc.is_valid(text)) & ~number
        numbers = [float(v) if ok else None for ok, v in zip(number, text.to_pylist(), strict=True)]
        parsed = pa.array(numbers, pa.float64())
    low, high = GUIDANCE_LIMITS
    # A NaN is not within any limits, so ask for what is good.
    within = pc.and_(pc.greater_equal(parsed, low), pc.less_equal(parsed, high))
    wrong = wrong | ~_mask(pc.fill_null(within, True))
    problems.add(
        wrong, column, lambda i: f"must be a number from {low:g} to {high:g}, not {_quoted(array, i)}"
    )
    return parsed


def _numbers(values: pa.Array | list[Any]) -> pa.Array:
    """The values as an integer, floating or string array; what is neither number nor text becomes its JSON."""
    if isinstance(values, pa.Array):
        kind = values.type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind):
            return values
        if pa.types.is_null(kind):
            return pa.nulls(len(values), pa.string())
        if pa.types.is_decimal(kind):
            return pc.cast(values, pa.string())
        values = python_values(values)
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


def _trimmed(array: pa.Array) -> pa.Array:
    """Text without surrounding blanks, null where nothing is left."""
    text = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _check_extra(raw: RawChunk, columns: _Columns, problems: _Problems) -> pa.Array:
    n = len(raw.rows)
    try:
        extra = raw.extra(columns.names.values())
    except (TypeError, ValueError, RecursionError) as error:
        others = ", ".join(str(name) for name in raw.names if name not in columns.names.values())
        raise InputError(
            f"{columns.file}: rows {raw.rows[0]} to {raw.rows[-1]}: a column to pass through has no JSON form "
            f"({error}); drop it from the file. Columns: {others}"
        ) from error
    if extra is None:
        return pa.nulls(n, pa.string())
    column = ", ".join(str(name) for name in raw.names if name not in columns.names.values())
    text = _text(extra, column, problems, columns.file, "text")
    size = pc.binary_length(text)
    problems.add(
        _mask(pc.greater(size, MAX_EXTRA_BYTES)),
        column,
        lambda i: f"{size[i].as_py():,} bytes to pass through; at most {MAX_EXTRA_BYTES:,} are allowed",
    )
    return text


def _mask(array: pa.Array) -> np.ndarray:
    """A boolean Arrow array as NumPy, null as False."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _quoted(array: pa.Array, i: int) -> str:
    value = array[i].as_py()
    return repr(value) if isinstance(value, str) else to_json(value)


def _limit(value: int) -> str:
    return "2**64 - 1" if value == 2**64 - 1 else str(value)
