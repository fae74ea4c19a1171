"""Between the device's thread and what becomes of its images: parts of batches in order, bounded in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import NamedTuple

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.drawing import DeviceTime
from millijoule.workers.attempts.encoding import DrawnImage, EncodedPart, Encoders, parts_of
from millijoule.workers.drawing.isolate import AttemptCancelled

#: Between two looks of a waiting thread at whether it is still wanted.
LOOK_PERIOD_S = 0.2


class ByteBudget:
    """At most `limit_bytes` at once; a single piece that is larger passes while nothing else is there."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._changed = threading.Condition()

    def take(self, n_bytes: int, still_wanted: Callable[[], None]) -> None:
        """Wait until there is room for `n_bytes`; `still_wanted` is called meanwhile and may raise."""
        with self._changed:
            while self.used_bytes and self.used_bytes + n_bytes > self.limit_bytes:
                still_wanted()
                self._changed.wait(LOOK_PERIOD_S)
            self.used_bytes += n_bytes

    def give_back(self, n_bytes: int) -> None:
        with self._changed:
            self.used_bytes -= n_bytes
            self._changed.notify_all()


class _Cut(NamedTuple):
    device: DeviceTime
    stands: Callable[[], None]


class Handover:
    """Of one attempt: `begin` has it drawn on the device's thread, `parts` and `device_time` are for the thread that finishes it.

    Args:
        budget: of the worker, for pixels that are drawn and not written yet.

    Attributes:
        stretches: the device's time up to each place where what was drawn may be sealed; complete when the drawing has ended.
    """

    def __init__(self, attempt: Attempt, encoders: Encoders, budget: ByteBudget) -> None:
        self.attempt = attempt
        self._encoders = encoders
        self._budget = budget
        self.stretches: list[DeviceTime] = []
        self._parts: SimpleQueue[EncodedPart | _Cut | None] = SimpleQueue()  # None: no more come
        self._drawn: Future[DeviceTime] | None = None

    def begin(self, device: Executor, draw: Callable[[Handover], DeviceTime]) -> None:
        """Let `draw(self)` run on `device` once that is free."""
        self._drawn = device.submit(self._draw, draw)

    def _draw(self, draw: Callable[[Handover], DeviceTime]) -> DeviceTime:
        try:
            return draw(self)
        finally:
            self._parts.put(None)

    def put(self, batch: Sequence[DrawnImage]) -> None:
        """Hand over a batch; waits while too much lies here. Raises as `Attempt.check`."""
        for drawn in parts_of(batch):
            n_bytes = sum(d.image.nbytes for d in drawn if d.image is not None)
            self._budget.take(n_bytes, self.attempt.check)
            self._parts.put(EncodedPart(drawn, n_bytes, self._encoders.begin(drawn)))

    def seal(self, device: DeviceTime, stands: Callable[[], None]) -> None:
        """What was put so far may be sealed: the device's time up to here is `device`. `stands` is called when it was."""
        self.stretches.append(device)
        self._parts.put(_Cut(device, stands))

    def withdraw(self) -> bool:
        """Take the attempt back if its drawing has not begun; True where it had not."""
        assert self._drawn is not None
        if not self._drawn.cancel():
            return False
        self._parts.put(None)
        return True

    def parts(self) -> Generator[EncodedPart | DeviceTime, None, None]:
        """What was drawn, in order, and where it may be sealed, until no more comes; close it when done with it.

        Who asks for more has sealed what came, or written it.
        """
        while (part := self._parts.get()) is not None:
            if isinstance(part, _Cut):
                yield part.device
                part.stands()
                continue
            try:
                yield part
            finally:
                self._budget.give_back(part.n_bytes)
        self._parts.put(None)  # whoever asks again

    def device_time(self) -> DeviceTime:
        """The device's part, once all parts were taken.

        Raises:
            AttemptCancelled: it was withdrawn, or called off.
            Exception: what the drawing raised.
        """
        assert self._drawn is not None
        if self._drawn.cancelled():
            raise AttemptCancelled
        return self._drawn.result()

    def close(self) -> DeviceTime | None:
        """End the drawing, throw away what is still to come and wait for its end; the device's part, if it was drawn to its end."""
        assert self._drawn is not None
        self.attempt.abandon()
        self.withdraw()
        for _ in self.parts():
            pass
        failed = self._drawn.cancelled() or self._drawn.exception() is not None
        return None if failed else self._drawn.result()
