"""Write the images and rows of one shard into local files, ready to be uploaded.

A writer lives for one attempt: rows and encoded images go in one by one, files come out, each with its SHA-256 and
the key it belongs under. Images are streamed to disk; only row metadata is held. Three formats:

* `parquet`: one file of `IMAGE_ROW_SCHEMA` columns plus `image` (binary); row groups small enough to stream.
* `webdataset`: a tar with `<name>.png`, `.txt` (the prompt) and `.json` (the row) per image, an index of where each
  member's bytes are (so that one image is one range request), and the rows as Parquet.
* `files`: a folder with one `.png` per image and the rows as Parquet.

Nothing here knows about storage, commits or shards beyond the key prefix it is given. The same rows and images give
the same bytes, except that `path` columns name the attempt.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import InputError
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, DataFile, ImageRow

FORMATS = ("parquet", "webdataset", "files")

#: For fewer rows a decompressor and dictionaries take longer to set up than the rows to read: the end of a job reads the
#: row table of every shard.
SHORT_TABLE_ROWS = 16

#: Encoded image bytes per row group: what a reader must hold to stream, and what a writer holds to write.
ROW_GROUP_BYTES = 16 << 20
#: Rows per row group, whatever their size: DuckDB works on row groups in parallel and likes about this many.
ROW_GROUP_ROWS = 65_536
#: Longest escaped prompt id in a file name. With index and suffix it stays under the 255 bytes of common systems.
MAX_NAME_BYTES = 120

#: `IMAGE_ROW_SCHEMA` and the encoded image; null where the row is quarantined.
PARQUET_SCHEMA = IMAGE_ROW_SCHEMA.append(pa.field("image", pa.binary()))

_TAR_BLOCK = 512
_TAR_RECORD = 10_240
_KEPT_CHARACTERS = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardFile:
    """A finished local file. `key` is where it belongs, relative to the output folder."""

    path: Path
    key: str
    size_bytes: int
    sha256: str
    rows: int

    def as_data_file(self) -> DataFile:
        """This file as a commit lists it."""
        return DataFile(self.key, self.size_bytes, self.sha256, self.rows)


@dataclass(frozen=True)
class ShardFiles:
    """What a writer made. `rows_key` is the Parquet file that describes every row, quarantined ones included."""

    files: tuple[ShardFile, ...]
    rows: tuple[ImageRow, ...]
    rows_key: str


class ShardWriter(Protocol):
    """Collects one shard's rows, in the order they are added."""

    def add(self, row: ImageRow, encoded: bytes | None) -> ImageRow:
        """Add one row and, unless it is quarantined, its encoded image.

        Returns:
            The row with `path`, `sha256` and `size_bytes` filled.

        Raises:
            ValueError: the image is missing for an "ok" row or given for another, or the row was added before.
            OSError: the scratch disk failed or is full.
        """
        ...

    def finish(self) -> ShardFiles:
        """Close all files and describe them."""
        ...


def open_writer(
    format: str, directory: Path, data_prefix: str, *, row_group_bytes: int = ROW_GROUP_BYTES
) -> ShardWriter:
    """A writer of `format` that keeps its files under `directory` (local scratch, the caller removes it).

    Args:
        format: one of `FORMATS`.
        directory: an existing folder; files lie at `directory / key`.
        data_prefix: what every key starts with, unique to the attempt, such as "data/000012-<attempt>".
        row_group_bytes: image bytes per Parquet row group.

    Raises:
        InputError: no such format.
    """
    (directory / data_prefix).parent.mkdir(parents=True, exist_ok=True)
    match format:
        case "parquet":
            return ParquetShardWriter(directory, data_prefix, row_group_bytes)
        case "webdataset":
            return WebdatasetShardWriter(directory, data_prefix)
        case "files":
            return FilesShardWriter(directory, data_prefix)
    raise InputError(f"output format {format!r} is not known: use one of {', '.join(FORMATS)}")


