"""A thread that looks at something again and again: what a meter's reader and a power sampler have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable


class PeriodicThread(threading.Thread):
    """Calls `look` after every pause, until stopped. Its owner stops it; it does not keep a process alive.

    Args:
        look: must not raise.
        pause_s: how long to wait before the next look, asked before each.
        last_look: look once more when told to stop.
    """

    def __init__(
        self, name: str, look: Callable[[], None], pause_s: Callable[[], float], *, last_look: bool = False
    ) -> None:
        super().__init__(name=name, daemon=True)
        self._look = look
        self._pause_s = pause_s
        self._last_look = last_look
        self._told_to_stop = threading.Event()

    def run(self) -> None:
        while not self._told_to_stop.wait(self._pause_s()):
            self._look()
        if self._last_look:
            self._look()

    def stop(self, timeout_s: float) -> None:
        """End the thread, if it was started; after `timeout_s` a look in progress is left to itself."""
        self._told_to_stop.set()
        if self.ident is not None:
            self.join(timeout_s)
