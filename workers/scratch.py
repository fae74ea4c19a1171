"""Folders for files on their way to storage, on this process' own disk; they go when they are left, and those of the dead go, too.

A process that is killed cannot tidy up, and attempts of large images leave gigabytes. So each folder is held by a lock that the
kernel takes back with the process (flock on the folder itself), and the first folder that a process makes is made after those that
nobody holds any more were removed. Only folders of this user and of this host's name are looked at: locks of other hosts may not be
seen on a file system that they share. Where a folder cannot be locked, its own process removes it or a person does.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from millijoule.workers.errors import NodeError

log = logging.getLogger(__name__)

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in `tempfile.gettempdir()` for as long as the block runs.

    Raises:
        NodeError: it cannot be made, or there is no room left while the block runs.
    """
    folder = None
    try:
        with _held_folder() as folder:
            yield folder
    except OSError as error:
        if folder is not None and error.errno not in _NO_ROOM:
            raise
        raise unusable(error, folder) from error


def unusable(error: OSError, folder: Path | None = None) -> NodeError:
    """What `error`, of a file in the scratch folder `folder`, means to the node."""
    # Arrow names no file, and says the number of the error in words of its own
    reason = os.strerror(error.errno) if error.errno in _NO_ROOM else error.strerror or error
    where = f"scratch folder {error.filename or folder or ''}".rstrip()
    return NodeError(f"{where}: {reason}; free space there, or set TMPDIR to another folder on this node")


@contextmanager
def _held_folder() -> Iterator[Path]:
    _remove_abandoned_once(tempfile.gettempdir())
    while True:
        with tempfile.TemporaryDirectory(prefix=_prefix()) as name:
            file = _hold(Path(name))
            if file is None:
                continue  # taken for abandoned before it was held
            try:
                yield Path(name)
            finally:
                os.close(file)
            return


def remove_abandoned(directory: Path, host: str | None = None) -> list[Path]:
    """Remove the scratch folders in `directory` whose processes have ended; those that were removed. `host`: its name, by default this one's."""
    removed = []
    for path in sorted(directory.glob(f"{_prefix(host)}*")):
        try:
            if path.lstat().st_uid != os.getuid():
                continue
            file = os.open(path, _FOLDER_FLAGS)
        except OSError:  # no folder, or another process removes it, too
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
        except OSError:
            pass  # its process lives, or nobody can know
        finally:
            os.close(file)
    if removed:
        log.info("removed %d scratch folders that ended processes had left in %s", len(removed), directory)
    return removed


@cache
def _remove_abandoned_once(directory: str) -> None:
    remove_abandoned(Path(directory))


def _prefix(host: str | None = None) -> str:
    digest = hashlib.sha256((host or socket.gethostname()).encode()).hexdigest()[:8]
    return f"millijoule-scratch-{os.getuid()}-{digest}-"


def _hold(path: Path) -> int | None:
    """A descriptor that holds the folder, or at least names it; None where somebody was about to remove it."""
    try:
        file = os.open(path, _FOLDER_FLAGS)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_there = path.stat().st_ino == os.fstat(file).st_ino
    except (BlockingIOError, FileNotFoundError):
        is_there = False
    except OSError:  # a file system without locks
        is_there = True
    if is_there:
        return file
    os.close(file)
    return None
