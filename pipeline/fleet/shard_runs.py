"""Runs of consecutive shards that are kept for one worker: a lease of as many shards as its device makes in the time that a slow
one needs for one. They are handed out one by one; whoever has nothing else left takes the last shard of the longest run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class ShardRuns:
    """Kept shards by worker id. A shard is in one run at most; `kept` are all of them."""

    def __init__(self) -> None:
        self._runs: dict[str, deque[int]] = {}
        self.kept = 0

    def keep(self, worker_id: str, shard_ids: Iterable[int]) -> None:
        """Add to the end of a worker's run."""
        if new := list(shard_ids):
            self._runs.setdefault(worker_id, deque()).extend(new)
            self.kept += len(new)

    def first(self, worker_id: str) -> int | None:
        """What the worker is to do next."""
        run = self._runs.get(worker_id)
        return run[0] if run else None

    def last_of_longest(self) -> int | None:
        """The shard to take where a worker has nothing else to do: its own worker would come to it last."""
        return self._runs[self._longest()][-1] if self._runs else None

    def take(self, shard_id: int, worker_id: str) -> None:
        """Take `shard_id` out: as `first` named it for this worker, or `last_of_longest`."""
        run = self._runs.get(worker_id)
        if run and run[0] == shard_id:
            run.popleft()
        else:
            worker_id = self._longest()
            run = self._runs[worker_id]
            taken = run.pop()
            assert taken == shard_id, "a kept shard is taken as it was named"
        self.kept -= 1
        if not run:
            del self._runs[worker_id]

    def _longest(self) -> str:
        return max(self._runs, key=lambda worker_id: len(self._runs[worker_id]))
