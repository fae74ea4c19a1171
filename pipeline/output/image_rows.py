"""The rows of committed shards, in the order of commits: those that commits carry, and else those of row tables.

Carried rows wait in a temporary file, as columns, from when their commit is parsed until they are asked for: nothing here
grows with the job in memory, and no table is made for a single shard that carries its rows.
"""

from __future__ import annotations

import io
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import DamagedError
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, CarriedRow, Commit
from millijoule.workers.storage.protocol import Store

#: What the names of files that hold rows and no images end with: they are short, and read in one request instead of three.
_ROWS_ALONE = "rows.parquet"

#: Of a file in a bucket that holds images too, so much is asked for at a time: the rows of a row group are some KB among MB of images.
_ROWS_BUFFER_BYTES = 128 << 10

#: Stands for a commit that carries no rows.
NOT_CARRIED = -1

#: Rows that wait as tuples to become a table.
SPOOL_ROWS = 2048


class Spool:
    """Rows in the order in which they were added, in a temporary file once there are `most_held`."""

    def __init__(self, schema: pa.Schema, most_held: int) -> None:
        self._schema, self._most_held = schema, most_held
        self._held: list[tuple] = []
        self._file: IO[bytes] | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def extend(self, rows: Iterable[tuple]) -> None:
        """Append `rows`, whose values are in the order of the columns."""
        self._held += rows
        if len(self._held) >= self._most_held:
            if self._writer is None:
                self._file = tempfile.NamedTemporaryFile(prefix="millijoule-")  # noqa: SIM115
                options = pa.ipc.IpcWriteOptions(compression="zstd")
                self._writer = pa.ipc.new_stream(
                    pa.PythonFile(self._file, "w"), self._schema, options=options
                )
            self._writer.write_table(rows_as_table(self._schema, self._held))
            self._held = []

    def tables(self) -> Iterator[pa.Table]:
        """All rows, some thousand at a time. Nothing can be added any more."""
        if self._writer is not None and self._file is not None:
            self._writer.close()
            self._file.flush()
            with pa.OSFile(self._file.name) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    yield pa.Table.from_batches([batch])
        if self._held:
            yield rows_as_table(self._schema, self._held)


class RowSpool(Spool):
    """Rows that commits carry, `IMAGE_ROW_SCHEMA`."""

    def __init__(self) -> None:
        super().__init__(IMAGE_ROW_SCHEMA, SPOOL_ROWS)
        self._counts = array("i")

    def add(self, rows: Sequence[CarriedRow] | None) -> None:
        """Append the rows of the next commit, as it carries them; None: it carries none."""
        self._counts.append(NOT_CARRIED if rows is None else len(rows))
        self.extend(rows or ())

    def counts(self) -> np.ndarray:
        """How many rows each commit carries, int32 `[n]`; `NOT_CARRIED` where none. A copy."""
        return np.array(self._counts, np.int32)


def rows_as_table(schema: pa.Schema, rows: Iterable[tuple]) -> pa.Table:
    """`rows`, whose values are in the order of the columns, as a table of `schema`."""
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def rows_table(rows: Iterable[CarriedRow]) -> pa.Table:
    """Carried rows as a table, `IMAGE_ROW_SCHEMA`."""
    return rows_as_table(IMAGE_ROW_SCHEMA, rows)


def read_row_table(store: Store, commit: Commit, data: bytes | None = None) -> pa.Table:
    """The row table of a committed shard, `IMAGE_ROW_SCHEMA`; `data` is the file, where it was read.

    Raises:
        DamagedError: it is none; the message names the object.
    """
    try:
        return _read_row_table(store, commit, data)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamagedError(f"{commit.rows_path}: cannot be read as Parquet: {error}") from error


def _read_row_table(store: Store, commit: Commit, data: bytes | None) -> pa.Table:
    with _open_rows(store, commit.rows_path) if data is None else pa.BufferReader(data) as source:
        # one thread: tables are small, and several of them are read at the same time; looking up columns by name takes
        # as long as reading a short table, and so does a cast that changes nothing
        file = pq.ParquetFile(source)
        plain = file.metadata.num_columns == len(IMAGE_ROW_SCHEMA)
        rows = file.read(columns=None if plain else IMAGE_ROW_SCHEMA.names, use_threads=False)
    if not rows.schema.equals(IMAGE_ROW_SCHEMA):
        rows = rows.select(IMAGE_ROW_SCHEMA.names).cast(IMAGE_ROW_SCHEMA)
    return rows


def _open_rows(store: Store, key: str) -> pa.NativeFile | BinaryIO:
    """The file at `key`, opened so that its rows take few requests and few bytes."""
    if key.endswith(_ROWS_ALONE):
        return pa.BufferReader(store.get(key))
    source = store.open_input(key)
    if isinstance(source, io.BufferedReader):
        return io.BufferedReader(source.detach(), _ROWS_BUFFER_BYTES)
    return source


class RowReader:
    """The rows of tables in order, as many at a time as are asked for."""

    def __init__(self, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        self._tables = iter(tables)
        self._held = schema.empty_table()

    def take(self, n: int) -> pa.Table:
        """The next `n` rows; fewer at the end."""
        while self._held.num_rows < n and (table := next(self._tables, None)) is not None:
            self._held = pa.concat_tables([self._held, table])
        part, self._held = self._held.slice(0, n), self._held.slice(n)
        return part
