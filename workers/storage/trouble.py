"""When storage last failed this process: what tells a worker that waits for storage from one that stands still."""

from __future__ import annotations

import time

#: A request is repeated at least this often while storage fails: a time-out and the longest pause, and some air.
QUIET_S = 45.0

_last_failure = float("-inf")


def note_failure() -> None:
    """A request failed in a way that may pass, and will be repeated."""
    global _last_failure
    _last_failure = time.monotonic()


def waits_for_store() -> bool:
    """Whether a request of this process failed a moment ago."""
    return time.monotonic() - _last_failure < QUIET_S
