"""The prompt files that a job's arguments name: paths, folders, globs and s3:// URLs, prefixes and globs."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from millijoule.workers.errors import InputError, NotFoundError
from millijoule.workers.storage.local import local_errors
from millijoule.workers.storage.open import is_s3_url, local_path, split_s3_url
from millijoule.workers.storage.prompt_file_names import (
    data_files,
    is_marker,
    literal_folder,
    partition_columns,
)

if TYPE_CHECKING:
    from millijoule.workers.storage.s3 import Bucket


@dataclass(frozen=True)
class InputFile:
    """A prompt file: absolute path or s3:// URL, size in bytes, and on S3 the server's ETag.

    `columns` are those that its folders add (`lang=de/`), text or None.
    """

    url: str
    size_bytes: int
    etag: str | None = None
    columns: tuple[tuple[str, str | None], ...] = ()


def expand_inputs(patterns: Iterable[str]) -> list[InputFile]:
    """The prompt files that paths, folders, globs and s3:// URLs, prefixes or globs name: each once, sorted by URL.

    `*`, `?` and `[...]` match within one path segment, `**` across segments. A folder or prefix stands for the data
    files below it (`data_files`); globs pass markers such as `_SUCCESS` over, too. Folders named `key=value` below the
    folder given, or below a glob's first wildcard, add a column.

    Raises:
        InputError: a pattern matches nothing, or a folder is not one of prompt files of one format.
        StoreError: S3 refused or failed.
    """
    found: dict[str, InputFile] = {}
    for pattern in patterns:
        files = _expand_s3(pattern) if is_s3_url(pattern) else _expand_local(pattern)
        if not files:
            raise InputError(f"no prompt file matches {pattern!r}; check the spelling")
        found.update((file.url, file) for file in files)
    return [found[url] for url in sorted(found)]


def open_input_file(url: str) -> BinaryIO:
    """Open a prompt file, a local path or an s3:// URL, for seekable binary reading; the caller closes it.

    Raises:
        NotFoundError: it does not exist.
        StoreError: it cannot be read.
    """
    if is_s3_url(url):
        bucket, key = split_s3_url(url)
        return _bucket(bucket).open_input(key)
    path = local_path(url)
    with local_errors("read", path):
        return open(path, "rb")


def _expand_local(pattern: str) -> list[InputFile]:
    path = str(local_path(pattern))
    if os.path.isdir(path):
        return _local_folder(pattern, path)
    names, root = [path], ""
    if not os.path.exists(path) and glob.has_magic(path):
        names, root = glob.glob(path, recursive=True), literal_folder(path)
    files, folders = [], []
    for name in _without_markers(names, path, root):
        with local_errors("read", Path(name)):
            try:
                status = os.stat(name)
            except FileNotFoundError:
                continue
        if stat.S_ISDIR(status.st_mode):
            folders.append(name)
        else:
            columns = partition_columns(name.removeprefix(root)) if root else ()
            files.append(InputFile(os.path.abspath(name), status.st_size, columns=columns))
    if folders and not files:
        raise InputError(
            f"{pattern!r} matches folders only; name one of them, or files in them such as "
            f"{os.path.join(folders[0], '*.parquet')!r}"
        )
    return files


def _local_folder(pattern: str, path: str) -> list[InputFile]:
    sizes: dict[str, int] = {}
    with local_errors("list", Path(path)):
        for folder, _, names in os.walk(path, onerror=_raise):
            for name in names:
                file = os.path.join(folder, name)
                relative = os.path.relpath(file, path).replace(os.sep, "/")
                # A link to nowhere beside the data is no reason to stop, unless it would be read.
                sizes[relative] = 0 if is_marker(relative) else os.stat(file).st_size
    root = os.path.abspath(path)
    return [
        InputFile(os.path.join(root, name), sizes[name], columns=partition_columns(name))
        for name in data_files(pattern, sizes)
    ]


def _raise(error: OSError) -> None:
    raise error


def _expand_s3(pattern: str) -> list[InputFile]:
    from fsspec.utils import glob_translate

    name, key = split_s3_url(pattern)
    bucket = _bucket(name)
    objects: dict[str, dict[str, Any]]
    root = ""
    if not glob.has_magic(key):
        try:
            head = bucket.head(key) if key and not pattern.endswith("/") else {}
        except NotFoundError:
            head = {}
        if head:
            objects = {key: {"Size": head["ContentLength"], **head}}
        else:
            root = f"{key}/" if key else ""
            objects = {o["Key"]: o for o in bucket.list_objects(root)}
            if objects:
                sizes = {k.removeprefix(root): o["Size"] for k, o in objects.items()}
                objects = {root + n: objects[root + n] for n in data_files(pattern, sizes)}
    else:
        matches = re.compile(glob_translate(key)).match
        root = literal_folder(key)
        literal = re.split(r"[*?\[]", key, maxsplit=1)[0]
        found = {o["Key"]: o for o in bucket.list_objects(literal) if matches(o["Key"]) or o["Key"] == key}
        objects = {k: found[k] for k in _without_markers(found, key, root)}
    return [
        InputFile(
            f"s3://{name}/{k}",
            o["Size"],
            o["ETag"].strip('"'),
            partition_columns(k.removeprefix(root)) if root or k != key else (),
        )
        for k, o in objects.items()
    ]


def _bucket(name: str) -> Bucket:
    from millijoule.workers.storage.s3 import S3Settings, shared_bucket  # s3fs takes 0.5 s to import

    return shared_bucket(name, S3Settings.from_environment())


def _without_markers(names: Iterable[str], pattern: str, root: str) -> list[str]:
    """What a glob matched without markers, unless it asks for them itself (`_*.csv`); a plain path as it is."""
    if not glob.has_magic(pattern) or is_marker(pattern.removeprefix(root)):
        return list(names)
    return [name for name in names if name == pattern or not is_marker(name.removeprefix(root))]
