"""Prompt files of every format as chunks of raw rows: columns as the file has them, and the rows that cannot be read.

In go files, out come chunks bounded in rows and characters, so memory stays the same whatever the file size. What a
column means matters here only to find the header's delimiter and the list of records in a JSON file; the rest is
`pipeline.planning.prompts`' to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.pipeline.planning import raw_chunks
from millijoule.pipeline.planning.column_names import KnownNames, Remarks
from millijoule.pipeline.planning.parquet_bounds import refuse_bombs, rows_at_a_time
from millijoule.pipeline.planning.prompt_csv import read_csv
from millijoule.pipeline.planning.prompt_json import read_json, read_jsonl
from millijoule.pipeline.planning.prompt_text import TextFile, too_long
from millijoule.pipeline.planning.raw_chunks import (
    BadRow,
    RawChunk,
    gathered,
    refuse_repeated_names,
    shown,
)
from millijoule.workers.errors import InputError
from millijoule.workers.storage.inputs import InputFile, open_input_file
from millijoule.workers.storage.prompt_file_names import file_format

#: What stands between the fields of a file with this ending.
USUAL_DELIMITERS = {"csv": ",", "tsv": "\t"}


def read_chunks(
    file: InputFile, known: KnownNames, remarks: Remarks, delimiter: str | None = None
) -> Iterator[RawChunk]:
    """All rows of one file, chunk by chunk in file order; nothing for a file without rows.

    `delimiter` stands between the fields of csv and tsv; None finds out.

    Raises:
        InputError: the file cannot be read any further; the message names the file and how far it went.
        StoreError: storage failed.
    """
    constants = dict(file.columns)
    kind, compressed = file_format(file.url)
    with open_input_file(file.url) as raw:
        if kind == "parquet":
            chunks = _read_parquet(file.url, raw)
        else:
            text = TextFile(file.url, raw, compressed)
            if kind == "txt":
                chunks = _read_txt(text, known)
            elif kind == "jsonl":
                chunks = read_jsonl(text, known)
            elif kind == "json":
                chunks = read_json(text, known, remarks)
            else:
                chunks = read_csv(text, USUAL_DELIMITERS[kind], delimiter, known, remarks)
        for chunk in chunks:
            if twice := sorted(constants.keys() & chunk.columns.keys()):
                names = ", ".join(map(repr, twice))
                raise InputError(
                    f"{file.url}: {names} is both a column and in the name of a folder; rename one"
                )
            if constants:
                chunk.add_columns(constants)
            yield chunk


def _read_txt(text: TextFile, known: KnownNames) -> Iterator[RawChunk]:
    def items() -> Iterator[tuple[int, str | BadRow, int]]:
        for row, line in enumerate(text.lines(), start=1):
            if line is None:
                yield row, too_long(text.url, row), 0
            elif line.startswith("--prompt "):  # A1111's script for prompts from a file
                reason = (
                    "this is a command line, not a prompt; make a csv with a column for each of its options"
                )
                yield row, BadRow(text.url, row, None, reason, None, shown(line.rstrip())), 0
            elif prompt := line.rstrip():
                yield row, prompt, len(line)

    def chunk(rows: np.ndarray, bad: list[BadRow], last: int, prompts: list[str]) -> RawChunk:
        return RawChunk(rows, bad, last, {known.prompt_column or "prompt": prompts})

    return gathered(items(), chunk)


def _read_parquet(url: str, raw: Any) -> Iterator[RawChunk]:
    row = 0
    try:
        file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        refuse_repeated_names(file.schema_arrow.names, url)
        refuse_bombs(file.metadata, url)
        if not file.metadata.num_rows:
            yield RawChunk(np.empty(0, np.int64), [], 0, {name: [] for name in file.schema_arrow.names})
        most = min(_parquet_chunk_rows(file.metadata), rows_at_a_time(raw, file))
        for batch in file.iter_batches(most, use_threads=False):
            rows = np.arange(row + 1, row + 1 + len(batch), dtype=np.int64)
            row += len(batch)
            columns = dict(zip(batch.schema.names, map(_plain, batch.columns), strict=True))
            yield RawChunk(rows, [], row, columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{url}: unreadable Parquet after row {row}: {error}") from error


def _parquet_chunk_rows(metadata: pq.FileMetaData) -> int:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    bytes_per_row = max((g.total_byte_size / g.num_rows for g in groups if g.num_rows), default=1)
    wanted = int(raw_chunks.CHUNK_CHARS / max(bytes_per_row, 1))
    return max(1, min(raw_chunks.CHUNK_ROWS, wanted))


def _plain(column: pa.Array) -> pa.Array:
    """The column without dictionary encoding or extension type."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column