def image_name(prompt_id: str, image_index: int) -> str:
    """A file name without suffix for one image: safe in any folder, tar or URL, and different for different images.

    Everything outside `[A-Za-z0-9_-]` becomes `%XX` per UTF-8 byte; an empty id becomes `%`; what is then longer
    than `MAX_NAME_BYTES` is cut and ends in `%-` and 128 bits of the id's SHA-256. Neither `%` nor `%-` can come
    from an escaped character, so no two ids share a name. A file system that ignores letter case
    needs ids that differ in more than case.
    """
    if _KEPT_CHARACTERS.fullmatch(prompt_id):
        escaped = prompt_id
    else:
        escaped = "".join(
            c
            if _KEPT_CHARACTERS.fullmatch(c)
            else "".join(f"%{byte:02X}" for byte in c.encode("utf-8", "surrogatepass"))
            for c in prompt_id
        )
    if len(escaped) > MAX_NAME_BYTES:
        digest = hashlib.sha256(prompt_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        escaped = f"{escaped[: MAX_NAME_BYTES - 2 - len(digest)]}%-{digest}"
    return f"{escaped or '%'}_{image_index}"


class ParquetShardWriter:
    """One Parquet file with rows and images."""

    def __init__(self, directory: Path, data_prefix: str, row_group_bytes: int = ROW_GROUP_BYTES) -> None:
        self._key = f"{data_prefix}.parquet"
        self._file = _RowsFile(directory / self._key, self._key, PARQUET_SCHEMA, row_group_bytes)
        self._names = _Names()

    def add(self, row: ImageRow, encoded: bytes | None) -> ImageRow:
        self._names.take(row)
        row = _describe(row, encoded, self._key)
        self._file.add(row, encoded)
        return row

    def finish(self) -> ShardFiles:
        file = self._file.finish()
        return ShardFiles((file,), tuple(self._file.rows), file.key)


class FilesShardWriter:
    """One folder of `.png` files and `rows.parquet`."""

    def __init__(self, directory: Path, data_prefix: str) -> None:
        self._directory = directory
        self._prefix = data_prefix
        (directory / data_prefix).mkdir()
        rows_key = f"{data_prefix}/rows.parquet"
        self._rows = _RowsFile(directory / rows_key, rows_key, IMAGE_ROW_SCHEMA, ROW_GROUP_BYTES)
        self._names = _Names()

    def add(self, row: ImageRow, encoded: bytes | None) -> ImageRow:
        key = f"{self._prefix}/{self._names.take(row)}.png"
        row = _describe(row, encoded, key)
        if encoded is not None:
            (self._directory / key).write_bytes(encoded)
        self._rows.add(row, None)
        return row

    def finish(self) -> ShardFiles:
        rows_file = self._rows.finish()
        images = (
            ShardFile(self._directory / row.path, row.path, row.size_bytes, row.sha256, 1)
            for row in self._rows.rows
            if row.path is not None and row.size_bytes is not None and row.sha256 is not None
        )
        return ShardFiles((*images, rows_file), tuple(self._rows.rows), rows_file.key)


class WebdatasetShardWriter:
    """A tar, its `.index.json` (member name to [offset, size] in bytes) and `.rows.parquet`.

    Members of one image are adjacent and share the name up to the first dot, as webdataset wants. Headers are USTAR
    with fixed time and owner; names too long for that get a pax header, which every reader understands.
    """

    def __init__(self, directory: Path, data_prefix: str) -> None:
        self._key = f"{data_prefix}.tar"
        self._index_key = f"{data_prefix}.index.json"
        rows_key = f"{data_prefix}.rows.parquet"
        self._directory = directory
        self._rows = _RowsFile(directory / rows_key, rows_key, IMAGE_ROW_SCHEMA, ROW_GROUP_BYTES)
        self._names = _Names()
        self._tar = (directory / self._key).open("xb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._index: dict[str, tuple[int, int]] = {}

    def add(self, row: ImageRow, encoded: bytes | None) -> ImageRow:
        name = self._names.take(row)
        row = _describe(row, encoded, f"{self._key}#{name}.png")
        if encoded is not None:
            record = row.as_record()
            del record["path"]  # the only field that names the attempt
            self._add_member(f"{name}.png", encoded)
            self._add_member(f"{name}.txt", row.request.prompt.encode("utf-8", "replace"))
            self._add_member(f"{name}.json", json.dumps(record, separators=(",", ":")).encode())
        self._rows.add(row, None)
        return row

    def finish(self) -> ShardFiles:
        self._write(bytes(2 * _TAR_BLOCK))
        self._write(bytes(-self._offset % _TAR_RECORD))
        self._tar.close()
        rows_file = self._rows.finish()
        index = json.dumps(self._index, separators=(",", ":")).encode()
        (self._directory / self._index_key).write_bytes(index)
        images = len(self._index) // 3
        files = (
            ShardFile(self._directory / self._key, self._key, self._offset, self._sha256.hexdigest(), images),
            ShardFile(
                self._directory / self._index_key,
                self._index_key,
                len(index),
                hashlib.sha256(index).hexdigest(),
                images,
            ),
            rows_file,
        )
        return ShardFiles(files, tuple(self._rows.rows), rows_file.key)

    def _add_member(self, name: str, data: bytes) -> None:
        self._write(_tar_header(name, len(data)))
        self._index[name] = (self._offset, len(data))
        self._write(data + bytes(-len(data) % _TAR_BLOCK))

    def _write(self, data: bytes) -> None:
        self._tar.write(data)
        self._sha256.update(data)
        self._offset += len(data)


class _Names:
    """Gives each row its name and refuses a second row of the same name."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def take(self, row: ImageRow) -> str:
        name = image_name(row.request.prompt_id, row.request.image_index)
        if name in self._taken:
            raise ValueError(
                f"prompt {row.request.prompt_id!r}, image {row.request.image_index}: added twice to one shard"
            )
        self._taken.add(name)
        return name


class _RowsFile:
    """A Parquet file of image rows, with or without the images, written one row group at a time."""

    def __init__(self, path: Path, key: str, schema: pa.Schema, row_group_bytes: int) -> None:
        self.path = path
        self.key = key
        self.rows: list[ImageRow] = []
        self._schema = schema
        self._row_group_bytes = row_group_bytes
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._writer: pq.ParquetWriter | None = None  # once it is known how many rows there are

    def add(self, row: ImageRow, encoded: bytes | None) -> None:
        record = row.as_record()
        if encoded is not None:
            record["image"] = encoded
            self._pending_bytes += len(encoded)
        self.rows.append(row)
        self._pending.append(record)
        if self._pending_bytes >= self._row_group_bytes or len(self._pending) >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> ShardFile:
        self._flush(is_all=self._writer is None)
        assert self._writer is not None
        self._writer.close()
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()  # the pages were just written: no disk read
        return ShardFile(self.path, self.key, self.path.stat().st_size, digest, len(self.rows))

    def _flush(self, *, is_all: bool = False) -> None:
        if self._writer is None:
            options = row_table_options(self._schema, len(self._pending) if is_all else ROW_GROUP_ROWS)
            self._writer = pq.ParquetWriter(self.path, self._schema, **options)
        if self._pending:
            self._writer.write_table(pa.Table.from_pylist(self._pending, schema=self._schema))
        self._pending.clear()
        self._pending_bytes = 0


def row_table_options(schema: pa.Schema, rows: int) -> dict[str, Any]:
    """How a table of image rows is encoded: what `ParquetWriter` takes."""
    columns = list(_leaf_columns(schema))
    described = [c for c in columns if c != "image"]
    is_short = rows < SHORT_TABLE_ROWS
    # image bytes are compressed already, and statistics or dictionaries of them would be copies
    return {
        "compression": {c: "NONE" if c == "image" or is_short else "ZSTD" for c in columns},
        "use_dictionary": []
        if is_short
        else [c for c in described if c not in ("prompt_id", "seed", "sha256")],
        "write_statistics": described,
    }


def _describe(row: ImageRow, encoded: bytes | None, path: str) -> ImageRow:
    """`row` with what is known once its image is encoded."""
    if (encoded is not None) != (row.status == "ok"):
        what = "no image was given" if encoded is None else "an image was given"
        raise ValueError(f"prompt {row.request.prompt_id!r}: {what} for a row with status {row.status!r}")
    if encoded is None:
        return row
    return replace(row, path=path, sha256=hashlib.sha256(encoded).hexdigest(), size_bytes=len(encoded))


def _leaf_columns(schema: pa.Schema) -> Iterator[str]:
    """Column paths as Parquet spells them."""
    for field in schema:
        yield f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


def _tar_header(name: str, size: int) -> bytes:
    """Header of a regular file, mode 0644, owner and time 0 (POSIX.1-1988 ustar; pax where `name` is too long).

    Written here because `tarfile` spends 20 us on each header, as much as half an image.
    """
    if len(name) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")
    header = (
        name.encode("ascii").ljust(100, b"\x00")
        + b"0000644\x000000000\x000000000\x00"  # mode, uid, gid
        + b"%011o\x0000000000000\x00" % size  # size, mtime
        + b"        0"  # checksum (blank while it is summed), type
        + bytes(100)
        + b"ustar\x0000"
    ).ljust(_TAR_BLOCK, b"\x00")
    return header[:148] + b"%06o\x00 " % sum(header) + header[156:]
