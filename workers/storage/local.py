"""A `Store` in a folder of a local or shared POSIX file system."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from millijoule.workers.errors import AlreadyExistsError, NotFoundError, StoreError
from millijoule.workers.storage.protocol import (
    TEMPORARY_PREFIX,
    ObjectInfo,
    Store,
    TemporaryObject,
    check_key,
    check_prefix,
)

logger = logging.getLogger(__name__)

#: Files that cannot be linked are copied in parts of this size.
COPY_PART_BYTES = 32 << 20

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_NO_RENAME_FLAGS = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_FOLDER_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_RETRYABLE_ERRNOS = {errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENETUNREACH}

_ADVICE = {
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
}

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class LocalStore(Store):
    """A folder on a local or shared POSIX file system.

    Writes go to a temporary file beside the target, are flushed to the disk and then get their name, so a reader
    or a crash never meets half an object. The exclusive create is `link(2)`, which fails where the name is taken.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = str(self.root)

    def put_exclusive(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _temporary_beside(path, "create") as temporary:
            _write_new_file(temporary, data)
            try:
                _name_exclusively(temporary, path, data)
            except FileExistsError:
                # Ours, when an NFS server's answer to an earlier try was lost.
                if not path.is_file() or path.read_bytes() != data:
                    raise AlreadyExistsError(
                        f"{path} already exists with other content; another writer was first"
                    ) from None

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _temporary_beside(path, "write") as temporary:
            _write_new_file(temporary, data)
            os.replace(temporary, path)

    def put_file(self, key: str, path: Path, on_part: Callable[[], None] = lambda: None) -> None:
        target = self._path(key)
        with _temporary_beside(target, "write") as temporary:
            try:
                os.link(path, temporary)
            except OSError as e:
                if e.errno != errno.EXDEV and e.errno not in _NO_HARD_LINKS:
                    raise
                _copy(path, temporary, on_part)
            _flush_file(temporary)
            os.replace(temporary, target)
        on_part()

    def get(self, key: str) -> bytes:
        path = self._path(key)
        with local_errors("read", path):
            return path.read_bytes()

    def size(self, key: str) -> int:
        path = self._path(key)
        with local_errors("read", path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise NotFoundError(f"{path} is not a file")
        return status.st_size

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        for info in self._scan(check_prefix(prefix).rpartition("/")[0]):
            if info.key.startswith(prefix) and not _is_temporary(info.key):
                yield info

    def delete(self, keys: Iterable[str]) -> None:
        self._unlink_all([self._path(key) for key in keys])

    def open_input(self, key: str) -> pa.NativeFile:
        path = self._path(key)
        self.size(key)  # a folder opens too, and only fails when read
        with local_errors("read", path):
            return pa.OSFile(str(path), "rb")

    def list_temporary(self) -> Iterator[TemporaryObject]:
        for info in self._scan(""):
            if _is_temporary(info.key):
                yield TemporaryObject(info.key, info.mtime_ns)

    def delete_temporary(self, leftovers: Iterable[TemporaryObject]) -> None:
        paths = []
        for leftover in leftovers:
            if not _is_temporary(leftover.key):
                raise ValueError(f"{leftover.key!r} is not a temporary file")
            folder, _, name = leftover.key.rpartition("/")
            paths.append((self._path(folder) if folder else self.root) / name)
        self._unlink_all(paths)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _scan(self, folder: str) -> Iterator[ObjectInfo]:
        """Every file below `folder`, temporary ones too; a missing folder is empty."""
        pending = [folder]
        while pending:
            current = pending.pop()
            path = self.root / current
            start = f"{current}/" if current else ""
            with local_errors("list", path):
                try:
                    entries = os.scandir(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                with entries:
                    for entry in entries:
                        if entry.is_dir():
                            pending.append(start + entry.name)
                        elif entry.is_file():
                            try:
                                status = entry.stat()
                            except FileNotFoundError:
                                continue  # deleted since the folder was read
                            yield ObjectInfo(start + entry.name, status.st_size, status.st_mtime_ns)

    def _unlink_all(self, paths: Iterable[Path]) -> None:
        folders = set()
        for path in paths:
            with local_errors("delete", path):
                try:
                    path.unlink()
                except (FileNotFoundError, NotADirectoryError):
                    continue
                folders.add(path.parent)
        for folder in folders:
            with local_errors("delete in", folder):
                try:
                    _flush_folder(folder)
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
    if rename_exclusively(temporary, path):
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


def rename_exclusively(temporary: Path, path: Path) -> bool:
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


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY_PREFIX)


@contextmanager
def _temporary_beside(path: Path, action: str) -> Iterator[Path]:
    """A temporary name in the folder of `path`, which is made; what still stands under it afterwards is removed.

    The folder is flushed to the disk at the end. An OSError is a failure to `action` the file at `path`.
    """
    with local_errors(action, path):
        _make_folder(path.parent)
        temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            _unlink_if_present(temporary)
        _flush_folder(path.parent)


def _write_new_file(path: Path, data: bytes) -> None:
    with path.open("xb") as new:
        new.write(data)
        new.flush()
        os.fsync(new.fileno())


def _copy(source: Path, target: Path, on_part: Callable[[], None]) -> None:
    """Copy a file part by part, each on the disk before the next: a slow file system shows that it gets on."""
    with source.open("rb") as old, target.open("wb") as new:
        while part := old.read(COPY_PART_BYTES):
            new.write(part)
            new.flush()
            os.fdatasync(new.fileno())
            on_part()


def _flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    try:
        _flush_file(path)
    except OSError as e:
        if e.errno not in _NO_FOLDER_FSYNC:
            raise


def _make_folder(path: Path) -> None:
    """Make the folder and its parents, each entry flushed to the disk."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)


def _unlink_if_present(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        logger.warning("could not remove the temporary file %s: %s", path, e)


@contextmanager
def local_errors(action: str, path: Path) -> Iterator[None]:
    """Turns an OSError in its block into a StoreError that says what to do; `action` is a verb like "write"."""
    try:
        yield
    except OSError as error:
        code = error.errno or 0
        if code in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR) and action == "read":
            raise NotFoundError(f"{path} does not exist") from error
        # Only one operand of a link or a rename is ours to name: the one the caller asked for.
        message = f"cannot {action} {path}: {error.strerror or error}"
        advice = _ADVICE.get(code)
        raise StoreError(
            f"{message} ({advice})" if advice else message, transient=code in _RETRYABLE_ERRNOS
        ) from error
