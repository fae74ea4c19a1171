"""Other runs of the same job, as a driver at work learns of them from storage.

A later run supersedes this one, which then stands down. An earlier one that this one has superseded may still commit what its
workers were just creating, and seal what they had finished as parts (`workers.attempts.parts`); both are found here, so that nobody
makes them again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from millijoule.pipeline.output.commits import list_committed
from millijoule.pipeline.output.job import Epoch, last_epoch
from millijoule.pipeline.output.parts import shards_in_parts
from millijoule.workers.errors import NotFoundError
from millijoule.workers.fence import is_superseded
from millijoule.workers.layout import epoch_key
from millijoule.workers.records import decode
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: Between two looks for a later run: what two runs do for the same shards meanwhile is waste. One request each.
LATER_PERIOD_S = 5.0
#: Between the first two looks for parts that an earlier run seals, of one listing each. It grows with every look, up to the most:
#: what lives of that run notices within seconds, unless it is cut off.
PARTS_PERIOD_FIRST_S, PARTS_PERIOD_MOST_S, PARTS_PERIOD_GROWTH = 5.0, 120.0, 1.5
#: Between two looks at what an earlier run has committed, besides ten times what a look takes.
COMMITS_PERIOD_S = 5.0


@dataclass(frozen=True)
class LaterRun:
    """A run that supersedes this one; `who` None: its record cannot be read."""

    epoch: int
    who: Epoch | None

    def __str__(self) -> str:
        return f"run {self.epoch}" + (f" ({self.who})" if self.who is not None else "")


class Submit(Protocol):
    """`RecordWriter.submit`."""

    def __call__(
        self, what: str, do: Callable[[], Any], then: Callable[[Any], None] = lambda result: None
    ) -> None: ...


class OtherRuns:
    """Looks in the writer's thread, while the loop turns.

    Args:
        epoch: of this run.
        submit: has something done in the thread that talks to storage.
        known: bool `[n_shards]`, True where this run knows of a commit; kept up to date by its owner.
        superseded: called once, in the loop, with the run that has taken over.
        found_commits: called, in the loop, with shards that others have committed.
        found_parts: called, in the loop, with shards that have sealed parts; None: nobody would take them over.
    """

    def __init__(
        self,
        store: Store,
        epoch: int,
        submit: Submit,
        known: np.ndarray,
        superseded: Callable[[LaterRun], None],
        found_commits: Callable[[Sequence[int]], None],
        found_parts: Callable[[frozenset[int]], None] | None,
    ) -> None:
        self._store = store
        self._epoch = epoch
        self._submit = submit
        self._known = known
        self._superseded = superseded
        self._found_commits = found_commits
        self._found_parts = found_parts if epoch > 1 else None
        self.later: LaterRun | None = None
        self._looks = False
        self._next_look = 0.0
        self._parts_period_s = PARTS_PERIOD_FIRST_S
        self._next_parts: float | None = None  # before the first tick, and while an answer is out
        self._now: float | None = None
        self._warned = False
        self._commits_not_before = 0.0

    def tick(self, now: float) -> None:
        """Look, if it is time; `now` are monotonic seconds."""
        if self.later is not None:
            return
        if self._now is None:
            self._next_parts = now + self._parts_period_s
        self._now = now
        if now >= self._next_look:
            self.look()
        if self._found_parts is not None and self._next_parts is not None and now >= self._next_parts:
            self._next_parts = None
            committed = self._known.copy()
            self._submit(
                "looking for parts of earlier runs",
                lambda: frozenset(shards_in_parts(self._store, committed)),
                self._parts,
            )

    def look(self) -> None:
        """Look for a later run as soon as the writer can: there is a sign of one."""
        if not self._looks:
            self._looks = True
            self._submit("looking for a later run", self._find, self._found)

    def committed(self, epoch: int, now: float) -> None:
        """A shard turned out to be committed by the run `epoch`: look up what else is, instead of doing it again."""
        if epoch > self._epoch:
            self.look()
        elif not self._warned:
            self._warned = True
            log.warning(
                "a worker of an earlier run (%d; this is %d) still committed to %s; that wastes energy but does no harm",
                *(epoch, self._epoch, self._store.url),
            )
        if now < self._commits_not_before:
            return
        self._commits_not_before = math.inf  # while it looks

        def listed(answer: tuple[np.ndarray, float]) -> None:
            committed, took_s = answer
            self._commits_not_before = now + 11 * took_s + COMMITS_PERIOD_S
            self._found_commits((committed & ~self._known).nonzero()[0].tolist())

        def list_them() -> tuple[np.ndarray, float]:
            began = time.perf_counter()
            return list_committed(self._store, len(self._known)), time.perf_counter() - began

        self._submit("listing commits", list_them, listed)

    def look_at_once(self) -> None:
        """The same, waiting for storage.

        Raises:
            StoreError: storage failed.
        """
        self._found(self._find())

    def _find(self) -> LaterRun | None:
        if not is_superseded(self._store, self._epoch):
            return None
        epoch = last_epoch(self._store)
        try:
            return LaterRun(epoch, decode(Epoch, self._store.get(epoch_key(epoch))))
        except (NotFoundError, ValueError):
            return LaterRun(epoch, None)

    def _found(self, later: LaterRun | None) -> None:
        self._looks = False
        self._next_look = (self._now or 0.0) + LATER_PERIOD_S
        if later is not None and self.later is None:
            self.later = later
            self._superseded(later)

    def _parts(self, shards: frozenset[int]) -> None:
        self._parts_period_s = min(PARTS_PERIOD_MOST_S, self._parts_period_s * PARTS_PERIOD_GROWTH)
        self._next_parts = (self._now or 0.0) + self._parts_period_s
        if self._found_parts is not None and shards:
            self._found_parts(shards)
