"""Who works on what: leases over the shards of a plan. A plain state machine without I/O, clocks or Ray.

State in: which shards are committed (read from storage), and what workers report. State out: leases. All of it can
be rebuilt from storage, so nothing here is saved; and since commits are exclusive, a wrong lease costs energy, never
correctness. Times are seconds on any monotonic clock the caller keeps to.
"""

from __future__ import annotations

import heapq
import statistics
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from millijoule.pipeline.fleet.shard_runs import ShardRuns
from millijoule.pipeline.running.bisection import Bisection
from millijoule.pipeline.running.lease_state import Accusation, ActiveLease, Shards, Trouble
from millijoule.workers.lease import AttemptProgress, AttemptResult, Lease

#: After this many workers died on a shard, its rows are searched for the one that kills them.
CRASHES_BEFORE_BISECTION = 2
#: Where workers keep dying on a shard although no single row kills one, its rows are quarantined after this many searches.
MAX_BISECTIONS = 2
#: A node that dies takes its lease along for no fault of the rows, unless this many nodes died with the same shard.
NODE_DEATHS_BEFORE_BLAME = 3
#: A shard whose rows are all quarantined needs no model; a worker that dies even on that is tried again this often.
MAX_EMPTY_ATTEMPTS = 5
#: How long a row that failed waits for a second worker before the one that accused it may be asked again.
SECOND_OPINION_PATIENCE_S = 30.0
#: A second lease is given when the first has run this many times longer than the median shard ...
SPECULATION_FACTOR = 1.5
#: ... and at least this many seconds: shorter ones are not worth the energy.
SPECULATION_MIN_S = 5.0
#: So many shards, evenly spaced, tell how many images one has.
SAMPLED_SHARDS = 16
#: Why a row that killed its workers stands quarantined.
POISON_REASON = "every worker that generated this row died"
HANG_REASON = "every worker that generated this row stood still, longer than --lease-seconds, and was ended"


