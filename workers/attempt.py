"""One attempt at one shard: rows -> images -> data files -> commit.

The order of steps is the commit protocol (docs/commit-protocol.md): data objects under attempt-unique names
first, the shard's commit by exclusive create last. Whatever dies in between leaves files nobody refers to.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from millijoule.workers.encode import encode_png
from millijoule.workers.errors import AlreadyExistsError, MillijouleError
from millijoule.workers.generator import Generator, ReportsSteps
from millijoule.workers.lease import (
    AttemptResult,
    Calibration,
    Lease,
    WorkerConfig,
    commit_key,
    data_prefix,
)
from millijoule.workers.meter import EnergyMeter
from millijoule.workers.own_devices import unread_domains
from millijoule.workers.power_samples import PowerSampler
from millijoule.workers.schemas import Commit, ImageRequest, ImageRow, Segment
from millijoule.workers.shard_rows import PlanRow, read_shard_rows, shard_requests
from millijoule.workers.storage import Store
from millijoule.workers.timeline import SegmentTimeline, segment_energy_mj, segment_estimate_mj
from millijoule.workers.writers import open_writer

log = logging.getLogger(__name__)

#: A commit names at most this many kinds of error; the rest is counted under "other".
MAX_ERROR_KINDS = 20

#: Longest error text kept per row.
MAX_ERROR_CHARS = 500


class AttemptCancelled(Exception):
    """The driver called this attempt off between two batches."""


class SickWorkerError(RuntimeError):
    """The generator fails on a request it has served before: the device, not a prompt, is at fault."""


@dataclass(frozen=True)
class Where:
    """A worker's place: Ray's node id, host name, UUID of its (first) GPU or "cpu", and all its GPUs."""

    worker_id: str
    node_id: str
    host: str
    device: str
    gpus: tuple[str, ...] = ()


class AttemptRunner:
    """Runs leases one after another with one loaded generator.

    Args:
        where: this worker, as commits name it.
        on_images: called with the number of images finished in the running attempt, between batches; may raise
            `AttemptCancelled`.
        power: gives commits the power samples to carry; None: they carry none.
        on_step: called, from any thread, whenever an attempt got further: what keeps its lease during a long batch or
            upload. Never called while nothing moves.
    """

    def __init__(
        self,
        config: WorkerConfig,
        store: Store,
        generator: Generator,
        meter: EnergyMeter,
        timeline: SegmentTimeline,
        where: Where,
        on_images: Callable[[int], None],
        power: PowerSampler | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.store = store
        self.generator = generator
        self.meter = meter
        self.timeline = timeline
        self.where = where
        self.on_images = on_images
        self.power = power
        self.on_step = on_step
        if isinstance(generator, ReportsSteps):
            generator.on_step = on_step
        self.batch_size = config.batch_size or generator.info.batch_size
        self._served: ImageRequest | None = None

    def run(self, lease: Lease) -> AttemptResult:
        """Attempt `lease`.

        Raises:
            StoreError: storage failed; nothing was committed by this attempt, or it cannot be known.
            SickWorkerError: this worker must not be used again.
        """
        self.timeline.close("idle")
        try:
            if lease.probe_rows is not None:
                self._probe(lease)
                self.timeline.close("retry", lease.shard.shard_id, lease.attempt_id)
                return AttemptResult(lease, "probed")
            return self._attempt(lease)
        except AttemptCancelled:
            self.timeline.close("loser", lease.shard.shard_id, lease.attempt_id)
            return AttemptResult(lease, "cancelled")
        except MillijouleError:
            self.timeline.close("retry", lease.shard.shard_id, lease.attempt_id)
            raise

    def _probe(self, lease: Lease) -> None:
        assert lease.probe_rows is not None
        rows = read_shard_rows(self.store, lease.shard)[slice(*lease.probe_rows)]
        done = 0
        for batch in batches(shard_requests(rows, self.config.job_seed), self.batch_size):
            for _ in self._generate(batch):
                done += 1
            self.on_images(done)

    def _attempt(self, lease: Lease) -> AttemptResult:
        shard, store = lease.shard, self.store
        t_start = time.time_ns()
        rows = read_shard_rows(store, shard)
        with tempfile.TemporaryDirectory(prefix="millijoule-") as scratch:
            writer = open_writer(
                self.config.output_format, Path(scratch), data_prefix(shard.shard_id, lease.attempt_id)
            )
            done = 0
            for batch in batches(self._wanted(rows, lease), self.batch_size):
                for row, encoded in self._generate(batch):
                    writer.add(row, encoded)
                    done += 1
                self.on_images(done)
            for request in self._skipped(rows, lease):
                writer.add(ImageRow(request, "quarantined", error=lease.skip_reason), None)
            written = writer.finish()
            files = tuple(f.as_data_file() for f in written.files)
            for f in written.files:
                store.put_file(f.key, f.path, self.on_step)
        segment = self.timeline.close("shard", shard.shard_id, lease.attempt_id)
        carried = self.timeline.take()
        errors = Counter(r.error for r in written.rows if r.error)
        ok = sum(r.status == "ok" for r in written.rows)
        commit = Commit(
            shard_id=shard.shard_id,
            attempt_id=lease.attempt_id,
            driver_epoch=self.config.driver_epoch,
            plan_fingerprint=self.config.fingerprint,
            model_sha256=self.config.model_sha256,
            files=files,
            rows_path=written.rows_key,
            images_ok=ok,
            images_quarantined=len(written.rows) - ok,
            errors=_top_errors(errors),
            t_start_wall_ns=t_start,
            t_end_wall_ns=time.time_ns(),
            energy_mj=self._energy_mj(segment),
            energy_domains=tuple(sorted(segment.close.energy_mj)),
            energy_estimate_mj=segment_estimate_mj(segment),
            energy_method=self.meter.method,
            segments=carried,
            power=self.power.take() if self.power else (),
            worker_id=self.where.worker_id,
            node_id=self.where.node_id,
            host=self.where.host,
            device=self.where.device,
        )
        body = commit.to_json()
        if not self.config.commits_exclusively:
            return AttemptResult(lease, "prepared", body)
        try:
            store.put_exclusive(commit_key(shard.shard_id), body)
        except AlreadyExistsError:
            log.info("shard %d: another attempt committed first; discarding ours", shard.shard_id)
            self.discard(commit)
            return AttemptResult(lease, "exists", store.get(commit_key(shard.shard_id)))
        except MillijouleError:
            self.timeline.restore(carried)
            self._restore_power(commit)
            raise
        return AttemptResult(lease, "committed", body)

    def discard(self, commit: Commit) -> None:
        """Give up an attempt that lost: its energy becomes waste, its files go."""
        self.timeline.restore(
            tuple(
                replace(s, segment_class="loser") if s.attempt_id == commit.attempt_id else s
                for s in commit.segments
            )
        )
        self._restore_power(commit)
        self.store.delete([f.path for f in commit.files])

    def _restore_power(self, commit: Commit) -> None:
        if self.power:
            self.power.restore(commit.power)

    def _wanted(self, rows: Sequence[PlanRow], lease: Lease) -> list[ImageRequest]:
        skip = set(lease.skip_rows)
        return shard_requests([r for i, r in enumerate(rows) if i not in skip], self.config.job_seed)

    def _skipped(self, rows: Sequence[PlanRow], lease: Lease) -> list[ImageRequest]:
        return shard_requests([rows[i] for i in lease.skip_rows], self.config.job_seed)

    def _generate(self, batch: Sequence[ImageRequest]) -> Iterator[tuple[ImageRow, bytes | None]]:
        """Images of `batch`, in order; a request the generator fails on is quarantined alone."""
        info = self.generator.info
        for requests, outcome in isolate(self.generator, batch, self._check_health):
            self.on_step()
            if isinstance(outcome, Exception):
                reason = f"{type(outcome).__name__}: {outcome}"[:MAX_ERROR_CHARS]
                log.warning("%s: quarantined: %s", requests[0].source or requests[0].prompt_id, reason)
                yield ImageRow(requests[0], "quarantined", error=reason), None
                continue
            images, warnings = outcome
            for request, image, words in zip(requests, images, warnings, strict=True):
                height, width = image.shape[:2]
                steps = request.num_inference_steps or info.num_inference_steps
                encoded = encode_png(
                    image,
                    request,
                    width=width,
                    height=height,
                    steps=steps,
                    model_name=info.name,
                    model_sha256=info.sha256,
                )
                self.on_step()
                yield (
                    ImageRow(
                        request, "ok", width=width, height=height, num_inference_steps=steps, warnings=words
                    ),
                    encoded,
                )
            self._served = requests[0]
            self.timeline.touch()

    def calibrate(self, requests: Sequence[ImageRequest]) -> Calibration:
        """Draw and encode `requests` and throw them away."""
        self.timeline.close("idle")
        began, size, images = time.monotonic(), 0, 0
        for batch in batches(requests, self.batch_size):
            for _, encoded in self._generate(batch):
                if encoded is not None:
                    size, images = size + len(encoded), images + 1
        seconds = time.monotonic() - began
        segment = self.timeline.close("warmup")
        return Calibration(
            images,
            seconds,
            size,
            self._energy_mj(segment),
            segment_estimate_mj(segment),
            self.meter.method,
        )

    def _energy_mj(self, segment: Segment) -> int | None:
        """Measured millijoules of `segment`; None where one of this worker's own devices was not read."""
        devices = self.where.gpus or (self.where.device,)
        unread = unread_domains(devices, segment.close.energy_mj)
        return None if unread else segment_energy_mj(segment)

    def warm_up(self, request: ImageRequest) -> None:
        """Draw one image, so that the first shard does not pay for start-up; remembered as the health check."""
        self.generator.generate([request])
        self._served = request

    def _check_health(self) -> None:
        if self._served is None:
            return
        try:
            self.generator.generate([self._served])
        except Exception as error:
            raise SickWorkerError(f"the generator no longer works on this device: {error}") from error


