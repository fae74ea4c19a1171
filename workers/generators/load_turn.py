"""Workers of one host load the same model one after another.

The first reads the weights from disk; they are mapped, so the others find them in memory and share its pages. Loading at once,
all would read, convert and build at the same time what takes the most memory of a worker's life.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from millijoule.workers.host_folder import HostFolder, locked

#: How long to wait for others that load the same model. A lock whose holder died is free; one that is held so long belongs to
#: a process that stands still, and then each loads alone.
LOAD_TIMEOUT_S = 600.0


@contextmanager
def load_turn(model: Path, folder: Path | None = None) -> Iterator[None]:
    """The time in which this process, alone on its host, loads `model`; `folder` as for `HostFolder`."""
    entry = HostFolder("loading", folder).entry(str(model.resolve()))
    with locked(entry, LOAD_TIMEOUT_S, "load the same model") if entry else nullcontext():
        yield
