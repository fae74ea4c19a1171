"""What the coordinator knows of a lease that is out, of a shard that made trouble, and of a row that waits to be heard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from millijoule.pipeline.running.bisection import Bisection
from millijoule.workers.lease import AttemptResult, Lease
from millijoule.workers.shard_rows import Shard


class Shards(Protocol):
    """Shards by id, such as `pipeline.planning.retry_rounds.JobShards`."""

    def __len__(self) -> int: ...
    def __getitem__(self, shard_id: int, /) -> Shard: ...


@dataclass
class ActiveLease:
    """A lease that is out, and when it was last known to be alive.

    Attributes:
        started: since when its worker can have been at it: when it was given, or for a lease ahead when the one before ended.
        images_at, images_step: when `images_done` last grew, and by how many.
        is_ahead: it waits for the device of a worker that has another lease, as far as is known.
    """

    lease: Lease
    started: float
    deadline: float
    images_done: int = 0
    images_at: float = 0.0
    images_step: int = 0
    steps: int = 0
    is_ahead: bool = False

    @property
    def shard_id(self) -> int:
        return self.lease.shard.shard_id


@dataclass
class Trouble:
    """What went wrong with one shard so far."""

    crashes: int = 0
    node_deaths: int = 0
    bisections: int = 0
    bisection: Bisection | None = None
    stood_still: bool = False  # so the last one ended
    quarantine: dict[int, str] = field(default_factory=dict)  # reasons by row
    empty_attempts: int = 0
    distrusted: set[str] = field(default_factory=set)  # workers whose word was void


@dataclass(frozen=True)
class Accusation:
    """A finished attempt whose commit waits for a second opinion on the rows that failed in it."""

    result: AttemptResult
    node_id: str
    since: float

    @property
    def worker_id(self) -> str:
        return self.result.lease.worker_id

    @property
    def shard_id(self) -> int:
        return self.result.lease.shard.shard_id
