"""Write the images and rows of one shard into local files, ready to be uploaded.

A writer lives for one attempt: rows and encoded images go in one by one, files come out. Images are streamed to disk;
only row metadata is held. Three formats:

* `parquet`: one file of `IMAGE_ROW_SCHEMA` columns plus `image` (binary); row groups small enough to stream.
* `webdataset`: a tar with `<name>.png` (or .jpg, .webp), `.txt` (the prompt) and `.json` (the row) per image, an index of where each
  member's bytes are (so that one image is one range request), and the rows as Parquet.
* `files`: a folder with one file per image and the rows as Parquet.

The same rows and images give the same bytes, except that `path` columns name the attempt.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millijoule.workers.errors import InputError
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.schemas import IMAGE_ROW_SCHEMA, DataFile, ImageRequest, ImageRow, row_columns

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

#: `IMAGE_ROW_SCHEMA` and the encoded image; null where the row's status is not "ok".
PARQUET_SCHEMA = IMAGE_ROW_SCHEMA.append(pa.field("image", pa.binary()))

_TAR_BLOCK = 512
_TAR_RECORD = 10_240
_KEPT_CHARACTERS = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardFiles:
    """What a writer made. Each file lies at its key below the writer's folder.

    `rows_key` is the Parquet file that describes every row, those without an image included.
    """

    files: tuple[DataFile, ...]
    rows: tuple[ImageRow, ...]
    rows_key: str


def open_writer(
    format: str,
    directory: Path,
    data_prefix: str,
    image_format: ImageFormat = ImageFormat(),  # noqa: B008 (frozen)
) -> ShardWriter:
    """A writer of `format` that keeps its files at `directory / key` (local scratch, the caller removes it).

    Args:
        data_prefix: what every key starts with, unique to the attempt, such as "data/000012-<attempt>".
        image_format: of the encoded images it is given: they are named after it.

    Raises:
        InputError: no such format.
    """
    (directory / data_prefix).parent.mkdir(parents=True, exist_ok=True)
    match format:
        case "parquet":
            return ParquetShardWriter(directory, f"{data_prefix}.parquet")
        case "webdataset":
            return WebdatasetShardWriter(directory, data_prefix, image_format.suffix)
        case "files":
            return FilesShardWriter(directory, data_prefix, image_format.suffix)
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
        digest = sha256(prompt_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        escaped = f"{escaped[: MAX_NAME_BYTES - 2 - len(digest)]}%-{digest}"
    return f"{escaped or '%'}_{image_index}"


def _name(request: ImageRequest) -> str:
    return image_name(request.prompt_id, request.image_index)


class ShardWriter:
    """Collects one shard's rows, in the order they are added, in a Parquet file that is written group by group."""

    def __init__(self, directory: Path, rows_key: str, schema: pa.Schema = IMAGE_ROW_SCHEMA) -> None:
        self._directory = directory
        self._rows_key = rows_key
        self._schema = schema
        self._rows: list[ImageRow] = []
        self._added: set[tuple[str, int]] = set()  # prompt id and index
        self._flushed = 0  # of the rows
        self._pending_bytes = 0
        self._table: pq.ParquetWriter | None = None  # once it is known how many rows there are

    def add(self, row: ImageRow, encoded: bytes | None) -> None:
        """Add one row, whose `path`, `sha256` and `size_bytes` are filled, and where its status is "ok" its encoded image.

        Raises:
            ValueError: the image is missing for an "ok" row or given for another, or the row was added before.
            OSError: the scratch disk failed or is full.
        """
        request = row.request
        own = request.prompt_id, request.image_index
        if own in self._added:
            raise ValueError(f"prompt {own[0]!r}, image {own[1]}: added twice to one shard")
        if (encoded is not None) != (row.status == "ok"):
            what = "no image was given" if encoded is None else "an image was given"
            raise ValueError(f"prompt {own[0]!r}: {what} for a row with status {row.status!r}")
        self._added.add(own)
        if encoded is not None:
            row = row.stored(self._path(request), sha256(encoded).hexdigest(), len(encoded))
            self._add_image(encoded, row)
        self._rows.append(row)
        self._keep(encoded)
        if self._pending_bytes >= ROW_GROUP_BYTES or len(self._rows) - self._flushed >= ROW_GROUP_ROWS:
            self._flush()

    def add_many(self, rows: Sequence[ImageRow], encoded: Sequence[bytes | None]) -> None:
        """`add` each of `rows`, with its encoded image or None."""
        if not self._add_columns(rows, encoded):
            for row, one in zip(rows, encoded, strict=True):
                self.add(row, one)

    def finish(self) -> ShardFiles:
        """Close all files and describe them."""
        self._flush(is_all=self._table is None)
        assert self._table is not None
        self._table.close()
        files = (*self._finish_images(), self._describe(self._rows_key, len(self._rows)))
        return ShardFiles(files, tuple(self._rows), self._rows_key)

    def _path(self, request: ImageRequest) -> str:
        """Where a reader finds the image of `request`."""
        raise NotImplementedError

    def _add_image(self, encoded: bytes, row: ImageRow) -> None:
        """Write one image, which is not in the table."""

    def _add_columns(self, rows: Sequence[ImageRow], encoded: Sequence[bytes | None]) -> bool:
        """Add usual rows all at once; False where one by one is the way."""
        return False

    def _keep(self, encoded: bytes | None) -> None:
        """Hold what the table has of the last row beside the row itself."""

    def _columns(self, rows: Sequence[ImageRow]) -> Sequence[Sequence[Any]]:
        """The table's columns of `rows`, which are all that are not written yet."""
        return row_columns(rows)

    def _finish_images(self) -> Iterable[DataFile]:
        """Close and describe the files beside the table."""
        return ()

    def _describe(self, key: str, rows: int) -> DataFile:
        path = self._directory / key
        with path.open("rb") as file:  # its pages were just written: no disk read
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return DataFile(key, path.stat().st_size, digest, rows)

    def _flush(self, *, is_all: bool = False) -> None:
        rows = self._rows[self._flushed :]
        if self._table is None:
            options = row_table_options(self._schema, len(rows) if is_all else ROW_GROUP_ROWS)
            self._table = pq.ParquetWriter(self._directory / self._rows_key, self._schema, **options)
        if rows:
            columns = zip(self._schema, self._columns(rows), strict=True)
            arrays = [pa.array(values, field.type) for field, values in columns]
            self._table.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._flushed = len(self._rows)
        self._pending_bytes = 0


