"""One lease at work in a worker: how far it got, and whether it is to go on. Read and told from any thread."""

from __future__ import annotations

import threading

from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.lease import AttemptProgress, Lease


class Abandoned(Exception):
    """Nobody takes this attempt's images any more: what was to become of them has failed."""


class Attempt:
    """The progress of one lease.

    Attributes:
        images_done: images that are drawn, or given up; grows between batches.
        steps: grows whenever the attempt got further in any stage, which keeps its lease; stands while nothing moves.
        waits: it has all it needs but the device, which draws another attempt of this worker.
        has_begun: the device has come to it.
        leaves: its worker is about to end: after the batch that is drawn no more are, and what there is is sealed.
    """

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.images_done = self.steps = 0
        self.waits = self.has_begun = False
        self._lock = threading.Lock()
        self._cancelled = self._abandoned = False
        self.leaves = False

    @property
    def progress(self) -> AttemptProgress:
        return AttemptProgress(
            self.lease.attempt_id, self.images_done, self.steps, self.waits, self.has_begun
        )

    def begin(self) -> None:
        """The device has come to it."""
        self.waits, self.has_begun = False, True

    def step(self) -> None:
        """It got further."""
        with self._lock:
            self.steps += 1

    def cancel(self) -> None:
        """Call it off: another has won the shard, the job is over, or another worker can begin with it at once."""
        self._cancelled = True

    def abandon(self) -> None:
        """End the drawing: what becomes of the images has failed."""
        self._abandoned = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def check(self) -> None:
        """Asked in every stage between two pieces of work, and between the steps of a generator that reports them.

        Raises:
            AttemptCancelled: it was called off.
            Abandoned: see there.
        """
        if self._cancelled:
            raise AttemptCancelled
        if self._abandoned:
            raise Abandoned
