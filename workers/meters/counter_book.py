"""One small file per host boot in which all workers of a user keep their energy counters.

Counters are not as absolute as they look: RAPL wraps every few minutes, so two processes that started at different
times unwrap it to different totals; and polling the GPU counter too often is reported to corrupt it, whoever polls.
So every read of every worker goes through this book, under an exclusive file lock: totals continue where the last
reader left them, in one order and on one scale for the whole host, and a counter reset is one new epoch for all.
Containers that do not share the file have books of their own, and unwrap to other totals: a book has a number, and totals of
wrapping counters are on the scale of book and epoch.

The file is small, lives in shared memory where there is one, and may be lost at any time: the next reader begins a
new one and what cannot be compared across the loss is reported as missing by the ledger.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from millijoule.workers.records import decode, encode
from millijoule.workers.schemas import BOOK_EPOCHS, BOOK_NUMBERS

log = logging.getLogger(__name__)

#: How long to wait for another worker that is reading. A healthy read takes milliseconds; a worker whose driver
#: hangs must not stop the others, who then report the counters as missing.
LOCK_TIMEOUT_S = 2.0
_LOCK_POLL_S = 0.002

#: A counter that grows faster than this (watts, averaged since `POWER_SLACK_S` before the last read) was reset,
#: replaced or misread. No board or package draws half as much today.
MAX_DOMAIN_WATTS = 5_000
POWER_SLACK_S = 10


def is_plausible(increase_mj: int, elapsed_ns: int) -> bool:
    """Whether one device can have used `increase_mj` in `elapsed_ns`."""
    return 0 <= increase_mj * 1_000_000 <= MAX_DOMAIN_WATTS * (elapsed_ns + POWER_SLACK_S * 1_000_000_000)


@dataclass
class BookedCounter:
    """What was last seen of one domain; times are CLOCK_MONOTONIC nanoseconds.

    `raw` is the device's own reading, `total` the unwrapped counter, both in the device's unit. The device said that
    what was read at `t_read_ns` was then `age_ns` old.
    """

    raw: int
    total: int
    t_read_ns: int
    t_changed_ns: int
    age_ns: int = 0


@dataclass
class BookedState:
    """All counters of a host. `epoch` grows by one whenever any of them was reset.

    `book` is the number of the book, drawn when it was begun. `failed_ns` has the domains whose last reading failed, and when; `power_ns` when each GPU's power was last
    sampled, by UUID.
    """

    epoch: int = 0
    counters: dict[str, BookedCounter] = field(default_factory=dict)
    failed_ns: dict[str, int] = field(default_factory=dict)
    power_ns: dict[str, int] = field(default_factory=dict)
    book: int = field(default_factory=lambda: 1 + secrets.randbelow(BOOK_NUMBERS - 1))

    @property
    def wrap_epoch(self) -> int:
        """The scale of counters that wrap, see `CounterRead`; fits 32 bits."""
        return self.book * BOOK_EPOCHS + self.epoch % BOOK_EPOCHS

    def last_try_ns(self, domain: str) -> int:
        """When anybody last read the counter of `domain`, with or without success; -1: never."""
        booked = self.counters.get(domain)
        return max(booked.t_read_ns if booked else -1, self.failed_ns.get(domain, -1))

    def has_settled(self, domain: str, since_ns: int) -> bool:
        """Whether after the reading at `since_ns` the counter of `domain` was seen to move, or failed then or later."""
        booked = self.counters.get(domain)
        return (booked is not None and booked.t_changed_ns > since_ns) or self.failed_ns.get(
            domain, -1
        ) >= since_ns

    def is_fresh(self, domain: str, now_ns: int, spacing_ns: int) -> bool:
        """Whether `domain` was read, or tried, less than `spacing_ns` ago."""
        return 0 <= now_ns - self.last_try_ns(domain) < spacing_ns


def shared_folder() -> Path:
    """Where processes of one host meet: shared memory, else the temporary folder."""
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


class CounterBook:
    """Access to the state of boot `boot_id`, in a file of `directory` (default `shared_folder`).

    Falls back to a private state where no file can be shared.
    """

    def __init__(self, boot_id: str, directory: Path | None = None) -> None:
        self.path = (directory or shared_folder()) / f"millijoule-{os.getuid()}-{boot_id}.json"
        self._state = BookedState()
        self._stored = b""  # what the file held when we locked it
        self._file: int | None = None
        try:
            self._file = self._open()
        except OSError as error:
            log.warning("%s: %s; workers of this host cannot share their energy counters", self.path, error)

    @contextmanager
    def locked(self) -> Iterator[BookedState | None]:
        """The state, to be read and changed by the `with` block; None where another reader holds it too long."""
        if self._file is None:
            yield self._state
            return
        if not self._lock():
            yield None
            return
        try:
            self._load()
            yield self._state
            try:
                self._save()
            except OSError as error:  # a full disk costs an epoch, not a job
                log.warning("%s: cannot be written (%s)", self.path, error)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; the state stays for other workers."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        info = os.fstat(file)
        if info.st_uid != os.getuid() or not stat.S_ISREG(info.st_mode):
            os.close(file)
            raise PermissionError("belongs to somebody else")
        return file

    def _lock(self) -> bool:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            assert self._file is not None
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOCK_POLL_S)
                continue
            if os.fstat(self._file).st_nlink:
                return True
            try:  # somebody removed the file: meet the others at its successor
                successor = self._open()
            except OSError:
                return True
            os.close(self._file)
            self._file = successor

    def _load(self) -> None:
        assert self._file is not None
        data = self._stored = os.pread(self._file, 1 << 20, 0)
        if not data:
            return  # a new file: continue with what we know
        mine = self._state
        try:
            self._state = decode(BookedState, data)
            self._state.epoch = max(self._state.epoch, mine.epoch)
        except ValueError as error:  # its writer was killed half-way
            log.warning("%s: not readable (%s), starting a new epoch", self.path, error)
            self._state = BookedState(mine.epoch + 1, mine.counters, book=mine.book)

    def _save(self) -> None:
        assert self._file is not None
        data = encode(self._state)
        if data == self._stored:
            return
        os.pwrite(self._file, data, 0)
        if len(data) < len(self._stored):
            os.ftruncate(self._file, len(data))
