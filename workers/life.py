"""A sign of life that the kernel takes back: a file a worker's process holds locked for as long as it lives.

Who wants to end a dead worker's account of its devices must know that it is dead: a request to kill returns before the
process ends, and a driver that resumes a job knows nothing of the workers of the last one. The lock ends with the process,
whatever kills it. It means something among processes that share the folder, as those of one host do.

The empty file stays: who has seen that a worker is gone may die before that is recorded, and the next one has to see it, too.
Files of the dead are removed when they are old.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from pathlib import Path

from millijoule.workers.meters.counter_book import shared_folder

#: Nobody resumes a job so much later and still reads the counters of its dead workers (`counter_split.MAX_GAP_NS` is less).
KEEP_S = 86_400.0

_POLL_S = 0.05


def life_path(output_url: str, worker_id: str, folder: Path | None = None) -> Path:
    """Where the worker `worker_id` of the job in `output_url` holds its lock; `folder` as for `CounterBook`."""
    name = hashlib.sha256(f"{output_url}\0{worker_id}".encode()).hexdigest()[:24]
    return (folder or shared_folder()) / f"millijoule-{os.getuid()}-life-{name}"


def hold_life_lock(path: Path) -> None:
    """Lock `path` from now to the end of this process.

    Raises:
        OSError: the folder cannot be written.
    """
    _remove_old(path.parent)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_gone(path: Path, timeout_s: float) -> bool | None:
    """Whether the process that held `path` has ended, waiting `timeout_s` for it; None: no such file, so it is not known."""
    deadline = time.monotonic() + timeout_s
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        while True:
            if _lock_now(file):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
    finally:
        os.close(file)


def _lock_now(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_old(folder: Path) -> None:
    """Remove files of processes that ended long ago."""
    for path in folder.glob(f"millijoule-{os.getuid()}-life-*"):
        try:
            if time.time() - path.stat().st_mtime < KEEP_S:
                continue
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # somebody else removes it, too
            continue
        try:
            if _lock_now(file):
                path.unlink(missing_ok=True)
        finally:
            os.close(file)
