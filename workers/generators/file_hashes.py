"""SHA-256 of model files, found once per host: by the first process that asks, for all that ask after it.

A worker's start asks for the hash of its model several times, and so do the driver and all other workers of the host; a
model may have many gigabytes. What was found is kept in the process and, one small JSON file per model file, in a folder
that only this user can enter. It holds for a file of the same path, size, inode and times. A file that was touched just
before it was read may be touched again without a trace in its times, so its hash is not kept (git's "racy" entries).
Nothing depends on the folder: what is missing, foreign or damaged there is found anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from millijoule.workers.records import convert, encode

log = logging.getLogger(__name__)

#: A file that changed within this time before it was read is not kept: its next change may show the same times.
RACY_NS = 2_000_000_000

#: How long to wait for another process that reads the same file. A hundred gigabytes take minutes; then each reads alone.
LOCK_TIMEOUT_S = 600.0
_LOCK_POLL_S = 0.02

#: Larger entries are not ours.
_MAX_ENTRY_BYTES = 16_384


@dataclass(frozen=True)
class FileState:
    """What tells one content of a file from another without reading it. `changed_ns` is the inode's own time, which no program can set."""

    path: str  # absolute, without symbolic links
    size: int
    modified_ns: int
    changed_ns: int
    inode: int
    device: int

    @staticmethod
    def of(path: str, info: os.stat_result) -> FileState:
        return FileState(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino, info.st_dev)


@dataclass(frozen=True)
class _Kept(FileState):
    """What is kept of a file."""

    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class FileHashes:
    """The hashes this process knows, and those that all processes of this user and host share.

    Args:
        folder: the shared one, made when it is missing; default in shared memory, else in the temporary folder. Where it
            belongs to somebody else or others can enter it, nothing is shared.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is None:
            shm = Path("/dev/shm")
            above = shm if os.access(shm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
            folder = above / f"millijoule-{os.getuid()}-hashes"
        self.folder = folder
        self._known: dict[str, tuple[FileState, str]] = {}
        self._mutex = threading.Lock()

    def sha256(self, path: Path | str) -> str:
        """SHA-256 of the file's content, hexadecimal.

        Raises:
            OSError: the file cannot be read.
        """
        real = os.path.realpath(path)
        with self._mutex:
            state = FileState.of(real, os.stat(real))
            known = self._known.get(real)
            return known[1] if known is not None and known[0] == state else self._find(state)

    def _find(self, state: FileState) -> str:
        entry = self._entry(state.path)
        with _locked(entry) if entry else nullcontext():
            digest = _load(entry, state) if entry else None
            if digest is None:
                settled, digest = _read(state.path)
                if settled is None:
                    return digest
                state = settled
                if entry:
                    _save(entry, _Kept(**asdict(state), sha256=digest))
        self._known[state.path] = (state, digest)
        return digest

    def _entry(self, path: str) -> Path | None:
        """The shared file for `path`; None where the folder is not ours alone."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            info = self.folder.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
                raise OSError("not a folder that only this user can enter, remove it")
        except OSError as error:
            log.warning("%s: %s; processes of this host do not share the hashes of files", self.folder, error)
            return None
        return self.folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


#: Of this process and this host.
shared = FileHashes()


def file_sha256(path: Path | str) -> str:
    """`FileHashes.sha256` of this process' and host's."""
    return shared.sha256(path)


def _read(path: str) -> tuple[FileState | None, str]:
    """The file's hash, and the state that stands for it; None where another content may show the same state."""
    with open(path, "rb") as file:
        began_ns = time.time_ns()
        state = FileState.of(path, os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = FileState.of(path, os.fstat(file.fileno()))
    settled = began_ns - max(state.modified_ns, state.changed_ns) >= RACY_NS and after == state
    return (state if settled else None), digest


@contextmanager
def _locked(entry: Path) -> Iterator[None]:
    """With the exclusive lock of an entry, so that one process reads and the others find what it read; or without it,
    where its holder takes too long."""
    file = None
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(entry.with_suffix(".lock"), flags, 0o600)
        _wait_for(file)
    except OSError as error:
        log.warning("%s: %s; this process does not wait for others that read the same file", entry, error)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def _wait_for(file: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_POLL_S)


def _load(entry: Path, state: FileState) -> str | None:
    """The hash in `entry` if it is one of ours and of this very state."""
    try:
        file = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # nobody has read the file yet
    try:
        info = os.fstat(file)
        ours = stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid()
        if not ours or info.st_size > _MAX_ENTRY_BYTES:
            return None
        kept = convert(_Kept, msgspec.json.decode(os.read(file, _MAX_ENTRY_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        os.close(file)
    return kept.sha256 if kept == _Kept(**asdict(state), sha256=kept.sha256) else None


def _save(entry: Path, kept: _Kept) -> None:
    """Under a name of its own, then renamed: a reader sees the old entry or the new one."""
    temporary = entry.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_bytes(encode(kept))
        temporary.replace(entry)
    except OSError as error:  # a full disk costs the others a second reading
        log.warning("%s: cannot be written (%s)", entry, error)
        temporary.unlink(missing_ok=True)
