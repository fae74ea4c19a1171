"""One attempt at one shard: rows -> images -> data files -> commit.

The order of steps is the commit protocol (docs/commit-protocol.md): data objects under attempt-unique names
first, the shard's commit by exclusive create last. Whatever dies in between leaves files nobody refers to.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from millijoule.workers.drawing.batch_size import BatchNotes, BatchSizer
from millijoule.workers.drawing.isolate import AttemptCancelled, Drawing, batch_limits
from millijoule.workers.errors import (
    AlreadyExistsError,
    MillijouleError,
    NodeError,
    RowError,
    SickWorkerError,
)
from millijoule.workers.generators.protocol import Generator, ReportsSteps
from millijoule.workers.images.encode import encode_png
from millijoule.workers.images.writers import open_writer
from millijoule.workers.layout import commit_key, data_prefix
from millijoule.workers.lease import AttemptResult, Calibration, Lease, Suspect, WorkerConfig
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.meters.own_devices import unread_domains
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_energy_mj, segment_estimate_mj
from millijoule.workers.schemas import (
    Commit,
    ImageRequest,
    ImageRow,
    RowCounts,
    Segment,
    WorkerEnvironment,
    carried_rows,
)
from millijoule.workers.shard_rows import read_shard_rows, shard_requests
from millijoule.workers.storage.protocol import Store

log = logging.getLogger(__name__)

#: A commit names at most this many kinds of error; the rest is counted under "other".
MAX_ERROR_KINDS = 20

#: Longest error text kept per row.
MAX_ERROR_CHARS = 500

#: A probe's rows have survived only if their process still works this long after them: a signal to another thread, or
#: the host's out-of-memory killer, comes a moment after the request has returned.
PROBE_LINGER_S = 1.0


class AttemptRunner:
    """Runs leases one after another with one loaded generator; how far it got may be read from any thread.

    Args:
        worker: this one, as commits name it.
        power: gives commits the power samples to carry.

    Attributes:
        attempt_id: the running attempt; None between two.
        images_done: images finished in the running attempt; grows between batches.
        steps: grows, from any thread, whenever the attempt got further: what keeps its lease during a long batch or
            upload. Stands while nothing moves.
        cancelled: the attempt to call off; asked between batches, and between the steps of a generator that reports
            them.
    """

    def __init__(
        self,
        config: WorkerConfig,
        store: Store,
        generator: Generator,
        meter: EnergyMeter,
        timeline: SegmentTimeline,
        worker: WorkerEnvironment,
        power: PowerSampler,
    ) -> None:
        self.config = config
        self.store = store
        self.generator = generator
        self.meter = meter
        self.timeline = timeline
        self.worker = worker
        self.power = power
        self.attempt_id: str | None = None
        self.images_done = self.steps = 0
        self.cancelled: str | None = None
        self._thread = 0
        if isinstance(generator, ReportsSteps):
            generator.on_step = self._between_steps
        self.drawing = Drawing(
            generator, _batch_sizer(config, generator, worker), worker.device_name or worker.device
        )
        self._served: ImageRequest | None = None

    def run(self, lease: Lease) -> AttemptResult:
        """Attempt `lease`.

        Raises:
            StoreError: storage failed; nothing was committed by this attempt, or it cannot be known.
            NodeError: this worker must not be used again; another node may do better.
        """
        self.images_done = self.steps = 0
        self._thread = threading.get_ident()
        self.attempt_id = lease.attempt_id
        self.timeline.close("idle")
        try:
            if lease.writes:
                return self._attempt(lease)
            result = self._probe(lease) if lease.probe_rows is not None else self._confirm(lease)
            self.timeline.close("retry", lease.shard.shard_id, lease.attempt_id)
            return result
        except AttemptCancelled:
            self.timeline.close("loser", lease.shard.shard_id, lease.attempt_id)
            return AttemptResult(lease, "cancelled")
        except MillijouleError:
            self.timeline.close("retry", lease.shard.shard_id, lease.attempt_id)
            raise
        except MemoryError as error:
            self.timeline.close("retry", lease.shard.shard_id, lease.attempt_id)
            raise NodeError(
                f"{self.worker.host}: out of memory ({error}); give workers more, or start fewer on a node"
            ) from error
        finally:
            self.attempt_id = None

    def _probe(self, lease: Lease) -> AttemptResult:
        """Draw some rows. What they raise is no matter here: the question is whether the process survives them."""
        assert lease.probe_rows is not None
        rows = read_shard_rows(self.store, lease.shard)[slice(*lease.probe_rows)]
        requests = dict(enumerate(shard_requests(rows, self.config.job_seed)))
        for batch in self.drawing.batches(requests):
            self.images_done += sum(1 for _ in self._generate([requests[i] for i in batch]))
            self._check_cancelled()
        time.sleep(PROBE_LINGER_S)
        self._check_health()
        return AttemptResult(lease, "probed")

    def _confirm(self, lease: Lease) -> AttemptResult:
        """Draw suspects, each alone beside a healthy request; the first that can be drawn ends it.

        Raises:
            SickWorkerError: the healthy request fails here: this worker's word counts for nothing.
        """
        requests = self._requests(lease)
        healthy = self._served if lease.healthy is None else requests[lease.healthy]
        confirmed: list[Suspect] = []
        for suspect in lease.confirm:
            self._check_cancelled()
            if healthy is not None:
                self._draw_healthy(healthy)
            try:
                (rejected,) = self.drawing.draw_one(requests[suspect.row, suspect.image_index]).rejected
            except (AttemptCancelled, NodeError):
                raise
            except Exception as error:
                confirmed.append(replace(suspect, reason=_reason(error)))
            else:
                if rejected is None or rejected.status != "quarantined":
                    return AttemptResult(lease, "contradicted", suspects=(suspect,))
                confirmed.append(replace(suspect, reason=rejected.reason[:MAX_ERROR_CHARS]))
            self._step()
        if healthy is not None:
            self._draw_healthy(healthy)
        return AttemptResult(lease, "confirmed", suspects=tuple(confirmed))

    def _attempt(self, lease: Lease) -> AttemptResult:
        shard, store = lease.shard, self.store
        t_start = time.time_ns()
        requests = self._requests(lease)
        reasons = dict(lease.quarantine)
        suspects: list[Suspect] = []
        healthy: tuple[int, int] | None = None
        with _scratch_folder() as scratch:
            writer = open_writer(
                self.config.output_format, scratch, data_prefix(shard.shard_id, lease.attempt_id)
            )
            wanted = {at: request for at, request in requests.items() if at[0] not in reasons}
            for batch in self.drawing.batches(wanted):
                drawn = self._generate([requests[at] for at in batch])
                for at, (row, encoded, is_suspect) in zip(batch, drawn, strict=True):
                    writer.add(row, encoded)
                    if is_suspect:
                        suspects.append(Suspect(*at, row.error or ""))
                    elif encoded is not None:
                        healthy = healthy or at
                self.images_done += len(batch)
                self._check_cancelled()
            for (i, _), request in requests.items():
                if i in reasons:
                    writer.add(ImageRow(request, "quarantined", error=reasons[i]), None)
            written = writer.finish()
            for file in written.files:
                store.put_file(file.path, scratch / file.path, self._step)
        segment = self.timeline.close("shard", shard.shard_id, lease.attempt_id)
        carried = self.timeline.take()
        errors = Counter(r.error for r in written.rows if r.error)
        counts = RowCounts.of((r.status, r.width) for r in written.rows)
        commit = Commit(
            shard_id=shard.shard_id,
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
            errors=_top_errors(errors),
            t_start_wall_ns=t_start,
            t_end_wall_ns=time.time_ns(),
            energy_mj=self._energy_mj(segment),
            energy_domains=tuple(sorted(segment.close.energy_mj)),
            energy_estimate_mj=segment_estimate_mj(segment),
            energy_method=self.meter.method,
            segments=carried,
            power=self.power.take(),
            rows=carried_rows(written.rows),
            worker_id=self.worker.worker_id,
            node_id=self.worker.node_id,
            host=self.worker.host,
            device=self.worker.device,
        )
        body = commit.to_json()
        if suspects:
            return AttemptResult(lease, "suspect", body, tuple(suspects), healthy)
        if not self.config.commits_exclusively:
            return AttemptResult(lease, "prepared", body)
        try:
            store.put_exclusive(commit_key(shard.shard_id), body)
        except AlreadyExistsError:
            log.info("shard %d: another attempt committed first; discarding ours", shard.shard_id)
            self.timeline.restore(  # what it used is waste
                replace(s, segment_class="loser") if s.attempt_id == lease.attempt_id else s for s in carried
            )
            self.power.restore(commit.power)
            store.delete([f.path for f in commit.files])
            return AttemptResult(lease, "exists", store.get(commit_key(shard.shard_id)))
        except MillijouleError:
            self.timeline.restore(carried)
            self.power.restore(commit.power)
            raise
        return AttemptResult(lease, "committed", body)

    def _requests(self, lease: Lease) -> dict[tuple[int, int], ImageRequest]:
        """The shard's images by (row, image index), in plan order."""
        return {
            (i, request.image_index): request
            for i, row in enumerate(read_shard_rows(self.store, lease.shard))
            for request in shard_requests([row], self.config.job_seed)
        }

    def _generate(self, batch: Sequence[ImageRequest]) -> Iterator[tuple[ImageRow, bytes | None, bool]]:
        """Rows and images of `batch`, in order; a request the generator fails on stands alone, without an image.

        The last is True where that failure is this worker's word alone, so that another has to confirm it.
        """
        info = self.generator.info
        for requests, outcome in self.drawing.isolate(batch, self._check_health):
            self._step()
            if isinstance(outcome, Exception):
                reason = _reason(outcome)
                log.warning("%s: cannot be drawn: %s", requests[0].source or requests[0].prompt_id, reason)
                row = ImageRow(requests[0], "quarantined", error=reason)
                yield row, None, not isinstance(outcome, RowError)
                continue
            for request, image, words, rejected in zip(
                requests, outcome.images, outcome.warnings, outcome.rejected, strict=True
            ):
                height, width = image.shape[:2]
                steps = request.num_inference_steps or info.num_inference_steps
                made = ImageRow(
                    request, "ok", width=width, height=height, num_inference_steps=steps, warnings=words
                )
                if rejected is not None:
                    status, reason = rejected.status, rejected.reason[:MAX_ERROR_CHARS]
                    log.warning("%s: %s: %s", request.source or request.prompt_id, status, reason)
                    # what a safety checker says is said of the image; numbers that are none may be the device's fault
                    yield replace(made, status=status, error=reason), None, status == "quarantined"
                    continue
                encoded = encode_png(
                    image, request, steps=steps, model_name=info.name, model_sha256=info.sha256
                )
                self._step()
                yield made, encoded, False
            self._served = requests[0]

    def calibrate(self, requests: Sequence[ImageRequest]) -> Calibration:
        """Draw and encode `requests` and throw them away."""
        self.timeline.close("idle")
        began, size, images = time.monotonic(), 0, 0
        for batch in self.drawing.batches(dict(enumerate(requests))):
            for _, encoded, _ in self._generate([requests[i] for i in batch]):
                if encoded is not None:
                    size, images = size + len(encoded), images + 1
        seconds = time.monotonic() - began
        segment = self.timeline.close("warmup")
        energy_mj, estimate_mj = self._energy_mj(segment), segment_estimate_mj(segment)
        return Calibration(images, seconds, size, energy_mj, estimate_mj, self.meter.method)

    def _energy_mj(self, segment: Segment) -> int | None:
        """Measured millijoules of `segment`; None where one of this worker's own devices was not read."""
        devices = self.worker.gpus or (self.worker.device,)
        unread = unread_domains(devices, segment.close.energy_mj)
        return None if unread else segment_energy_mj(segment)

    def warm_up(self, request: ImageRequest) -> None:
        """Draw one image, so that the first shard does not pay for start-up; remembered as the health check.

        Raises:
            SickWorkerError: it cannot be drawn.
        """
        self._draw_healthy(request)
        self._served = request

    def _step(self) -> None:
        self.steps += 1  # from any thread: one that is lost beside another does not matter

    def _between_steps(self) -> None:
        self._step()
        # a generator may report steps from threads of its own, which have nothing to unwind
        if threading.get_ident() == self._thread:
            self._check_cancelled()

    def _check_cancelled(self) -> None:
        if self.cancelled is not None and self.cancelled == self.attempt_id:
            raise AttemptCancelled

    def _check_health(self) -> None:
        if self._served is not None:
            self._draw_healthy(self._served)

    def _draw_healthy(self, request: ImageRequest) -> None:
        try:
            self.drawing.draw_one(request)
        except (AttemptCancelled, NodeError):
            raise
        except Exception as error:
            what = "does not work" if self._served is None else "no longer works"
            raise SickWorkerError(f"the generator {what} on this device: {_reason(error)}") from error


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


def _batch_sizer(config: WorkerConfig, generator: Generator, worker: WorkerEnvironment) -> BatchSizer:
    about = {
        "model": generator.info.sha256,
        "name": generator.info.name,
        "device": worker.device_name,
        "options": asdict(config.options),
        "cpu_threads": config.cpu_threads,
    }
    return BatchSizer(batch_limits(generator, config.options.batch_size), BatchNotes(about))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]


def _top_errors(errors: Counter[str]) -> dict[str, int]:
    top = dict(errors.most_common(MAX_ERROR_KINDS))
    rest = errors.total() - sum(top.values())
    return {**top, "other": rest} if rest else top
