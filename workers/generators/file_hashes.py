"""SHA-256 of model files, found once per host: by the first process that asks, for all that ask after it.

A worker's start asks for the hash of its model several times, and so do the driver and all other workers of the host; a
model may have many gigabytes. What was found is kept in the process and, one small JSON file per model file, in a folder
that only this user can enter. It holds for a file of the same path, size, inode and times. A file that was touched just
before it was read may be touched again without a trace in its times, so its hash is not kept (git's "racy" entries).
Nothing depends on the folder: what is missing, foreign or damaged there is found anew.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from millijoule.workers.host_folder import HostFolder, locked, read_entry, write_entry
from millijoule.workers.records import convert, encode

#: A file that changed within this time before it was read is not kept: its next change may show the same times.
RACY_NS = 2_000_000_000

#: How long to wait for another process that reads the same file. A hundred gigabytes take minutes; then each reads alone.
LOCK_TIMEOUT_S = 600.0


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
        folder: the shared one (see `HostFolder`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = HostFolder("hashes", folder)
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
        entry = self.folder.entry(state.path)
        with locked(entry, LOCK_TIMEOUT_S, "read the same file") if entry else nullcontext():
            digest = _load(entry, state) if entry else None
            if digest is None:
                settled, digest = _read(state.path)
                if settled is None:
                    return digest
                state = settled
                if entry:
                    write_entry(entry, encode(_Kept(**asdict(state), sha256=digest)))
        self._known[state.path] = (state, digest)
        return digest


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


def _load(entry: Path, state: FileState) -> str | None:
    """The hash in `entry` if it is one of ours and of this very state."""
    content = read_entry(entry)
    if content is None:
        return None  # nobody has read the file yet
    try:
        kept = convert(_Kept, msgspec.json.decode(content))
    except (ValueError, RecursionError):
        return None
    return kept.sha256 if kept == _Kept(**asdict(state), sha256=kept.sha256) else None
