"""Prompt files as checked rows: every row of every file either becomes a row of the plan or a bad row with a reason.

In go input files and the options that say how to read them; out come chunks of normalised rows and bad rows, in
input order, at bounded memory. Nothing here assigns ids, applies job defaults or knows about shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millijoule.pipeline.planning.column_names import FileColumns, KnownNames, Remarks
from millijoule.pipeline.planning.plan_options import PlanOptions
from millijoule.pipeline.planning.prompt_files import USUAL_DELIMITERS, read_chunks
from millijoule.pipeline.planning.prompt_values import (
    LIMITS,
    MAX_ID_CHARS,
    Problems,
    as_text,
    check_ids,
    check_lora,
    check_numbers,
    check_size,
    check_text,
    mask,
)
from millijoule.pipeline.planning.raw_chunks import BadRow, RawChunk, python_values, shown
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import PLAN_ROW_SCHEMA
from millijoule.workers.storage.inputs import InputFile
from millijoule.workers.storage.prompt_file_names import file_format

MAX_EXTRA_BYTES = 2**20

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


def read_prompts(
    files: Sequence[InputFile], options: PlanOptions, remarks: Remarks | None = None
) -> Iterator[PromptChunk]:
    """Read and check all files in order. A file without rows yields no chunk.

    `remarks` are those of an earlier pass over the same files, so that nothing is said twice.

    Raises:
        InputError: a file cannot be read, lacks a prompt column or has two columns of one meaning; or all files
            together have no row.
        StoreError: storage failed.
    """
    any_row = False
    remarks = remarks or Remarks()
    known = KnownNames(options.prompt_column, loras=bool(options.loras))
    if options.delimiter is not None and not any(file_format(f.url)[0] in USUAL_DELIMITERS for f in files):
        raise InputError(f"--delimiter {options.delimiter!r}: none of the prompt files is csv or tsv")
    for index, file in enumerate(files):
        columns = FileColumns(file.url, known, remarks)
        for raw in read_chunks(file, known, remarks, options.delimiter):
            columns.meet(raw)
            if raw.last_row:
                any_row = True
                yield _check(index, file.url, raw, columns, options, remarks)
    if not any_row:
        names = ", ".join(file.url for file in files[:5]) + (", ..." if len(files) > 5 else "")
        raise InputError(f"no prompts: no row in {names or 'no file'}")


def _check(
    index: int, file: str, raw: RawChunk, columns: FileColumns, options: PlanOptions, remarks: Remarks
) -> PromptChunk:
    """The chunk with every column in its type and the rows that break a rule set aside."""
    n, names, problems = len(raw.rows), {"prompt": "prompt"} | columns.names, Problems()
    values = {ours: raw.column(name) for ours, name in columns.names.items() if name in raw.columns}
    values.setdefault("prompt", [None] * n)
    out: dict[str, pa.Array] = {field.name: pa.nulls(n, field.type) for field in PROMPT_ROW_SCHEMA}

    def check(ours: str, function: Callable[..., pa.Array], *details: Any) -> None:
        if ours in values:
            out[ours] = function(values[ours], names[ours], problems, *details)

    check("prompt_id", check_ids, file, raw.from_text)
    check("prompt", check_text, file, options.max_prompt_chars, False)
    check("negative_prompt", check_text, file, options.max_prompt_chars, True)
    *integers, guidance = LIMITS
    for ours in integers:
        check(ours, check_numbers, ours, raw.decimal_comma)
    if "size" in values:
        column = names["size"]
        out["width"], out["height"], unread = check_size(
            values["size"], column, out["width"], out["height"], problems
        )
        if unread is not None:
            text = (
                f"column {column!r} holds {unread!r}, which is no size in pixels such as 1024x768: "
                "not used (passed through)"
            )
            remarks.add(file, text, key=f"unreadable size {column}", level=logging.WARNING)
    check(guidance, check_numbers, guidance, raw.decimal_comma)
    check("lora", check_lora, dict(options.loras))
    out["extra"] = _check_extra(raw, columns, problems)
    out["source"] = pc.binary_join_element_wise(file, pc.cast(pa.array(raw.rows), pa.string()), ":")

    rows = pa.RecordBatch.from_arrays(list(out.values()), schema=PROMPT_ROW_SCHEMA)
    numbers, bad = raw.rows, list(raw.bad)
    if problems.found:
        ids = python_values(values.get("prompt_id", [None] * n))
        prompts = python_values(values["prompt"])
        bad += [
            BadRow(file, int(numbers[i]), column, reason, shown(ids[i], MAX_ID_CHARS), shown(prompts[i]))
            for i, (column, reason) in problems.found.items()
        ]
        good = np.ones(n, bool)
        good[list(problems.found)] = False
        rows, numbers = rows.filter(pa.array(good)), numbers[good]
    return PromptChunk(index, names, rows, numbers, sorted(bad, key=lambda b: b.row), raw.last_row)


def _check_extra(raw: RawChunk, columns: FileColumns, problems: Problems) -> pa.Array:
    others = ", ".join(name for name in raw.columns if name not in columns.used)
    try:
        extra = raw.extra(columns.used)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{columns.file}: rows {raw.rows[0]} to {raw.rows[-1]}: a column to pass through has no JSON form "
            f"({error}); drop it from the file. Columns: {others}"
        ) from error
    text = as_text(extra, others, problems, columns.file, "text")
    size = pc.binary_length(text)
    problems.add(
        mask(pc.greater(size, MAX_EXTRA_BYTES)),
        others,
        lambda i: f"{size[i].as_py():,} bytes to pass through; at most {MAX_EXTRA_BYTES:,} are allowed",
    )
    return text
