"""The one thread of a running driver that talks to storage, so that the loop over the workers never waits for it.

Works are done one after the other, and repeated while storage fails; what follows from a result is called in the loop's
own thread, by `settle`. The queue is short: who has something to write that can wait asks `has_room` first and keeps it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from millijoule.workers.errors import DamagedError, StoreError
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: Works that may wait before `has_room` says no. Commits that only the driver can write come on top: one per worker.
MAX_WAITING = 64
#: First pause before a work is repeated; doubles up to the most.
BACKOFF_FIRST_S = 0.5
BACKOFF_MOST_S = 30.0
#: Waiting for storage is said after this long, and again that often.
NOTICE_PERIOD_S = 30.0
#: Storage that refuses (no permission, disk full), instead of being away, is waited for no longer than this.
REFUSED_FOR_S = 60.0


class _Work(NamedTuple):
    what: str
    do: Callable[[], Any]
    then: Callable[[Any], None]


class RecordWriter:
    """Starts with the first work; `close` joins it."""

    def __init__(self) -> None:
        self._works: deque[_Work] = deque()  # the first one stays in it until it is done
        self._results: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._failing: tuple[float, StoreError] | None = None  # since when, how
        self._error: BaseException | None = None

    @property
    def has_room(self) -> bool:
        """Whether another work that can wait should come now."""
        return len(self._works) < MAX_WAITING

    @property
    def idle(self) -> bool:
        """Whether nothing waits, neither to be done nor to be settled."""
        return not self._works and not self._results

    @property
    def waits_for_storage(self) -> bool:
        return self._failing is not None

    def submit(
        self, what: str, do: Callable[[], Any], then: Callable[[Any], None] = lambda result: None
    ) -> None:
        """Have `do` done in the thread, and `then` called with its result by `settle`. `what` names it in messages."""
        with self._changed:
            self._works.append(_Work(what, do, then))
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="record-writer", daemon=True)
            self._thread.start()

    def settle(self) -> None:
        """Call what follows from the works done since.

        Raises:
            DamagedError: an object of the job is not what was written.
            StoreError: storage has refused for so long that a person has to act.
            Exception: a defect in a work.
        """
        while self._results:
            then, value = self._results.popleft()
            then(value)
        if self._error is not None:
            raise self._error
        since, failing = self._failing or (0.0, None)
        if failing and not failing.transient and time.monotonic() - since > REFUSED_FOR_S:
            raise failing

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until everything is written, and end the thread.

        Args:
            timeout_s: give up after this long. None: wait as long as storage may come back.

        Raises:
            StoreError: storage refuses for good, or the time is up; what was to be written is not.
        """
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        while not self.idle:
            self.settle()
            refused = self._failing is not None and not self._failing[1].transient
            if refused or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None and self._failing is None:
            self._thread.join(timeout_s)
        self.settle()
        if self._works:
            reason = f": {self._failing[1]}" if self._failing else ""
            raise StoreError(
                f"{len(self._works)} records of this run could not be written{reason}. What is committed is safe: mend the "
                "cause and run the same command again to go on"
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._works or self._closed)
                if not self._works:
                    return
                work = self._works[0]
            try:
                value = self._patiently(work)
            except BaseException as error:
                self._error = error
                return
            if self._closed and self._failing is not None:
                return
            self._results.append((work.then, value))
            with self._changed:
                self._works.popleft()

    def _patiently(self, work: _Work) -> Any:
        """Do it, again and again while storage fails; None once the writer is closed and gives up."""
        pause, said = BACKOFF_FIRST_S, time.monotonic()
        while True:
            try:
                value = work.do()
            except DamagedError:
                raise
            except StoreError as error:
                now = time.monotonic()
                since = self._failing[0] if self._failing else now
                self._failing = since, error
                if now - said >= NOTICE_PERIOD_S or since == now:
                    said = now
                    log.warning("waiting for storage (%s): %s", work.what, error)
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, pause):
                        return None
                pause = min(BACKOFF_MOST_S, 2 * pause)
            else:
                self._failing = None
                return value


class QueuedWrites:
    """What writes of a store, through a `RecordWriter`: `put` returns at once.

    For records whose reader comes later. What cannot wait for memory asks `RecordWriter.has_room` first.
    """

    def __init__(self, store: Store, writer: RecordWriter) -> None:
        self._store = store
        self._writer = writer

    def put(self, key: str, data: bytes) -> None:
        """As `Store.put`, later."""
        self._writer.submit(f"writing {key}", lambda: self._store.put(key, data))
