"""What processes of one user on one host tell each other: small files and locks in a folder that only this user can enter.

Nothing depends on such a folder: what is missing, foreign or damaged there is found anew, and who cannot have a lock goes on
without it. A lock is the kernel's (flock): it ends with the process that holds it, whatever ends that.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

_LOCK_POLL_S = 0.02

#: Larger entries are not ours.
MAX_ENTRY_BYTES = 16_384


def shared_memory_or_temporary() -> Path:
    """Where folders of a host are: shared memory, which a restart empties, else the temporary folder."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


class HostFolder:
    """A folder of small entries, each with a lock beside it.

    Args:
        purpose: part of the folder's name, and of the words of a log.
        path: of the folder, made when it is missing; by default see `shared_memory_or_temporary`. Where it belongs to
            somebody else or others can enter it, there are no entries.
    """

    def __init__(self, purpose: str, path: Path | None = None) -> None:
        self.purpose = purpose
        self.path = path or shared_memory_or_temporary() / f"millijoule-{os.getuid()}-{purpose}"

    def entry(self, key: str) -> Path | None:
        """The file for `key`, whatever characters that has; None where the folder is not ours alone."""
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            info = self.path.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
                raise OSError("not a folder that only this user can enter, remove it")
        except OSError as error:
            log.warning(
                "%s: %s; processes of this host do not share their %s", self.path, error, self.purpose
            )
            return None
        return self.path / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.json"


@contextmanager
def locked(entry: Path, timeout_s: float, waits_for: str) -> Iterator[bool]:
    """With the exclusive lock of `entry`, or without it (False) where its holder takes longer than `timeout_s`.

    Args:
        waits_for: whom the lock keeps apart, for the log.
    """
    file, held = None, False
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(entry.with_suffix(".lock"), flags, 0o600)
        _wait_for(file, timeout_s)
        held = True
    except OSError as error:
        log.warning("%s: %s; this process does not wait for others that %s", entry, error, waits_for)
    try:
        yield held
    finally:
        if file is not None:
            os.close(file)


def _wait_for(file: int, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_POLL_S)


def read_entry(entry: Path) -> bytes | None:
    """What stands in `entry`, if it is a small file of this user's; None where there is none."""
    try:
        file = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        info = os.fstat(file)
        ours = stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid()
        return os.read(file, MAX_ENTRY_BYTES) if ours and info.st_size <= MAX_ENTRY_BYTES else None
    except OSError:
        return None
    finally:
        os.close(file)


def write_entry(entry: Path, content: bytes) -> None:
    """Under a name of its own, then renamed: a reader sees the old entry or the new one. A full disk is only logged."""
    temporary = entry.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(content)
        temporary.replace(entry)
    except OSError as error:
        log.warning("%s: cannot be written (%s)", entry, error)
        temporary.unlink(missing_ok=True)