class ParquetShardWriter(ShardWriter):
    """One Parquet file with rows and images."""

    def __init__(self, directory: Path, rows_key: str, schema: pa.Schema = PARQUET_SCHEMA) -> None:
        super().__init__(directory, rows_key, schema)
        self._pending: list[bytes | None] = []

    def _add_columns(self, rows: Sequence[ImageRow], encoded: Sequence[bytes | None]) -> bool:
        """Those that all have images and fit into the row group."""
        images = [one for one in encoded if one is not None]
        own = {(row.request.prompt_id, row.request.image_index) for row in rows}
        n, n_bytes = len(rows), self._pending_bytes + sum(map(len, images))
        if (
            not len(own) == len(images) == len(encoded) == n > 0
            or not own.isdisjoint(self._added)
            or n_bytes >= ROW_GROUP_BYTES
            or len(self._rows) - self._flushed + n >= ROW_GROUP_ROWS
            or any(row.status != "ok" for row in rows)
        ):
            return False
        requests, statuses, widths, heights, steps, _, _, _, errors, warnings = zip(*rows, strict=True)
        paths, hashes = [self._rows_key] * n, [sha256(one).hexdigest() for one in images]
        sizes = list(map(len, images))
        stored = zip(
            *(requests, statuses, widths, heights, steps, paths, hashes, sizes, errors, warnings), strict=True
        )
        self._added |= own
        self._rows += map(ImageRow._make, stored)
        self._pending += images
        self._pending_bytes = n_bytes
        return True

    def _path(self, request: ImageRequest) -> str:
        return self._rows_key

    def _keep(self, encoded: bytes | None) -> None:
        self._pending_bytes += len(encoded or b"")
        self._pending.append(encoded)

    def _columns(self, rows: Sequence[ImageRow]) -> Sequence[Sequence[Any]]:
        images, self._pending = self._pending, []
        return (*super()._columns(rows), images)


