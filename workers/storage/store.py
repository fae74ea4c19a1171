"""Where everything durable lives: one small `Store` over a local folder or an S3 bucket, and the reading of prompt files.

Bytes go in under relative keys and come out again; `put_exclusive` is the one operation the commit protocol rests on.
Nothing half-written ever stands under a final key. Nothing here knows what the objects mean, and no failure is
swallowed: whatever goes wrong arrives as a `StoreError` that names the place and the next step.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import logging
import math
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import pyarrow as pa

from millijoule.workers.errors import AlreadyExistsError, InputError, NotFoundError, StoreError
from millijoule.workers.storage.prompt_file_names import (
    data_files,
    is_marker,
    literal_folder,
    partition_columns,
)

if TYPE_CHECKING:
    from millijoule.workers.storage.s3 import S3Settings

logger = logging.getLogger(__name__)

#: Local files being written carry this prefix until they get their final name; no key may contain it.
TEMPORARY_PREFIX = ".millijoule-tmp-"

#: Files that cannot be linked are copied in parts of this size.
COPY_PART_BYTES = 32 << 20

#: S3 allows 1,024 bytes for prefix and key together; Linux 255 for one segment.
MAX_KEY_BYTES = 900
MAX_SEGMENT_BYTES = 255

_FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_NO_RENAME_FLAGS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRYABLE_ERRNOS = {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH}

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing; `mtime_ns` is the store's own clock, nanoseconds since the Unix epoch."""

    key: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class TemporaryObject:
    """What an interrupted write left behind: a local file (`upload_id` None) or a pending multipart upload.

    `key` is the temporary file's own key, or the key the upload was meant for.
    """

    key: str
    mtime_ns: int
    upload_id: str | None = None


@dataclass(frozen=True)
class InputFile:
    """A prompt file: absolute path or s3:// URL, size in bytes, and on S3 the server's ETag.

    `columns` are those that its folders add (`lang=de/`), text or None.
    """

    url: str
    size_bytes: int
    etag: str | None = None
    columns: tuple[tuple[str, str | None], ...] = ()


class Store(Protocol):
    """A flat set of immutable-by-convention objects under relative POSIX keys.

    Every method raises ValueError for an unusable key and StoreError for everything the storage does; throttling,
    lost connections and time-outs are first retried for some tens of seconds. Stores can be pickled and used from
    several threads and processes.
    """

    url: str  #: normalised, for messages
    is_local: bool

    def put_exclusive(self, key: str, data: bytes) -> None:
        """Create the object. On return it holds exactly `data`, also when an earlier try of ours had created it.

        Raises:
            AlreadyExistsError: it holds other bytes.
            StoreError: with `transient` True the outcome may be unknown; call again with the same bytes.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write the whole object, replacing any other; readers see the old or the new bytes, never a mixture."""
        ...

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        """Store a finished local file under `key`, as atomically as `put`.

        The file may be deleted afterwards but not changed: on a local store the object can be a hard link to it.
        `on_part` is called, from any thread, whenever a part of it has arrived.
        """
        ...

    def get(self, key: str) -> bytes:
        """All bytes of the object; raises NotFoundError."""
        ...

    def exists(self, key: str) -> bool: ...

    def size(self, key: str) -> int:
        """Size in bytes; raises NotFoundError."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with the string `prefix`, in no particular order, always asked afresh."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; missing ones are fine."""
        ...

    def open_input(self, key: str) -> pa.NativeFile | BinaryIO:
        """A seekable binary file with ranged reads, as `pyarrow.parquet.ParquetFile` takes it.

        Raises:
            NotFoundError: no such object.
        """
        ...

    def probe_exclusive_create(self) -> bool:
        """Whether a second exclusive create is really refused here; some S3 servers silently overwrite."""
        ...

    def list_temporary(self) -> Iterator[TemporaryObject]:
        """What interrupted or still running writes hold; `list` never shows it. Age is the caller's to judge."""
        ...

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        """Delete what `list_temporary` found. A write that is still running then fails, and leaves nothing."""
        ...


