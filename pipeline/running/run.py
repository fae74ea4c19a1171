"""One driver's run of a job: epoch, coordinator, pool, and the records a driver keeps beside the commits."""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from millijoule.pipeline.energy.live_tables import LiveTables
from millijoule.pipeline.energy.node_readings import node_reading_files
from millijoule.pipeline.energy.shard_shares import accepted_mj
from millijoule.pipeline.energy.uncommitted import UncommittedWriter, read_uncommitted
from millijoule.pipeline.fleet.policy import FleetPolicy
from millijoule.pipeline.output.commits import CommitCompactor, list_committed, parse_commit, read_commits
from millijoule.pipeline.output.job import JobSpec, open_epoch
from millijoule.pipeline.output.other_runs import LaterRun, OtherRuns
from millijoule.pipeline.output.parts import shards_in_parts
from millijoule.pipeline.planning.retry_rounds import JobShards
from millijoule.pipeline.running.accounts import Accounts
from millijoule.pipeline.running.cluster import nodes_for
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.node_recorders import NodeRecorders
from millijoule.pipeline.running.pool import WorkerPool
from millijoule.pipeline.running.record_writer import QueuedWrites, RecordWriter
from millijoule.pipeline.running.spending import Spending
from millijoule.workers.counted import counted
from millijoule.workers.errors import AlreadyExistsError, JobError
from millijoule.workers.fence import is_superseded
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.images.formats import ImageFormat
from millijoule.workers.layout import commit_key, part_key
from millijoule.workers.lease import AttemptResult, WorkerConfig, WorkerStopped
from millijoule.workers.node_meters.config import NodeMeterConfig
from millijoule.workers.schemas import CounterRead, PowerSample, PowerTrace, Segment
from millijoule.workers.sources.obtain import ObtainedModel
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: What no commit carries, compacted commits and live energy tables are written out at least this often.
FLUSH_PERIOD_S = 30.0
#: A run that is cut off has this long for its last records.
CUT_OFF_WRITES_S = 5.0
#: Shards that could not be made and are named with the reason.
MAX_NAMED_SHARDS = 20
#: What to do when the cluster's head is gone, with the reason.
HEAD_LOST = (
    "the head of the Ray cluster is gone ({}). Nothing that was committed is lost: run the same job again, on this "
    "cluster when it is back or on another one, to resume"
)

#: Throughput is averaged over this window for the progress line.
RATE_WINDOW_S = 60.0


@dataclass(frozen=True)
class PlannedJob:
    """A job with its plan in place; `exclusive` says that its store has exclusive create."""

    job: JobSpec
    shards: JobShards
    exclusive: bool


@dataclass
class Counts:
    """What this run and earlier ones achieved so far, for display."""

    images_done: int = 0  # of committed shards, earlier runs included
    images_this_run: int = 0
    filtered_this_run: int = 0
    quarantined_this_run: int = 0
    energy_mj: int | None = 0  # of this run's accepted images; None once a shard was not measured
    estimate_mj: int = 0
    lost_attempts: int = 0