Outcome = Exception | tuple[np.ndarray, Sequence[tuple[str, ...]]]


def isolate(
    generator: Generator, batch: Sequence[ImageRequest], check_health: Callable[[], None]
) -> Iterator[tuple[Sequence[ImageRequest], Outcome]]:
    """Generate `batch`; where that raises, halve until the failing requests stand alone.

    Yields `(requests, (images, warnings))` for parts that worked, `([request], error)` for one that did not.
    `check_health` is called after each failure and may raise to say that no request is to blame.
    """
    try:
        out = generator.generate(batch)
    except Exception as error:
        check_health()
        if len(batch) == 1:
            yield batch, error
            return
        middle = len(batch) // 2
        yield from isolate(generator, batch[:middle], check_health)
        yield from isolate(generator, batch[middle:], check_health)
        return
    yield batch, (out.images, out.warnings or tuple(() for _ in batch))


def batches(requests: Sequence[ImageRequest], size: int) -> Iterator[Sequence[ImageRequest]]:
    """Consecutive slices of at most `size` requests."""
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def _top_errors(errors: Counter[str]) -> dict[str, int]:
    top = dict(errors.most_common(MAX_ERROR_KINDS))
    rest = errors.total() - sum(top.values())
    return {**top, "other": rest} if rest else top
