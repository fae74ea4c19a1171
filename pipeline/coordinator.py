"""Who works on what: leases over the shards of a plan. A plain state machine without I/O, clocks or Ray.

State in: which shards are committed (read from storage), and what workers report. State out: leases. All of it can
be rebuilt from storage, so nothing here is saved; and since commits are exclusive, a wrong lease costs energy, never
correctness. Times are seconds on any monotonic clock the caller keeps to.
"""

from __future__ import annotations

import heapq
import statistics
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from millijoule.pipeline.bisection import Bisection
from millijoule.workers.lease import Lease
from millijoule.workers.shard_rows import Shard

#: After this many workers died on a shard, its rows are searched for the one that kills them.
CRASHES_BEFORE_BISECTION = 2

#: A shard whose workers keep dying although no single row kills one is given up after this many searches.
MAX_BISECTIONS = 2

#: A shard that fails without killing its worker is tried this often before it is given up.
MAX_FAILURES = 5

#: A second lease is given when the first has run this many times longer than the median shard ...
SPECULATION_FACTOR = 1.5

#: ... and at least this many seconds: shorter ones are not worth the energy.
SPECULATION_MIN_S = 5.0

#: Why a row that killed its workers stands quarantined.
POISON_REASON = "every worker that generated this row died"


class Shards(Protocol):
    """Shards by id, such as `pipeline.retry.JobShards`."""

    def __len__(self) -> int: ...
    def __getitem__(self, shard_id: int, /) -> Shard: ...


@dataclass
class ActiveLease:
    """A lease that is out, and when it was last known to be alive."""

    lease: Lease
    started: float
    deadline: float
    images_done: int = 0
    steps: int = 0


@dataclass
class _Trouble:
    """What went wrong with one shard so far."""

    crashes: int = 0
    failures: int = 0
    bisections: int = 0
    bisection: Bisection | None = None
    poison: tuple[int, ...] = ()
    last_error: str = ""


