"""A sign of life that the kernel takes back: a file a worker's process holds locked for as long as it lives.

Who wants to end a dead worker's account of its devices must know that it is dead: a request to kill returns before the
process ends, and a driver that resumes a job knows nothing of the workers of the last one. The lock ends with the process,
whatever kills it. It means something among processes that share the folder, as those of one host do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

from millijoule.workers.counter_book import shared_folder

_POLL_S = 0.05


def life_path(output_url: str, worker_id: str, folder: Path | None = None) -> Path:
    """Where the worker `worker_id` of the job in `output_url` holds its lock; `folder` as for `CounterBook`."""
    name = hashlib.sha256(f"{output_url}\0{worker_id}".encode()).hexdigest()[:24]
    return (folder or shared_folder()) / f"millijoule-{os.getuid()}-life-{name}"


class LifeLock:
    """Held from construction to the end of this process, or `release`.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file: int | None = os.open(path, flags, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """Let go and remove the file."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def is_gone(path: Path, timeout_s: float) -> bool | None:
    """Whether the process that held `path` has ended, waiting `timeout_s` for it; None: no such file, so it is not known.

    The file of a process that has ended is removed.
    """
    deadline = time.monotonic() + timeout_s
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
                continue
            path.unlink(missing_ok=True)
            return True
    finally:
        os.close(file)
