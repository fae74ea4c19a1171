"""Ending an actor's process whose raylet is gone.

A raylet that is killed leaves its workers running; they cannot do harm (commits are exclusive) but they burn energy
for images nobody will take.
"""

from __future__ import annotations

import os
import threading
import time

#: How often an actor looks whether its raylet is still there.
ORPHAN_CHECK_S = 2.0


def exit_with_parent() -> None:
    """From now on end this process at once when its parent ends."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="orphan-watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ORPHAN_CHECK_S)
    os._exit(1)
