"""The last stages of an attempt: encoded images are written, files stored, the commit made.

On a thread per attempt, beside the device's, which may draw the next attempt meanwhile. The order of steps is the commit
protocol (docs/commit-protocol.md): data objects under attempt-unique names first, the shard's commit by exclusive create
last, unless a later run of the job has begun. Whatever dies in between leaves files nobody refers to.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.drawing import DeviceTime, Requests, now_wall_ns, reason
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.attempts.handover import Handover
from millijoule.workers.attempts.parts import TakenParts, forget_parts, labelled, piece_of
from millijoule.workers.attempts.pieces import Pieces, joined
from millijoule.workers.attempts.store_files import store_files
from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.errors import AlreadyExistsError, MillijouleError
from millijoule.workers.fence import is_superseded
from millijoule.workers.images.writers import ShardFiles
from millijoule.workers.layout import commit_key
from millijoule.workers.lease import AttemptResult, Lease, Suspect, WorkerConfig
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_energy_mj, segment_estimate_mj
from millijoule.workers.schemas import (
    Commit,
    DataFile,
    ImageRow,
    PowerTrace,
    RowCounts,
    Segment,
    WorkerEnvironment,
    carried_rows,
)
from millijoule.workers.scratch import scratch_folder, unusable
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: What most attempts find of earlier ones.
NOTHING_TAKEN = TakenParts()

#: A commit names at most this many kinds of error; the rest is counted under "other".
MAX_ERROR_KINDS = 20


@dataclass(frozen=True)
class Written:
    """All files of a shard in the scratch folder; `suspects` and `healthy` as in `AttemptResult`."""

    files: ShardFiles
    suspects: tuple[Suspect, ...]
    healthy: tuple[int, int] | None


class Finishing:
    """What a worker needs to finish attempts, of which several may be at it at once."""

    def __init__(
        self,
        config: WorkerConfig,
        store: Store,
        meter: EnergyMeter,
        timeline: SegmentTimeline,
        power: PowerSampler,
        worker: WorkerEnvironment,
    ) -> None:
        self.config = config
        self.store = store
        self.meter = meter
        self.timeline = timeline
        self.power = power
        self.worker = worker

    def finish(
        self, attempt: Attempt, requests: Requests, handover: Handover, taken: TakenParts = NOTHING_TAKEN
    ) -> AttemptResult:
        """From what is drawn to the commit.

        Args:
            requests: all images of the shard.
            taken: what earlier attempts have made of it.

        Raises:
            StoreError: storage failed; nothing was committed by this attempt, or it cannot be known.
            NodeError: this worker must not be used again; another node may do better.
            Exception: what the drawing raised.
        """
        lease = attempt.lease
        stored: tuple[DataFile, ...] = ()
        pieces: Pieces | None = None
        try:
            with _scratch_folder() as scratch:
                where = lease, self.worker.worker_id, scratch
                pieces = Pieces(self.store, self.config, *where, requests, taken, self.energy_mj)
                written = self._write(attempt, requests, handover, pieces)
                device = handover.device_time()
                attempt.check()
                stored = pieces.to_store
                store_files(self.store, stored, scratch, attempt.step, attempt.check)
            attempt.check()
        except AttemptCancelled:
            self._give_up(handover, pieces, "loser")
            self.store.delete([f.path for f in stored])
            return AttemptResult(lease, "cancelled", piece=piece_of(pieces.sealed) if pieces else None)
        except Exception:
            self._give_up(handover, pieces, "retry")
            raise
        segments, power = joined(lease.attempt_id, handover.stretches, pieces.sealed, device)
        whole = replace(device, segment=segments[-1], segments=segments, power=power)
        return self._commit(attempt, written, whole, pieces)

    def _write(self, attempt: Attempt, requests: Requests, handover: Handover, pieces: Pieces) -> Written:
        accused: list[DrawnImage] = []
        healthy: tuple[int, int] | None = None
        with closing(handover.parts()) as parts:
            for part in parts:
                if isinstance(part, DeviceTime):
                    pieces.seal(part, attempt.step, attempt.check)
                    continue
                outcomes = part.outcome.result()
                attempt.check()
                # a part has no row of which only this worker says that it fails: those come last
                accused += _add(pieces, part.drawn, outcomes)
                if healthy is None:
                    made = zip(part.drawn, outcomes, strict=True)
                    healthy = next((one.at for one, file in made if isinstance(file, bytes)), None)
                attempt.step()
        for one in accused:
            pieces.add(one.at, one.row, None)
        reasons = dict(attempt.lease.quarantine)
        for at, request in requests.items():
            if at[0] in reasons and not pieces.has(at):
                pieces.add(at, ImageRow(request, "quarantined", error=reasons[at[0]]), None)
        suspects = tuple(Suspect(*one.at, one.row.error or "") for one in accused)
        return Written(pieces.finish(), suspects, healthy)

    def _commit(
        self, attempt: Attempt, written: Written, device: DeviceTime, pieces: Pieces
    ) -> AttemptResult:
        lease, store = attempt.lease, self.store
        shard_id = lease.shard.shard_id
        commit = self._describe(attempt, written.files, device, pieces)
        body, key = commit.to_json(), commit_key(shard_id)
        if written.suspects:
            return AttemptResult(lease, "suspect", body, written.suspects, written.healthy)
        try:
            superseded = is_superseded(store, self.config.driver_epoch)
            if not superseded and self.config.commits_exclusively:
                store.put_exclusive(key, body)
        except AlreadyExistsError:
            self._restore(lease.attempt_id, device.segments, device.power, "loser")
            return self._discard(lease, pieces)
        except MillijouleError:
            self._restore(
                lease.attempt_id, device.segments, device.power, "shard"
            )  # it may stand all the same
            raise
        if superseded:
            return self._hand_on(lease, device, pieces)
        if not self.config.commits_exclusively:
            return AttemptResult(lease, "prepared", body)
        forget_parts(store, shard_id, [p.part_id for p in pieces.parts])
        return AttemptResult(lease, "committed", body)

    def _discard(self, lease: Lease, pieces: Pieces) -> AttemptResult:
        """Another attempt's commit stands: the files of this one go."""
        store, shard_id = self.store, lease.shard.shard_id
        log.info("shard %d: another attempt committed first; discarding ours", shard_id)
        standing = store.get(commit_key(shard_id))
        # nothing but this commit will ever name files of the shard; it may name parts that were sealed here
        named = {f.path for f in Commit.from_json(standing).files}
        ours = [f.path for f in pieces.to_store] + [f.path for p in pieces.sealed for f in p.files]
        store.delete([path for path in ours if path not in named])
        forget_parts(store, shard_id, [p.part_id for p in pieces.parts])
        return AttemptResult(lease, "exists", standing)

    def _hand_on(self, lease: Lease, device: DeviceTime, pieces: Pieces) -> AttemptResult:
        """A later run has begun, and what it does not name does not count: seal the rest of the shard for it to take over."""
        shard_id, epoch, part = lease.shard.shard_id, self.config.driver_epoch, pieces.next_part
        # before storage may fail: sealed or not, they are a part's, which is waste unless a commit names it
        self._restore(part, labelled(device, lease.attempt_id, part), device.power, "shard")
        if self.store.exists(commit_key(shard_id)):
            return self._discard(lease, pieces)
        log.info(
            "shard %d: run %d is superseded and commits no more; sealing ours as a part", shard_id, epoch
        )
        pieces.seal_last(device)
        return AttemptResult(lease, "superseded")

    def _describe(self, attempt: Attempt, written: ShardFiles, device: DeviceTime, pieces: Pieces) -> Commit:
        lease, worker, segment, parts = attempt.lease, self.worker, device.segment, pieces.parts
        domains = {*segment.close.energy_mj, *(d for part in parts for d in part.energy_domains)}
        # those of parts that were sealed here are among the device's
        own = {s.open.t_mono_ns for s in device.segments if s.worker_id == worker.worker_id}
        taken = tuple(
            s
            for part in parts
            for s in part.segments
            if s.worker_id != worker.worker_id or s.open.t_mono_ns not in own
        )
        counts = RowCounts.of((r.status, r.width) for r in written.rows)
        return Commit(
            shard_id=lease.shard.shard_id,
            attempt_id=lease.attempt_id,
            driver_epoch=self.config.driver_epoch,
            plan_fingerprint=self.config.fingerprint,
            model_sha256=self.config.model_sha256,
            files=written.files,
            rows_path=written.rows_key,
            images_ok=counts.ok,
            images_filtered=counts.filtered,
            images_quarantined=counts.quarantined,
            images_drawn=counts.drawn,
            errors=_top_errors(Counter(r.error for r in written.rows if r.error)),
            t_start_wall_ns=device.began_wall_ns,
            t_end_wall_ns=now_wall_ns(),
            energy_mj=_sum([self.energy_mj(segment), *(part.energy_mj for part in parts)]),
            energy_domains=tuple(sorted(domains)),
            energy_estimate_mj=_sum([segment_estimate_mj(segment), *(p.energy_estimate_mj for p in parts)]),
            energy_method=self.meter.method,
            segments=(*taken, *device.segments),
            parts=tuple(part.part_id for part in parts),
            images_by_others=pieces.images_by_others() if pieces.taken.parts else {},
            power=device.power,
            rows=carried_rows(written.rows),
            worker_id=worker.worker_id,
            node_id=worker.node_id,
            host=worker.host,
            device=worker.device,
        )

    def energy_mj(self, segment: Segment) -> int | None:
        """Measured millijoules of `segment`; None where one of this worker's own devices was not read."""
        devices = self.worker.gpus or (self.worker.device,)
        unread = unread_domains(devices, segment.close.energy_mj)
        return None if unread else segment_energy_mj(segment)

    def _give_up(self, handover: Handover, pieces: Pieces | None, segment_class: str) -> None:
        attempt_id, last = handover.attempt.lease.attempt_id, handover.close()
        sealed = pieces.sealed if pieces is not None else ()
        self._restore(attempt_id, *joined(attempt_id, handover.stretches, sealed, last), segment_class)

    def _restore(
        self,
        attempt_id: str,
        segments: Sequence[Segment],
        power: tuple[PowerTrace, ...],
        segment_class: str,
    ) -> None:
        """No commit carries them: a later one does, or the worker's last words, with the attempt's own as `segment_class`.

        Those of sealed parts stay what they are: whether a commit is made of them is not known here.
        """
        self.timeline.restore(
            [replace(s, segment_class=segment_class) if s.attempt_id == attempt_id else s for s in segments]
        )
        self.power.restore(power)