def open_store(url: str, s3: S3Settings | None = None, *, patient: bool = False) -> Store:
    """Open a folder ("out", "/data/out", "file:///data/out") or an S3 prefix ("s3://bucket/prefix").

    Nothing is contacted or created yet. `s3` defaults to what the AWS_* environment variables say. A `patient` store
    repeats what fails in passing for as long as it takes: for a job at work, which has nothing better to do than wait.

    Raises:
        InputError: neither a path nor an s3:// URL.
    """
    if is_s3_url(url):
        from millijoule.workers.storage.s3 import (
            S3Settings,
            S3Store,
        )  # here, since s3fs takes 0.5 s to import

        bucket, prefix = split_s3_url(url)
        settings = s3 or S3Settings.from_environment()
        if patient:
            settings = replace(settings, retry_for_s=math.inf)
        return S3Store(bucket, prefix, settings)
    return LocalStore(_local_path(url))


def check_key(key: str) -> str:
    """Return `key`, or raise ValueError where it is no relative POSIX path that every store can hold."""
    problem = None
    segments = key.split("/")
    if not key:
        problem = "it is empty"
    elif key.startswith("/"):
        problem = "it is absolute"
    elif "" in segments:
        problem = "it has an empty segment"
    elif "." in segments or ".." in segments:
        problem = "'.' and '..' are not allowed"
    elif _FORBIDDEN_CHARACTERS.search(key):
        problem = "it has a control character or one that cannot be encoded"
    elif "?versionId=" in key:
        problem = "'?versionId=' means something to S3 clients"
    elif TEMPORARY_PREFIX in key:
        problem = f"'{TEMPORARY_PREFIX}' marks temporary files"
    elif len(key.encode()) > MAX_KEY_BYTES or any(len(s.encode()) > MAX_SEGMENT_BYTES for s in segments):
        problem = f"it is longer than {MAX_KEY_BYTES} bytes, or a segment than {MAX_SEGMENT_BYTES}"
    if problem:
        raise ValueError(f"unusable storage key {key!r}: {problem}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise ValueError where no valid key can start with it; "" and "data/" are fine."""
    if prefix:
        check_key(prefix + "x")
    return prefix


def probe_exclusive_create(store: Store) -> bool:
    """Create one unique key twice with different bytes; True when the second is refused and the first stands."""
    key = f"exclusive-create-probe-{uuid.uuid4().hex}"
    first, second = b"first " + key.encode(), b"second " + key.encode()
    try:
        store.put_exclusive(key, first)
        try:
            store.put_exclusive(key, second)
        except AlreadyExistsError:
            return store.get(key) == first
        return False
    finally:
        store.delete([key])


class LocalStore:
    """A folder on a local or shared POSIX file system.

    Writes go to a temporary file beside the target, are flushed to the disk and then get their name, so a reader
    or a crash never meets half an object. The exclusive create is `link(2)`, which fails where the name is taken.
    """

    is_local = True

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def __repr__(self) -> str:
        return f"LocalStore({self.url!r})"

    def put_exclusive(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _local_errors("create", path):
            temporary = self._write_temporary(path, data)
            try:
                _name_exclusively(temporary, path, data)
            except FileExistsError:
                # Ours, when an NFS server's answer to an earlier try was lost.
                if not path.is_file() or path.read_bytes() != data:
                    raise AlreadyExistsError(
                        f"{path} already exists with other content; another writer was first"
                    ) from None
            finally:
                _unlink_if_present(temporary)
            _fsync_folder(path.parent)

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _local_errors("write", path):
            self._rename(self._write_temporary(path, data), path)

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        target = self._path(key)
        source = Path(path)
        with _local_errors("write", target):
            _make_folder(target.parent)
            temporary = _temporary_beside(target)
            try:
                try:
                    os.link(source, temporary)
                except OSError as e:
                    if e.errno != errno.EXDEV and e.errno not in _NO_HARD_LINKS:
                        raise
                    _copy(source, temporary, on_part)
                _fsync_file(temporary)
            except BaseException:
                _unlink_if_present(temporary)
                raise
            self._rename(temporary, target)
        on_part()

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with _local_errors("read", path):
            return path.read_bytes()

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def size(self, key: str) -> int:
        path = self._path(key)
        with _local_errors("read", path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotFoundError(f"{path} is not a file")
        return status.st_size

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = check_prefix(prefix).rpartition("/")[0]
        for key, entry in self._scan(folder):
            if key.startswith(prefix) and not entry.name.startswith(TEMPORARY_PREFIX):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # deleted since the folder was read
                yield ObjectInfo(key, status.st_size, status.st_mtime_ns)

    def delete(self, keys: Iterable[str]) -> None:
        self._unlink_all([self._path(key) for key in keys])

    def open_input(self, key: str) -> pa.NativeFile:
        path = self._path(key)
        self.size(key)  # a folder opens too, and only fails when read
        with _local_errors("read", path):
            return pa.OSFile(str(path), "rb")

    def probe_exclusive_create(self) -> bool:
        return probe_exclusive_create(self)

    def list_temporary(self) -> Iterator[TemporaryObject]:
        for key, entry in self._scan(""):
            if entry.name.startswith(TEMPORARY_PREFIX):
                try:
                    yield TemporaryObject(key, entry.stat().st_mtime_ns)
                except FileNotFoundError:
                    continue

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        paths = []
        for leftover in leftovers:
            folder, _, name = leftover.key.rpartition("/")
            if not name.startswith(TEMPORARY_PREFIX):
                raise ValueError(f"{leftover.key!r} is not a temporary file")
            paths.append((self._path(folder) if folder else self.root) / name)
        self._unlink_all(paths)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        """Write `data` flushed to the disk under a temporary name in the folder of `path`, which is made."""
        _make_folder(path.parent)
        temporary = _temporary_beside(path)
        try:
            _write_new_file(temporary, data)
        except BaseException:
            _unlink_if_present(temporary)
            raise
        return temporary

    def _rename(self, temporary: Path, path: Path) -> None:
        try:
            os.replace(temporary, path)
        except BaseException:
            _unlink_if_present(temporary)
            raise
        _fsync_folder(path.parent)

    def _scan(self, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file below `folder`, hidden ones too, as (key, entry); a missing folder is empty."""
        pending = [folder]
        while pending:
            current = pending.pop()
            path = self.root / current
            start = f"{current}/" if current else ""
            with _local_errors("list", path):
                try:
                    entries = os.scandir(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                with entries:
                    for entry in entries:
                        if entry.is_dir():
                            pending.append(start + entry.name)
                        elif entry.is_file():
                            yield start + entry.name, entry

    def _unlink_all(self, paths: Iterable[Path]) -> None:
        folders = set()
        for path in paths:
            with _local_errors("delete", path):
                try:
                    path.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                folders.add(path.parent)
        for folder in folders:
            with _local_errors("delete in", folder):
                try:
                    _fsync_folder(folder)
                except FileNotFoundError:
                    continue


def _name_exclusively(temporary: Path, path: Path, data: bytes) -> None:
    """Give the bytes of `temporary` the name `path`; raises FileExistsError where the name is taken."""
    try:
        os.link(temporary, path)
        return
    except OSError as e:
        if e.errno not in _NO_HARD_LINKS:
            raise
    if _rename_exclusively(temporary, path):
        return
    # The weakest way, for file systems without hard links and without renameat2 flags (some FUSE): exactly one
    # writer still wins, but a reader or a crash within this one write can meet a short file.
    logger.warning("no hard links on %s: creating %s in place", path.parent, path.name)
    try:
        _write_new_file(path, data)
    except FileExistsError:
        raise
    except BaseException:
        _unlink_if_present(path)
        raise


def _rename_exclusively(temporary: Path, path: Path) -> bool:
    """`renameat2` with RENAME_NOREPLACE (FAT, SMB): True when done, False where this system lacks it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_RENAME_FLAGS:
        return False
    raise OSError(code, os.strerror(code), str(path))


def _temporary_beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"


def _write_new_file(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        remaining = memoryview(data).cast("B")
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path, on_part: Callable[[], None]) -> None:
    """Copy a file part by part, each on the disk before the next: a slow file system shows that it gets on."""
    with source.open("rb") as old, target.open("wb", buffering=0) as new:
        while part := old.read(COPY_PART_BYTES):
            view = memoryview(part)
            while view:
                view = view[new.write(view) :]
            os.fdatasync(new.fileno())
            on_part()


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _NO_FOLDER_FSYNC:
            raise
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    """Make the folder and its parents, each entry flushed to the disk."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _fsync_folder(folder.parent)


def _unlink_if_present(path: Path) -> None:
    try:
        path.unlink()
    except OSError as e:
        if e.errno != errno.ENOENT:
            logger.warning("could not remove the temporary file %s: %s", path, e)


class _local_errors:
    """Turns an OSError in its block into a StoreError that says what to do; `action` is a verb like "write"."""

    def __init__(self, action: str, path: Path) -> None:
        self.action = action
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, OSError):
            return
        # Only one operand of a link or a rename is ours to name: the one the caller asked for.
        message = f"cannot {self.action} {self.path}: {error.strerror or error}"
        code = error.errno
        if code in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR) and self.action == "read":
            raise NotFoundError(f"{self.path} does not exist") from error
        advice = {
            errno.ENOSPC: "disk full: free space or choose another output folder",
            errno.EDQUOT: "disk quota used up: free space or choose another output folder",
            errno.EFBIG: "the file is larger than the file system or the process limit (ulimit -f) allows",
            errno.EROFS: "the file system is mounted read-only",
            errno.EACCES: "check the owner and the permissions of the folder",
            errno.EPERM: "check the owner and the permissions of the folder",
            errno.ENOENT: "a folder was removed meanwhile, or the source file is missing",
            errno.ENOTDIR: "a file stands where a folder is needed",
            errno.EEXIST: "a file stands where a folder is needed",
            errno.EISDIR: "a folder stands where a file is needed",
            errno.ENAMETOOLONG: "the path is too long for this file system",
            errno.EIO: "the disk or its server reports an I/O error; see the kernel log",
            errno.ESTALE: "the NFS server lost this folder; remount it",
            errno.EMFILE: "raise the limit of open files (ulimit -n)",
        }.get(code or 0)
        raise StoreError(
            f"{message} ({advice})" if advice else message, transient=code in _RETRYABLE_ERRNOS
        ) from error


def is_s3_url(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def split_s3_url(url: str) -> tuple[str, str]:
    """("bucket", "key/or/prefix") of an s3:// URL, without leading or trailing slashes; raises InputError."""
    bucket, _, key = url.partition("://")[2].partition("/")
    if not bucket:
        raise InputError(f"{url!r} names no bucket; write s3://bucket/prefix")
    return bucket, key.strip("/")


def _local_path(url: str) -> Path:
    """The path of a plain path or file:// URL; raises InputError for any other scheme."""
    if url.startswith("file://"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{url!r} names another machine; write file:///folder or a plain path")
        return Path(unquote(parts.path))
    if not url:
        raise InputError("empty path; give a folder, a file or an s3:// URL")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", url):
        scheme = url.partition(":")[0]
        raise InputError(
            f"{url!r}: cannot read or write {scheme}: URLs; use a local path or s3://bucket/prefix"
        )
    return Path(url).expanduser()


def expand_inputs(patterns: Iterable[str], s3: S3Settings | None = None) -> list[InputFile]:
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
        files = _expand_s3(pattern, s3) if is_s3_url(pattern) else _expand_local(pattern)
        if not files:
            raise InputError(f"no prompt file matches {pattern!r}; check the spelling")
        found.update((file.url, file) for file in files)
    return [found[url] for url in sorted(found)]


def open_input_file(url: str, s3: S3Settings | None = None) -> BinaryIO:
    """Open a prompt file, a local path or an s3:// URL, for seekable binary reading; the caller closes it.

    Raises:
        NotFoundError: it does not exist.
        StoreError: it cannot be read.
    """
    if is_s3_url(url):
        from millijoule.workers.storage.s3 import S3Settings, shared_bucket

        bucket, key = split_s3_url(url)
        return shared_bucket(bucket, s3 or S3Settings.from_environment()).open_input(key)
    path = _local_path(url)
    with _local_errors("read", path):
        return open(path, "rb")


def _expand_local(pattern: str) -> list[InputFile]:
    path = str(_local_path(pattern))
    if os.path.isdir(path):
        return _local_folder(pattern, path)
    names, root = [path], ""
    if not os.path.exists(path) and glob.has_magic(path):
        names, root = glob.glob(path, recursive=True), literal_folder(path)
    files, folders = [], []
    for name in _without_markers(names, path, root):
        with _local_errors("read", Path(name)):
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
    with _local_errors("list", Path(path)):
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


def _expand_s3(pattern: str, s3: S3Settings | None) -> list[InputFile]:
    from fsspec.utils import glob_translate

    from millijoule.workers.storage.s3 import S3Settings, shared_bucket

    name, key = split_s3_url(pattern)
    bucket = shared_bucket(name, s3 or S3Settings.from_environment())
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


def _without_markers(names: Iterable[str], pattern: str, root: str) -> list[str]:
    """What a glob matched without markers, unless it asks for them itself (`_*.csv`); a plain path as it is."""
    if not glob.has_magic(pattern) or is_marker(pattern.removeprefix(root)):
        return list(names)
    return [name for name in names if name == pattern or not is_marker(name.removeprefix(root))]