@dataclass
class Coordinator:
    """Hands out shards until all are committed.

    Args:
        shards: the plan's shards.
        committed: bool `[n_shards]`, True where a commit exists.
        lease_s: a lease without progress for this long is taken back.
        driver_epoch: becomes part of attempt ids, so that `gc` can tell old attempts from live ones.
        speculate: give second leases to stragglers when nothing else is left.
    """

    shards: Shards
    committed: np.ndarray
    lease_s: float
    driver_epoch: int
    speculate: bool = True
    active: dict[str, ActiveLease] = field(default_factory=dict)
    given_up: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cursor = 0  # every shard before it was leased at least once
        self._again: deque[int] = deque()  # shards to lease again, before new ones
        self._later: list[tuple[float, int]] = []  # heap of (not before, shard)
        self._probing: deque[int] = deque()  # shards whose bisection waits for a worker
        self._trouble: dict[int, _Trouble] = {}
        self._by_shard: dict[int, set[str]] = {}
        self._durations: deque[float] = deque(maxlen=256)
        self.leases_given = 0
        self.progress = 0  # grows with every commit and every narrowed search: the respawn budget's clock
        self.n_committed = int(self.committed.sum())

    @property
    def done(self) -> bool:
        """All shards are committed or given up."""
        return self.n_committed + len(self.given_up) == len(self.shards)

    @property
    def remaining(self) -> int:
        """Shards neither committed nor given up: an upper bound on useful workers."""
        return len(self.shards) - self.n_committed - len(self.given_up)

    def next_lease(self, worker_id: str, now: float) -> Lease | None:
        """The next lease for an idle worker, or None where there is nothing to do for it at present."""
        if self._probing:
            shard_id = self._probing.popleft()
            bisection = self._trouble[shard_id].bisection
            assert bisection is not None
            return self._grant(shard_id, worker_id, now, probe=bisection.next_range())
        while self._later and self._later[0][0] <= now:
            self._again.append(heapq.heappop(self._later)[1])
        while self._again:
            shard_id = self._again.popleft()
            if self._open(shard_id):
                return self._grant(shard_id, worker_id, now)
        while self._cursor < len(self.shards):
            shard_id = self._cursor
            self._cursor += 1
            if self._open(shard_id):
                return self._grant(shard_id, worker_id, now)
        return self._speculative(worker_id, now) if self.speculate else None

    def renew(self, attempt_id: str, images_done: int, steps: int, now: float) -> bool:
        """A worker answered: its lease lives on if it got further since, by images or by smaller steps."""
        entry = self.active.get(attempt_id)
        if entry is None or (images_done, steps) <= (entry.images_done, entry.steps):
            return False
        entry.images_done, entry.steps = images_done, steps
        entry.deadline = now + self.lease_s
        return True

    def complete(self, attempt_id: str, shard_id: int, now: float) -> bool:
        """Shard `shard_id` has a commit in storage, by this attempt or another. True where that is news."""
        entry = self._return(attempt_id)
        if entry is not None:
            self._durations.append(now - entry.started)
        if self.committed[shard_id]:
            return False
        self.committed[shard_id] = True
        self.n_committed += 1
        self.given_up.pop(shard_id, None)
        self.progress += 1
        return True

    def probed(self, attempt_id: str) -> None:
        """The rows of a probe survived."""
        self._end_probe(attempt_id, survived=True)

    def released(self, attempt_id: str) -> None:
        """The lease came back for no fault of its rows (preemption, shutdown)."""
        entry = self._return(attempt_id)
        if entry is None:
            return
        if entry.lease.probe_rows is not None:
            self._probing.append(entry.lease.shard.shard_id)
        else:
            self._again.append(entry.lease.shard.shard_id)

    def failed(self, attempt_id: str, error: str, not_before: float) -> None:
        """The attempt raised, its worker lives on. The shard comes again at `not_before`, `MAX_FAILURES` times."""
        entry = self._return(attempt_id)
        if entry is None:
            return
        shard_id = entry.lease.shard.shard_id
        if entry.lease.probe_rows is not None:
            self._probing.append(shard_id)
            return
        trouble = self._trouble.setdefault(shard_id, _Trouble())
        trouble.failures += 1
        if trouble.failures >= MAX_FAILURES:
            self._give_up(shard_id, error)
        else:
            heapq.heappush(self._later, (not_before, shard_id))

    def crashed(self, attempt_id: str, error: str) -> None:
        """The worker died, or was killed because it stood still, with this lease in hand."""
        entry = self.active.get(attempt_id)
        if entry is None:
            return
        if entry.lease.probe_rows is not None:
            self._end_probe(attempt_id, survived=False)
            return
        self._return(attempt_id)
        shard_id = entry.lease.shard.shard_id
        trouble = self._trouble.setdefault(shard_id, _Trouble())
        trouble.crashes += 1
        trouble.last_error = error
        if trouble.crashes < CRASHES_BEFORE_BISECTION:
            self._again.append(shard_id)
        elif trouble.bisection is not None:
            pass  # a straggling second lease died while the search is already on
        elif trouble.bisections >= MAX_BISECTIONS:
            self._give_up(shard_id, f"workers keep dying on it, though no single row kills one: {error}")
        else:
            trouble.bisections += 1
            trouble.bisection = Bisection(entry.lease.shard.n_rows)
            self._probing.append(shard_id)

    def expired(self, now: float) -> list[ActiveLease]:
        """Leases past their deadline. They stay active until reported; each is returned once per deadline."""
        late = [e for e in self.active.values() if e.deadline <= now]
        for entry in late:
            entry.deadline = now + self.lease_s
        return late

    def lease_again(self, attempt_id: str) -> None:
        """Let another worker have the shard too: this lease went quiet. The shard's commit will decide."""
        entry = self.active.get(attempt_id)
        if entry is not None and entry.lease.probe_rows is None:
            self._again.append(entry.lease.shard.shard_id)

    def _open(self, shard_id: int) -> bool:
        return not self.committed[shard_id] and shard_id not in self.given_up

    def _grant(
        self, shard_id: int, worker_id: str, now: float, probe: tuple[int, int] | None = None
    ) -> Lease:
        trouble = self._trouble.get(shard_id)
        poison = trouble.poison if trouble and probe is None else ()
        lease = Lease(
            shard=self.shards[shard_id],
            attempt_id=f"e{self.driver_epoch:04d}-{uuid.uuid4().hex[:12]}",
            worker_id=worker_id,
            probe_rows=probe,
            skip_rows=poison,
            skip_reason=POISON_REASON if poison else "",
        )
        self.active[lease.attempt_id] = ActiveLease(lease, now, now + self.lease_s)
        self._by_shard.setdefault(shard_id, set()).add(lease.attempt_id)
        self.leases_given += 1
        return lease

    def _speculative(self, worker_id: str, now: float) -> Lease | None:
        if not self._durations:
            return None
        patience = max(SPECULATION_MIN_S, SPECULATION_FACTOR * statistics.median(self._durations))
        slow = [
            e
            for e in self.active.values()
            if e.lease.probe_rows is None
            and e.lease.worker_id != worker_id
            and now - e.started > patience
            and len(self._by_shard[e.lease.shard.shard_id]) == 1
            and self._open(e.lease.shard.shard_id)
        ]
        if not slow:
            return None
        oldest = min(slow, key=lambda e: (e.started, e.lease.shard.shard_id))
        return self._grant(oldest.lease.shard.shard_id, worker_id, now)

    def _return(self, attempt_id: str) -> ActiveLease | None:
        entry = self.active.pop(attempt_id, None)
        if entry is not None:
            shard_id = entry.lease.shard.shard_id
            attempts = self._by_shard[shard_id]
            attempts.discard(attempt_id)
            if not attempts:
                del self._by_shard[shard_id]
        return entry

    def _end_probe(self, attempt_id: str, *, survived: bool) -> None:
        entry = self._return(attempt_id)
        if entry is None or entry.lease.probe_rows is None:
            return
        shard_id = entry.lease.shard.shard_id
        trouble = self._trouble[shard_id]
        if trouble.bisection is None:
            return
        trouble.bisection.report(entry.lease.probe_rows, survived)
        self.progress += 1
        if not trouble.bisection.done:
            self._probing.append(shard_id)
            return
        trouble.poison = tuple(sorted({*trouble.poison, *trouble.bisection.poison}))
        trouble.bisection = None
        trouble.crashes = CRASHES_BEFORE_BISECTION - 1  # one more death starts the next search
        self._again.append(shard_id)

    def _give_up(self, shard_id: int, error: str) -> None:
        self.given_up[shard_id] = error
