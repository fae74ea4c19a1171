"""How many rows of a stranger's Parquet file may be unpacked at a time, whatever its few bytes stand for.

A page of a hundred bytes can stand for a gigabyte, and a dictionary of one long text for as many copies of it as there are rows. So the
dictionaries are looked at before rows are read, and what unpacks to far more than a table of prompts ever does is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millijoule.workers.errors import InputError

#: A column of a row group may unpack to this much whatever its size, and to so many times its size beyond that.
FREE_BYTES = 2**30
MOST_TIMES = 200
#: Values of lists in a row group: runs of equal ones take no room in the file.
MOST_LIST_VALUES = 2**26
#: Rows are read so few at a time that the longest texts of all dictionaries, in each of them, are no more than this.
DICTIONARY_BYTES = 2**26


def refuse_bombs(metadata: pq.FileMetaData, url: str) -> None:
    """Raise InputError where a column says that it unpacks to far more than it takes."""
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for chunk in map(group.column, range(group.num_columns)):
            unpacked, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            if unpacked > FREE_BYTES and unpacked > MOST_TIMES * packed:
                raise InputError(
                    f"{url}: column {chunk.path_in_schema!r} unpacks from {packed:,} to {unpacked:,} bytes: that is no "
                    "table of prompts"
                )
            if chunk.num_values > MOST_LIST_VALUES and chunk.num_values > group.num_rows:
                raise InputError(
                    f"{url}: column {chunk.path_in_schema!r} has lists of {chunk.num_values:,} values in "
                    f"{group.num_rows:,} rows: that is no table of prompts"
                )


def rows_at_a_time(raw: Any, file: pq.ParquetFile) -> int:
    """The most rows of `file` that fit `DICTIONARY_BYTES` if each had the longest text of every dictionary."""
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY"]
    fixed = sum(c.length for c in columns if c.physical_type == "FIXED_LEN_BYTE_ARRAY")
    longest = fixed
    if texts:
        probe = pq.ParquetFile(
            raw, metadata=file.metadata, read_dictionary=texts, pre_buffer=False, buffer_size=2**20
        )
        for group in range(file.metadata.num_row_groups):
            batches = probe.iter_batches(1, row_groups=[group], columns=texts, use_threads=False)
            first = next(batches, None)
            if first is not None:
                longest = max(longest, fixed + sum(map(_longest, first.columns)))
    return max(1, DICTIONARY_BYTES // max(longest, 1))


def _longest(column: pa.Array) -> int:
    """Bytes of the longest text in any dictionary of `column`."""
    lengths = (pc.max(pc.binary_length(d)).as_py() or 0 for d in _dictionaries(column) if len(d))
    return sum(lengths)


def _dictionaries(array: pa.Array) -> Iterator[pa.Array]:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        kind = array.type.value_type
        if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
            yield array.dictionary
    elif pa.types.is_struct(array.type):
        for i in range(array.type.num_fields):
            yield from _dictionaries(array.field(i))
    elif pa.types.is_map(array.type):
        yield from _dictionaries(array.keys)
        yield from _dictionaries(array.items)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _dictionaries(array.values)