class FilesShardWriter(ShardWriter):
    """One folder of image files and `rows.parquet`."""

    def __init__(self, directory: Path, data_prefix: str, suffix: str) -> None:
        (directory / data_prefix).mkdir()
        super().__init__(directory, f"{data_prefix}/rows.parquet")
        self._prefix = data_prefix
        self._suffix = suffix
        self._images: list[DataFile] = []

    def _path(self, request: ImageRequest) -> str:
        return f"{self._prefix}/{_name(request)}.{self._suffix}"

    def _add_image(self, encoded: bytes, row: ImageRow) -> None:
        assert row.path is not None
        assert row.sha256 is not None
        (self._directory / row.path).write_bytes(encoded)
        self._images.append(DataFile(row.path, len(encoded), row.sha256, 1))

    def _finish_images(self) -> Iterable[DataFile]:
        return self._images


class WebdatasetShardWriter(ShardWriter):
    """A tar, its `.index.json` (member name to [offset, size] in bytes) and `.rows.parquet`.

    Members of one image are adjacent and share the name up to the first dot, as webdataset wants. Headers are USTAR
    with fixed time and owner; names too long for that get a pax header, which every reader understands.
    """

    def __init__(self, directory: Path, data_prefix: str, suffix: str) -> None:
        super().__init__(directory, f"{data_prefix}.rows.parquet")
        self._suffix = suffix
        self._key = f"{data_prefix}.tar"
        self._index_key = f"{data_prefix}.index.json"
        self._tar = (directory / self._key).open("xb", buffering=1 << 20)
        self._index: dict[str, tuple[int, int]] = {}

    def _path(self, request: ImageRequest) -> str:
        return f"{self._key}#{_name(request)}.{self._suffix}"

    def _add_image(self, encoded: bytes, row: ImageRow) -> None:
        name = _name(row.request)
        told = {
            k: v for k, v in row.as_record().items() if k != "path"
        }  # the only field that names the attempt
        self._add_member(f"{name}.{self._suffix}", encoded)
        self._add_member(f"{name}.txt", row.request.prompt.encode("utf-8", "replace"))
        self._add_member(f"{name}.json", json.dumps(told, separators=(",", ":")).encode())

    def _finish_images(self) -> Iterable[DataFile]:
        self._tar.write(bytes(2 * _TAR_BLOCK))
        self._tar.write(bytes(-self._tar.tell() % _TAR_RECORD))
        self._tar.close()
        (self._directory / self._index_key).write_text(json.dumps(self._index, separators=(",", ":")))
        images = len(self._index) // 3
        return self._describe(self._key, images), self._describe(self._index_key, images)

    def _add_member(self, name: str, data: bytes) -> None:
        self._tar.write(_tar_header(name, len(data)))
        self._index[name] = (self._tar.tell(), len(data))
        self._tar.write(data + bytes(-len(data) % _TAR_BLOCK))


def row_table_options(schema: pa.Schema, rows: int) -> dict[str, Any]:
    """How a table of image rows is encoded: what `ParquetWriter` takes."""
    # image bytes are compressed already, and statistics or dictionaries of them would be copies
    described = [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name  # as Parquet spells them
        for field in schema
        if field.name != "image"
    ]
    is_short = rows < SHORT_TABLE_ROWS
    repeated = [] if is_short else [c for c in described if c not in ("prompt_id", "seed", "sha256")]
    return {
        "compression": {**dict.fromkeys(described, "NONE" if is_short else "ZSTD"), "image": "NONE"},
        "use_dictionary": repeated,
        "write_statistics": described,
    }


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
