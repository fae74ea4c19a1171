"""The last stages of an attempt: encoded images are written, files stored, the commit made.

On a thread per attempt, beside the device's, which may draw the next attempt meanwhile. The order of steps is the commit
protocol (docs/commit-protocol.md): data objects under attempt-unique names first, the shard's commit by exclusive create
last. Whatever dies in between leaves files nobody refers to.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.drawing import DeviceTime, Requests, now_wall_ns, reason
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.attempts.handover import Handover
from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.errors import AlreadyExistsError, MillijouleError, NodeError
from millijoule.workers.images.writers import ShardFiles, ShardWriter, open_writer
from millijoule.workers.layout import commit_key, data_prefix
from millijoule.workers.lease import AttemptResult, Suspect, WorkerConfig
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_energy_mj, segment_estimate_mj
from millijoule.workers.schemas import (
    Commit,
    DataFile,
    ImageRow,
    RowCounts,
    Segment,
    WorkerEnvironment,
    carried_rows,
)
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: A commit names at most this many kinds of error; the rest is counted under "other".
MAX_ERROR_KINDS = 20

#: Files of an attempt that are stored together: most of the time of one is waiting, for S3 or for the disk to flush.
FILES_AT_ONCE = 8


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

    def finish(self, attempt: Attempt, requests: Requests, handover: Handover) -> AttemptResult:
        """From what is drawn to the commit.

        Args:
            requests: all images of the shard.

        Raises:
            StoreError: storage failed; nothing was committed by this attempt, or it cannot be known.
            NodeError: this worker must not be used again; another node may do better.
            Exception: what the drawing raised.
        """
        files: Sequence[DataFile] = ()
        try:
            with _scratch_folder() as scratch:
                written = self._write(attempt, requests, handover, scratch)
                device = handover.device_time()
                attempt.check()
                files = written.files.files
                store_files(self.store, files, scratch, attempt.step, attempt.check)
            attempt.check()
        except AttemptCancelled:
            self._restore(handover.close(), "loser")
            self.store.delete([f.path for f in files])
            return AttemptResult(attempt.lease, "cancelled")
        except Exception:
            self._restore(handover.close(), "retry")
            raise
        return self._commit(attempt, written, device)

    def _write(self, attempt: Attempt, requests: Requests, handover: Handover, scratch: Path) -> Written:
        lease = attempt.lease
        writer = open_writer(
            self.config.output_format,
            scratch,
            data_prefix(lease.shard.shard_id, lease.attempt_id),
            self.config.image_format,
        )
        suspects: list[Suspect] = []
        healthy: tuple[int, int] | None = None
        with closing(handover.parts()) as parts:
            for part in parts:
                outcomes = part.outcome.result()
                attempt.check()
                _add(writer, part.drawn, outcomes)
                for drawn, outcome in zip(part.drawn, outcomes, strict=True):
                    if healthy is None and isinstance(outcome, bytes):
                        healthy = drawn.at
                    if drawn.is_suspect:
                        suspects.append(Suspect(*drawn.at, drawn.row.error or ""))
                attempt.step()
        reasons = dict(lease.quarantine)
        for (row, _), request in requests.items():
            if row in reasons:
                writer.add(ImageRow(request, "quarantined", error=reasons[row]), None)
        return Written(writer.finish(), tuple(suspects), healthy)

    def _commit(self, attempt: Attempt, written: Written, device: DeviceTime) -> AttemptResult:
        lease, store = attempt.lease, self.store
        commit = self._describe(attempt, written.files, device)
        body, key = commit.to_json(), commit_key(lease.shard.shard_id)
        if written.suspects:
            return AttemptResult(lease, "suspect", body, written.suspects, written.healthy)
        if not self.config.commits_exclusively:
            return AttemptResult(lease, "prepared", body)
        try:
            store.put_exclusive(key, body)
        except AlreadyExistsError:
            log.info("shard %d: another attempt committed first; discarding ours", lease.shard.shard_id)
            self._restore(device, "loser")
            store.delete([f.path for f in commit.files])
            return AttemptResult(lease, "exists", store.get(key))
        except MillijouleError:
            self._restore(device, "shard")  # it may stand all the same
            raise
        return AttemptResult(lease, "committed", body)

    def _describe(self, attempt: Attempt, written: ShardFiles, device: DeviceTime) -> Commit:
        lease, worker, segment = attempt.lease, self.worker, device.segment
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
            energy_mj=self.energy_mj(segment),
            energy_domains=tuple(sorted(segment.close.energy_mj)),
            energy_estimate_mj=segment_estimate_mj(segment),
            energy_method=self.meter.method,
            segments=device.segments,
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

    def _restore(self, device: DeviceTime | None, segment_class: str) -> None:
        """No commit carries `device`: a later one does, or the worker's last words, with the attempt's own as `segment_class`."""
        if device is None:
            return
        own = device.segment.attempt_id
        self.timeline.restore(
            replace(s, segment_class=segment_class) if s.attempt_id == own else s for s in device.segments
        )
        self.power.restore(device.power)


def store_files(
    store: Store,
    files: Sequence[DataFile],
    folder: Path,
    on_part: Callable[[], None],
    still_wanted: Callable[[], None] = lambda: None,
) -> None:
    """Store `files` of `folder`, some at a time; nothing is under way any more when this returns or raises.

    Args:
        on_part: called, from any thread, whenever a file or a part of one has arrived.
        still_wanted: called before each file; may raise.
    """

    def put(file: DataFile) -> None:
        still_wanted()
        store.put_file(file.path, folder / file.path, on_part)

    if len(files) == 1:
        put(files[0])
        return
    with ThreadPoolExecutor(min(FILES_AT_ONCE, max(1, len(files))), "store-files") as pool:
        try:
            for done in [pool.submit(put, file) for file in files]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _add(
    writer: ShardWriter, drawn: Sequence[DrawnImage], outcomes: Sequence[bytes | Exception | None]
) -> None:
    """Give images to the writer, and rows that have none."""
    rows: list[ImageRow] = []
    encoded: list[bytes | None] = []
    for one, outcome in zip(drawn, outcomes, strict=True):
        if isinstance(outcome, Exception):
            rows.append(one.row._replace(status="quarantined", error=reason(outcome)))
            encoded.append(None)
        else:
            rows.append(one.row)
            encoded.append(outcome)
    writer.add_many(rows, encoded)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for one attempt's files. No room, or no right to write there, is this node's fault."""
    try:
        with tempfile.TemporaryDirectory(prefix="millijoule-") as scratch:
            yield Path(scratch)
    except OSError as error:
        raise NodeError(
            f"scratch folder {error.filename or ''}: {error.strerror or error}; free space there, or set TMPDIR to "
            "another folder on this node"
        ) from error


def _top_errors(errors: Mapping[str, int]) -> dict[str, int]:
    counted = Counter(errors)
    top = dict(counted.most_common(MAX_ERROR_KINDS))
    rest = counted.total() - sum(top.values())
    return {**top, "other": rest} if rest else top