def _sum(energies: Sequence[int | None]) -> int | None:
    known = [mj for mj in energies if mj is not None]
    return sum(known) if len(known) == len(energies) else None


def _add(
    pieces: Pieces, drawn: Sequence[DrawnImage], outcomes: Sequence[bytes | Exception | None]
) -> list[DrawnImage]:
    """Give images to the piece at hand, and rows that have none, but for suspects, which are returned."""
    suspects = [one for one in drawn if one.is_suspect]
    ats: list[tuple[int, int]] = []
    rows: list[ImageRow] = []
    encoded: list[bytes | None] = []
    for one, outcome in zip(drawn, outcomes, strict=True):
        if one.is_suspect:
            continue
        ats.append(one.at)
        if isinstance(outcome, Exception):
            rows.append(one.row._replace(status="quarantined", error=reason(outcome)))
            encoded.append(None)
        else:
            rows.append(one.row)
            encoded.append(outcome)
    pieces.add_many(ats, rows, encoded)
    return suspects


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for one attempt's files. Whatever its disk does not do is this node's fault."""
    try:
        with scratch_folder() as scratch:
            yield scratch
    except OSError as error:
        raise unusable(error) from error


def _top_errors(errors: Mapping[str, int]) -> dict[str, int]:
    counted = Counter(errors)
    top = dict(counted.most_common(MAX_ERROR_KINDS))
    rest = counted.total() - sum(top.values())
    return {**top, "other": rest} if rest else top