class JobRun:
    """Drives a planned job to its end, or as far as it gets.

    Args:
        worker_class: the Ray actor class.
        source: the job's model as the driver found it; None: what the job's description names, with default options.
        spending: what the job uses, and its caps; without caps on energy, only this run's part of it.
        node_meters: meters of the nodes themselves, read while workers are there.
        part_s: seconds of work that a worker's death may cost: longer shards are sealed in parts; 0: never.
        fleet: which workers of which pools there are to be; None: one pool, which `options` describe.
        telemetry: False: workers read no counters and sample no power, and no live tables are written.

    Raises:
        SupersededError: this is a scheduler's retry, and another run has taken the job over since.
    """

    def __init__(
        self,
        store: Store,
        planned: PlannedJob,
        options: PoolOptions,
        worker_class: Any,
        *,
        lease_s: float,
        speculate: bool,
        source: ObtainedModel | None = None,
        spending: Spending | None = None,
        node_meters: Sequence[NodeMeterConfig] = (),
        telemetry: bool = True,
        part_s: float = 0.0,
        fleet: FleetPolicy | None = None,
    ) -> None:
        job = planned.job
        self.store = store
        self.planned = planned
        self.epoch = open_epoch(store, exclusive=planned.exclusive)
        committed = list_committed(store, len(planned.shards))
        in_parts = frozenset(shards_in_parts(store, committed)) if part_s else frozenset[int]()
        self.coordinator = Coordinator(planned.shards, committed, lease_s, self.epoch, speculate, in_parts)
        config = WorkerConfig(
            output_url=store.url,
            fingerprint=job.fingerprint,
            job_seed=job.job_seed,
            output_format=job.output_format,
            model=source.model if source else job.model,
            model_sha256=job.model_sha256,
            driver_epoch=self.epoch,
            options=source.options if source else GeneratorOptions(),
            copies=source.copies if source else (),
            image_format=ImageFormat(job.image_format, job.image_quality),
            commits_exclusively=planned.exclusive,
            cpu_threads=max(1, int(options.cpus_per_worker)),
            telemetry=telemetry,
            part_s=part_s,
        )
        self.fleet = fleet
        self.pool = WorkerPool(worker_class, self.coordinator, config, options, self, fleet)
        self.writer = RecordWriter()
        self._other_runs = OtherRuns(
            *(store, self.epoch, self.writer.submit, self.coordinator.committed, self._stand_down),
            self._committed_elsewhere,
            self._take_over if part_s else None,
        )
        self._accounts = Accounts(store, self.epoch, self.writer, worker_class, config)
        self.counts = Counts(images_done=planned.shards.images_of(committed))
        self.spending = spending or Spending()
        self.cap_reached: str | None = None  # in words
        self._may_seal = part_s > 0  # once, at the deadline
        self.hosts: dict[str, str] = {}  # by boot id
        self.latest_power: dict[tuple[str, str], PowerSample] = {}  # by boot id and device
        if self.spending.caps.on_energy:
            for commit in read_commits(store, len(planned.shards), committed):
                self.spending.add(commit.segments)
            self.spending.add(read_uncommitted(store).segments)
        later = cast(Store, QueuedWrites(store, self.writer))  # they only ever write
        self._compactor = CommitCompactor(later, self.epoch)
        self._live = LiveTables(later, job.fingerprint, self.epoch) if telemetry else None
        self._uncommitted = UncommittedWriter(later, self.epoch)
        self._node_readings = node_reading_files(later, self.epoch)
        self._node_recorders = NodeRecorders(node_meters, self.node_was_read)
        self._next_flush = time.monotonic() + FLUSH_PERIOD_S
        self._arrivals: deque[tuple[float, int]] = deque()
        self._stop_now = False
        self._head_lost: str | None = None
        self._on_tick: Callable[[], None] = lambda: None

    def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Work until every shard is committed or given up, a cap is reached, or the run was drained, stopped or superseded.

        Raises:
            MillijouleError: nothing more can be done before a person acts. What was committed stays.
        """
        self._on_tick = on_tick
        self._accounts.look_for_open()
        said = ""  # by the error that ends the run
        try:
            if self.complete or not self._check_caps(time.time()):
                self._work()
        except JobError as error:
            said = str(error)
            raise
        finally:
            self._close()
            for node in self.pool.nodes.faulty:
                if str(node) not in said:
                    log.warning("%s", node)
            if deaths := str(self.pool.deaths):
                log.info("%s", deaths)
        if self.complete and self.superseded is None:
            self._other_runs.look_at_once()  # the end of the job is the latest run's
        if self.superseded is not None:
            return
        if given_up := self.coordinator.given_up:
            named = sorted(given_up.items())[:MAX_NAMED_SHARDS]
            reasons = "".join(f"\n  shard {shard_id}: {error}" for shard_id, error in named)
            raise JobError(
                f"{len(given_up)} of {counted(len(self.planned.shards), 'shard')} could not be made; run the same command again "
                f"once the cause is mended{reasons}"
            )

    def _work(self) -> None:
        options = self.pool.options
        if node_meters := self._node_recorders.configs:
            log.info("node meters: %s", ", ".join(dict.fromkeys(c.meter for c in node_meters)))
            nodes = nodes_for(options.asked)
            self._node_recorders.start(nodes if len(nodes) <= options.max_workers else ())
        try:
            self.pool.run()
        except _StopNow:
            if self._head_lost is not None:
                raise JobError(HEAD_LOST.format(self._head_lost)) from None
            log.warning("stopped")

    def _close(self) -> None:
        """Close every account and write what is left; cut off, only what takes seconds."""
        cut_off = self._stop_now
        try:
            if self._head_lost is None:
                if self.epoch > 1 and not cut_off:
                    self._accounts.look_for_open()
                self._accounts.close(cut_off=cut_off)
                self._node_recorders.close(wait=not cut_off)
        finally:
            self.flush(everything=True)
            self.writer.close(CUT_OFF_WRITES_S if cut_off else None)

    def stop_now(self) -> None:
        """Make `run` return at its next turn. Safe from a signal handler."""
        self._stop_now = True

    def lose_head(self, reason: str) -> None:
        """The cluster's head is gone: make `run` raise at its next turn, with no more calls to Ray. Safe from any thread."""
        self._head_lost, self.pool.abandoned, self._stop_now = reason, True, True

    @property
    def superseded(self) -> LaterRun | None:
        """The run that has taken over: this one gives no more leases and must not write what the end of a job writes."""
        return self._other_runs.later

    def _stand_down(self, later: LaterRun) -> None:
        log.warning(
            "%s has taken over this job: run %d (this one) stands down. Its workers end their batches, seal what they have for "
            "the other, and close their accounts",
            *(later, self.epoch),
        )
        self.pool.stand_down(f"superseded by run {later.epoch}")

    def _take_over(self, shards: frozenset[int]) -> None:
        """An earlier run's workers may have sealed parts of `shards`."""
        self.coordinator.in_parts |= shards

    @property
    def complete(self) -> bool:
        return self.coordinator.n_committed == len(self.planned.shards)

    def images_per_second(self) -> float | None:
        """Committed images per second over the last minute; None before the first commits."""
        if len(self._arrivals) < 2:
            return None
        span = time.monotonic() - self._arrivals[0][0]
        return sum(n for _, n in list(self._arrivals)[1:]) / span if span > 0 else None

    def images_at_work(self) -> int:
        """Images done in attempts that are not committed yet; of several at one shard, those of the furthest."""
        furthest: dict[int, int] = defaultdict(int)
        for entry in self.coordinator.active.values():
            if entry.lease.writes:
                furthest[entry.shard_id] = max(furthest[entry.shard_id], entry.images_done)
        return sum(furthest.values())

    # -- what the pool tells us ----------------------------------------------------------------------------------

    def committed(self, result: AttemptResult, *, news: bool) -> None:
        counts = self.counts
        assert result.commit_json is not None
        shard = result.lease.shard
        commit = parse_commit(self.store, shard.shard_id, result.commit_json)
        if result.outcome == "exists":
            counts.lost_attempts += 1
            if commit.driver_epoch != self.epoch:
                self._other_runs.committed(commit.driver_epoch, time.monotonic())
        if not news:
            return
        self._compactor.add(shard.shard_id, result.commit_json)
        if self.fleet is not None:
            self.fleet.observe(commit)
        if self._live:
            self._live.add_commit(commit)
        self.spending.add(commit.segments)
        self._note_power(commit.power)
        self.hosts.update({s.open.boot_id: commit.host for s in commit.segments})
        counts.images_done += shard.n_images
        counts.images_this_run += commit.images_ok
        counts.filtered_this_run += commit.images_filtered
        counts.quarantined_this_run += commit.images_quarantined
        counts.estimate_mj += accepted_mj(commit, commit.energy_estimate_mj) or 0
        used_mj = accepted_mj(commit, commit.energy_mj)
        if used_mj is None:
            counts.energy_mj = None
        elif counts.energy_mj is not None:
            counts.energy_mj += used_mj
        now = time.monotonic()
        self._arrivals.append((now, commit.images_ok))
        while self._arrivals[0][0] < now - RATE_WINDOW_S and len(self._arrivals) > 2:
            self._arrivals.popleft()

    def _committed_elsewhere(self, shards: Iterable[int]) -> None:
        for shard_id in shards:
            if self.coordinator.complete("", shard_id, time.monotonic()):
                self.counts.images_done += self.planned.shards[shard_id].n_images

    def prepared(self, result: AttemptResult) -> None:
        """Write a commit that its worker could not: it waited for a second opinion, or the store has no exclusive create,
        where only this process commits, one at a time. None is written once a later run has begun."""
        shard_id, body = result.lease.shard.shard_id, result.commit_json
        assert body is not None
        key = commit_key(shard_id)

        def commit() -> bytes | None:
            if is_superseded(self.store, self.epoch):
                return None
            if self.planned.exclusive:
                try:
                    self.store.put_exclusive(key, body)
                except AlreadyExistsError:
                    return self.store.get(key)
            elif self.store.exists(key):
                return self.store.get(key)
            else:
                self.store.put(key, body)
            return body

        def stands(standing: bytes | None) -> None:
            if standing is None:
                self.discarded(result, keep_parts=True)
                self.pool.commit_refused(result)
                self._other_runs.look()
                return
            ours = parse_commit(self.store, shard_id, body)
            if parse_commit(self.store, shard_id, standing).attempt_id == ours.attempt_id:
                standing = body
            else:
                self.discarded(result)
            self.pool.commit_stands(result, standing)

        self.writer.submit(f"committing shard {shard_id}", commit, stands)

    def discarded(self, result: AttemptResult, *, keep_parts: bool = False) -> None:
        """See `JobEvents`; with `keep_parts` another attempt may still take over what this one has sealed."""
        assert result.commit_json is not None
        lost = parse_commit(self.store, result.lease.shard.shard_id, result.commit_json)
        segments = tuple(
            replace(s, segment_class="loser") if s.attempt_id == lost.attempt_id else s for s in lost.segments
        )
        self._uncommitted_records(lost.worker_id, segments, lost.power)
        self.counts.lost_attempts += 1
        # files of sealed parts may stand in another attempt's commit: `gc` looks at them when the shard is committed
        files = [] if lost.parts else [f.path for f in lost.files]
        if not keep_parts:
            shard_id, own = result.lease.shard.shard_id, f"{lost.attempt_id}.p"
            files += [part_key(shard_id, part) for part in lost.parts if part.startswith(own)]
        self.writer.submit(f"removing files of {lost.attempt_id}", lambda: self.store.delete(files))

    def fenced(self) -> None:
        self._other_runs.look()

    def stopped(self, stopped: WorkerStopped) -> None:
        self._uncommitted_records(stopped.worker_id, stopped.segments, stopped.power)
        self._accounts.stopped(stopped)

    def loading(self, worker_id: str, read: CounterRead | None) -> None:
        self._accounts.loading(worker_id, read)

    def gone(self, worker_id: str) -> None:
        self._accounts.gone(worker_id)

    def _uncommitted_records(
        self, worker_id: str, segments: tuple[Segment, ...], power: tuple[PowerTrace, ...]
    ) -> None:
        self._uncommitted.add(worker_id, segments, power)
        self._note_power(power)
        if self._live:
            self._live.add_segments(segments)
            self._live.add_power(worker_id, power)
        self.spending.add(segments)

    def _note_power(self, traces: Iterable[PowerTrace]) -> None:
        for trace in traces:
            for sample in trace.samples[-1:]:
                key = trace.boot_id, trace.device
                self.latest_power[key] = max(
                    sample, self.latest_power.get(key, sample), key=lambda s: s.t_mono_ns
                )

    def node_was_read(self, rows: Iterable[tuple]) -> None:
        kept = list(rows)
        self._node_readings.add("node_reading", kept)
        if self._live:
            self._live.add_node_readings(kept)

    def tick(self) -> None:
        if self._stop_now:
            raise _StopNow
        self.writer.settle()
        self._accounts.tick()
        self._other_runs.tick(time.monotonic())
        self._node_recorders.tick(w.node for w in self.pool.workers.values() if w.node is not None)
        if time.monotonic() >= self._next_flush:
            self.flush()
        self._keep_to_caps()
        self._on_tick()

    def _keep_to_caps(self) -> None:
        """A cap on what is used ends leasing in time for what is in hand; the deadline has that sealed as parts, for another run."""
        now = time.time()
        if not self.pool.draining and self._check_caps(now):
            self.pool.drain(f"reached {self.cap_reached}")
        if self._may_seal and self.spending.is_late(now) and not self.coordinator.done:
            self._may_seal = False
            self.pool.stand_down("reached the deadline")

    def _check_caps(self, now: float) -> bool:
        ahead = self.coordinator.images_ahead
        at_work = self.coordinator.images_out - ahead
        done = max(1, self.counts.images_done)
        self.cap_reached = self.spending.reached(now, at_work / done)
        # near a cap nobody comes to a shard of which it is not known whether it may still be made
        more = max(ahead, at_work)
        self.pool.leases_ahead = self.spending.reached(now, (at_work + more) / done) is None
        return self.cap_reached is not None

    def flush(self, *, everything: bool = False) -> None:
        self._next_flush = time.monotonic() + FLUSH_PERIOD_S
        if not self.writer.has_room and not everything:
            return  # storage is being waited for: records stay here until it takes them
        self._compactor.flush()
        self._uncommitted.flush()
        self._node_readings.flush()
        if self._live:
            self._live.flush()


class _StopNow(Exception):
    """Leave the pool's loop at once."""