@dataclass
class Coordinator:
    """Hands out shards until all are committed.

    Args:
        committed: bool `[n_shards]`, True where a commit exists.
        lease_s: a lease without progress for this long is taken back.
        driver_epoch: becomes part of attempt ids, so that `gc` can tell old attempts from live ones.
        in_parts: shards of which earlier runs have sealed parts.
        speculate: give second leases to stragglers when nothing else is left.
        run_length: how many consecutive shards are kept for a worker (by id) when it takes a new one, that one included.
        expected_s: how long a worker takes for a shard; None: as all of them did.
        at_most_s: how long a worker may draw for one lease, given ahead or not; None: until its shard is made.
    """

    shards: Shards
    committed: np.ndarray
    lease_s: float
    driver_epoch: int
    speculate: bool = True
    in_parts: frozenset[int] = frozenset()
    run_length: Callable[[str], int] = lambda worker_id: 1
    expected_s: Callable[[str], float | None] = lambda worker_id: None
    at_most_s: Callable[[str, bool], float | None] = lambda worker_id, is_ahead: None
    active: dict[str, ActiveLease] = field(default_factory=dict)
    given_up: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._leased = np.zeros(len(self.shards), bool)  # at least once, to be made
        self._cursor = 0  # every shard before it was leased at least once
        self._runs = ShardRuns()  # shards below the cursor that are kept for one worker
        self._again: dict[int, None] = {}  # shards to lease again, before new ones; each once, in order
        self._later: list[tuple[float, int]] = []  # heap of (not before, shard)
        self._probing: deque[int] = deque()  # shards whose bisection waits for a worker
        self._accused: list[Accusation] = []  # that wait for a second worker
        self._hearings: dict[str, Accusation] = {}  # by the attempt id of the lease that confirms them
        self._void: list[Accusation] = []  # whose attempts are to be discarded
        self._trouble: defaultdict[int, Trouble] = defaultdict(Trouble)
        self._durations: deque[float] = deque(maxlen=256)
        #: worker id, images, when it began and ended: of shards made since somebody last took these out
        self.made: deque[tuple[str, int, float, float]] = deque(maxlen=256)
        self._ahead: dict[str, str] = {}  # attempt id of the lease that a worker holds ahead, by worker id
        self._leases_of: dict[int, list[str]] = {}  # attempt ids of the leases that are out, by shard
        self._none_expires_before = 0.0
        self._sealed: dict[
            int, int
        ] = {}  # images of pieces that were given back, by shard that is not committed
        self.images_sealed = 0  # all of them
        self.images_out = self.images_ahead = (
            0  # of leases that are no probes; those ahead are among the first
        )
        self.progress = 0  # grows with every commit and every narrowed search: the respawn budget's clock
        self.n_committed = int(self.committed.sum())

    @property
    def done(self) -> bool:
        """All shards are committed or given up."""
        return self.remaining == 0

    @property
    def remaining(self) -> int:
        """Shards neither committed nor given up."""
        return len(self.shards) - self.n_committed - len(self.given_up)

    @cached_property
    def images_per_shard(self) -> float:
        """The mean of a few shards, evenly spaced; at least 1."""
        sample = range(0, len(self.shards), -(-len(self.shards) // SAMPLED_SHARDS) or 1)
        return max(1.0, sum(self.shards[i].n_images for i in sample) / max(1, len(sample)))

    @property
    def useful_workers(self) -> int:
        """An upper bound on useful workers: one per shard, and a second one where a row waits for it."""
        return self.remaining + (1 if self._accused else 0)

    @property
    def at_work(self) -> int:
        """Leases that are out, those ahead not counted."""
        return len(self.active) - len(self._ahead)

    @property
    def n_ahead(self) -> int:
        """Leases that are out and that nobody has come to."""
        return len(self._ahead)

    @property
    def unleased(self) -> int:
        """At most so many shards are left that could be leased as they are."""
        waiting = len(self._again) + self._runs.kept + len(self.shards) - self._cursor
        return min(self.remaining - len(self.active), waiting)

    @property
    def has_questions(self) -> bool:
        """Whether a lease that asks about rows waits for a worker."""
        return bool(self._probing or self._accused)

    @property
    def images_waiting(self) -> int:
        """Of pieces that are sealed, in shards that wait for somebody to make the rest."""
        return sum(self._sealed.get(shard_id, 0) for shard_id in self._again) if self._sealed else 0

    def leases_of(self, shard_id: int) -> list[Lease]:
        """Those that are out on one shard."""
        return [self.active[attempt_id].lease for attempt_id in self._leases_of.get(shard_id, ())]

    def next_lease(
        self, worker_id: str, now: float, peers: Mapping[str, str] | None = None, *, alone: bool = False
    ) -> Lease | None:
        """The next lease for an idle worker, or None where there is nothing to do for it at present.

        Args:
            peers: node id of every worker that can be leased to, idle or not, `worker_id` included.
            alone: no second worker can come: the only one may confirm its own failures at once.
        """
        if self._probing:
            shard_id = self._probing.popleft()
            bisection = self._trouble[shard_id].bisection
            assert bisection is not None
            return self._grant(shard_id, worker_id, now, probe_rows=bisection.next_range())
        if lease := self._hearing(worker_id, now, peers or {worker_id: ""}, alone=alone):
            return lease
        while self._later and self._later[0][0] <= now:
            self._again[heapq.heappop(self._later)[1]] = None
        while (waiting := self._next_shard(worker_id)) is not None:
            self._take_shard(waiting, worker_id)
            if self._open(waiting):
                return self._grant(waiting, worker_id, now)
        return self._speculative(worker_id, now) if self.speculate else None

    def next_lease_ahead(self, in_hand: Lease, now: float, workers: int) -> Lease | None:
        """One more shard for a worker that has `in_hand`, to begin with when its device is free; None where it is to have none.

        That is where one of all `workers` could have to wait for it, where a question waits for a worker, which is asked only
        of one that has nothing in hand, and beside a shard that made trouble: should the worker die, it must be known of what.
        """
        if self.has_questions or self.unleased < workers:
            return None
        if not in_hand.writes or in_hand.shard.shard_id in self._trouble or in_hand.worker_id in self._ahead:
            return None
        while (shard_id := self._next_shard(in_hand.worker_id)) is not None:
            if shard_id in self._trouble:
                return None
            self._take_shard(shard_id, in_hand.worker_id)
            if self._open(shard_id):
                lease = self._grant(shard_id, in_hand.worker_id, now, ahead=True)
                self.active[lease.attempt_id].is_ahead = True
                self.images_ahead += lease.shard.n_images
                self._ahead[lease.worker_id] = lease.attempt_id
                return lease
        return None

    def _next_shard(self, worker_id: str) -> int | None:
        """The shard that is next for a worker: one to be leased again, one of its own run, a new one, one of another's run."""
        if self._again:
            return next(iter(self._again))
        if (shard_id := self._runs.first(worker_id)) is not None:
            return shard_id
        return self._cursor if self._cursor < len(self.shards) else self._runs.last_of_longest()

    def _take_shard(self, shard_id: int, worker_id: str) -> None:
        """Take what `_next_shard` named from where it waits; after a new one its worker may keep those that follow."""
        if shard_id in self._again:
            del self._again[shard_id]
        elif shard_id < self._cursor:
            self._runs.take(shard_id, worker_id)
        else:
            end = min(self._cursor + self.run_length(worker_id), len(self.shards))
            self._runs.keep(worker_id, range(self._cursor + 1, end))
            self._cursor = max(end, self._cursor + 1)

    def renew(self, progress: AttemptProgress, now: float, *, waits_for_store: bool = False) -> bool:
        """A worker answered: a lease lives on if it got further since, by images or by smaller steps, or waits for storage or
        for its worker's device: then it is for the lease that is drawn to get on."""
        entry = self.active.get(progress.attempt_id)
        if entry is None:
            return False
        if progress.has_begun:
            self._begun(entry, now)
        done = progress.images_done, progress.steps
        if done <= (entry.images_done, entry.steps) and not waits_for_store and not progress.waits:
            return False
        if progress.images_done > entry.images_done:
            entry.images_step, entry.images_at = progress.images_done - entry.images_done, now
        entry.images_done, entry.steps = done
        entry.deadline = now + self.lease_s
        return True

    def _begun(self, entry: ActiveLease, now: float | None) -> None:
        """A lease is ahead no longer: its worker has come to it."""
        if not entry.is_ahead:
            return
        entry.is_ahead = False
        self.images_ahead -= entry.lease.shard.n_images
        del self._ahead[entry.lease.worker_id]
        if now is not None:
            entry.started = now

    def _end(self, attempt_id: str, now: float | None = None) -> ActiveLease | None:
        """Take a lease that is out back in; None where it was not out. The one that its worker holds ahead is next there."""
        entry = self.active.pop(attempt_id, None)
        if entry is None:
            return None
        of_shard = self._leases_of[entry.shard_id]
        of_shard.remove(attempt_id)
        if not of_shard:
            del self._leases_of[entry.shard_id]
        if entry.lease.probe_rows is None:
            self.images_out -= entry.lease.shard.n_images
        ahead = self.active.get(self._ahead.get(entry.lease.worker_id, ""))
        if entry.is_ahead:
            self.images_ahead -= entry.lease.shard.n_images
            del self._ahead[entry.lease.worker_id]
        elif ahead is not None:
            self._begun(ahead, now)
        return entry

    def complete(self, attempt_id: str, shard_id: int, now: float) -> bool:
        """Shard `shard_id` has a commit in storage, by this attempt or another. True where that is news."""
        entry = self._end(attempt_id, now)
        if entry is not None:
            self._durations.append(now - entry.started)
            if not entry.lease.resumes:  # else others had made parts of it
                self.made.append((entry.lease.worker_id, entry.lease.shard.n_images, entry.started, now))
        if self.committed[shard_id]:
            return False
        self.committed[shard_id] = True
        self.n_committed += 1
        self.given_up.pop(shard_id, None)
        self._again.pop(shard_id, None)
        self.images_sealed -= self._sealed.pop(shard_id, 0)
        self.progress += 1
        return True

    # -- rows that fail ------------------------------------------------------------------------------------------

    def suspected(self, result: AttemptResult, node_id: str, now: float) -> None:
        """The attempt is finished but for rows that failed: they are to be tried by another worker, elsewhere if there is one."""
        self._end(result.lease.attempt_id, now)
        if not self.committed[result.lease.shard.shard_id]:
            self._accused.append(Accusation(result, node_id, now))

    def confirmed(self, attempt_id: str) -> AttemptResult | None:
        """The suspects failed again: the waiting attempt's commit may stand. None where there is no such question."""
        self._end(attempt_id)
        if accusation := self._hearings.pop(attempt_id, None):
            self.progress += 1
            return accusation.result
        return None

    def contradicted(self, attempt_id: str) -> Accusation | None:
        """A suspect was drawn: the accuser's attempt is void, and its shard is leased again."""
        self._end(attempt_id)
        if accusation := self._hearings.pop(attempt_id, None):
            self._trouble[accusation.shard_id].distrusted.add(accusation.worker_id)
            self._make_void(accusation)
        return accusation

    def _make_void(self, accusation: Accusation) -> None:
        self._void.append(accusation)
        self._lease_again_soon(accusation.shard_id)

    def take_void(self, *, all_waiting: bool = False) -> list[AttemptResult]:
        """Attempts that will never be committed, each once: contradicted ones, and those whose shard another has committed.

        With `all_waiting` also those that still wait for a second opinion: the run ends.
        """
        void, self._void = self._void, []
        void += [a for a in self._accused if all_waiting or not self._open(a.shard_id)]
        self._accused = [a for a in self._accused if a not in void]
        if all_waiting:
            void += self._hearings.values()
            self._hearings.clear()
        return [a.result for a in void]

    def _hearing(self, worker_id: str, now: float, peers: Mapping[str, str], *, alone: bool) -> Lease | None:
        """A lease to confirm rows that failed elsewhere, if this worker is the best judge there is."""
        for accusation in self._accused:
            if not self._open(accusation.shard_id):
                continue  # void: another attempt is committed
            waited = alone or now - accusation.since >= SECOND_OPINION_PATIENCE_S
            # best is a worker of another node, then another worker, then the accuser itself
            ranks = {
                peer: (peer != accusation.worker_id, node != accusation.node_id)
                for peer, node in peers.items()
            }
            if ranks[worker_id] < max(ranks.values()) or (worker_id == accusation.worker_id and not waited):
                continue
            self._accused.remove(accusation)
            result = accusation.result
            lease = self._grant(
                accusation.shard_id, worker_id, now, confirm=result.suspects, healthy=result.healthy
            )
            self._hearings[lease.attempt_id] = accusation
            return lease
        return None

    # -- leases that come back -----------------------------------------------------------------------------------

    def probed(self, attempt_id: str, *, survived: bool = True) -> None:
        """The rows of a probe survived, or did not."""
        entry = self._end(attempt_id)
        if entry is None:
            return
        shard_id, rows = entry.shard_id, entry.lease.probe_rows
        trouble = self._trouble[shard_id]
        bisection = trouble.bisection
        assert rows is not None
        assert bisection is not None
        bisection.report(rows, survived)
        self.progress += 1
        if not bisection.done:
            self._probing.append(shard_id)
            return
        reason = HANG_REASON if trouble.stood_still else POISON_REASON
        trouble.quarantine.update(dict.fromkeys(bisection.poison, reason))
        trouble.bisection = None
        trouble.crashes = CRASHES_BEFORE_BISECTION - 1  # one more death starts the next search
        self._lease_again_soon(shard_id)

    def sealed(self, shard_id: int, images: int) -> None:
        """So many more images of a shard are made, in parts that its next attempt takes over."""
        if self._open(shard_id):
            self._sealed[shard_id] = self._sealed.get(shard_id, 0) + images
            self.images_sealed += images

    def released(self, attempt_id: str, not_before: float | None = None) -> None:
        """The lease came back for no fault of its rows: preemption, shutdown, a node's or the store's trouble.

        With `not_before` the shard is not leased again until then.
        """
        entry = self._end(attempt_id)
        if entry is None:
            return
        shard_id = entry.shard_id
        if entry.lease.probe_rows is not None:
            self._probing.append(shard_id)
        elif accusation := self._hearings.pop(attempt_id, None):
            self._accused.append(accusation)
        elif not_before is not None:
            heapq.heappush(self._later, (not_before, shard_id))
        else:
            self._lease_again_soon(shard_id)

    def node_died(self, attempt_id: str, error: str) -> None:
        """The node died with this lease in hand: its own fault, unless shards make a habit of it."""
        entry = self.active.get(attempt_id)
        if entry is None:
            return
        trouble = self._trouble[entry.shard_id]
        trouble.node_deaths += 1
        if trouble.node_deaths < NODE_DEATHS_BEFORE_BLAME:
            self.released(attempt_id)
        else:
            self.crashed(attempt_id, error)

    def crashed(self, attempt_id: str, error: str, *, stood_still: bool = False) -> None:
        """The worker died, or was killed because it stood still, with this lease in hand.

        Where it had two, nobody knows which it was; both count, and from then on neither is leased beside another.
        """
        entry = self.active.get(attempt_id)
        if entry is None:
            return
        shard_id, n_rows = entry.shard_id, entry.lease.shard.n_rows
        trouble = self._trouble[shard_id]
        trouble.stood_still = stood_still
        if entry.lease.probe_rows is not None:
            self.probed(attempt_id, survived=False)
            return
        self._end(attempt_id)
        if accusation := self._hearings.pop(attempt_id, None):
            # rows that made one worker raise kill another: let the search find out which
            trouble.crashes += 1
            self._make_void(accusation)
            return
        if len(trouble.quarantine) == n_rows:
            trouble.empty_attempts += 1
            if trouble.empty_attempts >= MAX_EMPTY_ATTEMPTS:
                self.given_up[shard_id] = f"workers die even without drawing it: {error}"
            else:
                self._lease_again_soon(shard_id)
            return
        trouble.crashes += 1
        if trouble.crashes < CRASHES_BEFORE_BISECTION:
            self._lease_again_soon(shard_id)
        elif trouble.bisection is not None:
            pass  # a straggling second lease died while the search is already on
        elif trouble.bisections >= MAX_BISECTIONS:
            reason = f"workers keep dying on this shard, though no single row of it kills one: {error}"
            trouble.quarantine = dict.fromkeys(range(n_rows), reason) | trouble.quarantine
            self._lease_again_soon(shard_id)
        else:
            trouble.bisections += 1
            trouble.bisection = Bisection(n_rows)
            self._again.pop(shard_id, None)
            self._probing.append(shard_id)

    def expired(self, now: float) -> list[ActiveLease]:
        """Leases past their deadline. They stay active until reported; each is returned once per deadline."""
        if now < self._none_expires_before:
            return []
        late = [e for e in self.active.values() if e.deadline <= now]
        for entry in late:
            entry.deadline = now + self.lease_s
        # deadlines only ever move on, and that of a new lease is later than all others
        self._none_expires_before = min((e.deadline for e in self.active.values()), default=now)
        return late

    def lease_again(self, attempt_id: str) -> None:
        """Let another worker have the shard too: this lease went quiet. The shard's commit will decide."""
        entry = self.active.get(attempt_id)
        if entry is not None and entry.lease.writes:
            self._again[entry.shard_id] = None

    def _lease_again_soon(self, shard_id: int) -> None:
        """Queue a shard, once, unless another lease on it is out already."""
        if not any(lease.writes for lease in self.leases_of(shard_id)):
            self._again[shard_id] = None

    def _open(self, shard_id: int) -> bool:
        return not self.committed[shard_id] and shard_id not in self.given_up

    def _grant(
        self, shard_id: int, worker_id: str, now: float, *, ahead: bool = False, **question: Any
    ) -> Lease:
        """A lease; `question` are those fields of it that ask something instead of having the shard made."""
        asks = bool(question)
        if not asks and shard_id in self._trouble:
            question["quarantine"] = tuple(sorted(self._trouble[shard_id].quarantine.items()))
            question["distrusted"] = tuple(sorted(self._trouble[shard_id].distrusted))
        if not asks:
            question["resumes"] = bool(self._leased[shard_id]) or shard_id in self.in_parts
            question["at_most_s"] = self.at_most_s(worker_id, ahead)
            self._leased[shard_id] = True
        attempt_id = f"e{self.driver_epoch:04d}-{uuid.uuid4().hex[:12]}"
        lease = Lease(self.shards[shard_id], attempt_id, worker_id, **question)
        self.active[attempt_id] = ActiveLease(lease, now, now + self.lease_s)
        self._leases_of.setdefault(shard_id, []).append(attempt_id)
        if lease.probe_rows is None:
            self.images_out += lease.shard.n_images
        return lease

    def _speculative(self, worker_id: str, now: float) -> Lease | None:
        if not self._durations:
            return None
        median_s = statistics.median(self._durations)
        active = self.active.values()
        alone = [e for e in active if len(self._leases_of[e.shard_id]) == 1 and self._open(e.shard_id)]
        others = [e for e in alone if e.lease.writes and not e.is_ahead and e.lease.worker_id != worker_id]

        def patience_s(entry: ActiveLease) -> float:
            expected_s = self.expected_s(entry.lease.worker_id)
            return max(SPECULATION_MIN_S, SPECULATION_FACTOR * (expected_s or median_s))

        slow = [e for e in others if now - e.started > patience_s(e)]
        oldest = min(slow, key=lambda e: (e.started, e.shard_id), default=None)
        return self._grant(oldest.shard_id, worker_id, now) if oldest else None
