"""A worker's side of leases: one is drawn, the one before is finished, and the next one has read its rows.

Threads: whoever calls `run` (two callers at most) reads the shard's rows and finishes the attempt; the device's thread, one,
draws attempt after attempt in the order in which they were ready; encoders stand between them. All belong to the runner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import TypeVar

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.drawing import DeviceTime, Drawing, Requests, now_wall_ns
from millijoule.workers.attempts.encoding import Encoders, parts_of
from millijoule.workers.attempts.finishing import NOTHING_TAKEN, Finishing
from millijoule.workers.attempts.handover import ByteBudget, Handover
from millijoule.workers.attempts.parts import Expected, LeaseClock, PartClock, take_parts
from millijoule.workers.attempts.questions import confirm, probe
from millijoule.workers.drawing.batch_size import BatchNotes, BatchSizer
from millijoule.workers.drawing.isolate import AttemptCancelled, FittedGenerator, batch_limits
from millijoule.workers.errors import NodeError, SickWorkerError
from millijoule.workers.generators.protocol import Generator, HoldsProcesses, StatesSettings
from millijoule.workers.lease import AttemptProgress, AttemptResult, Calibration, Lease, WorkerConfig
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline, segment_estimate_mj
from millijoule.workers.schemas import ImageRequest, WorkerEnvironment
from millijoule.workers.shard_rows import read_shard_rows, requests_by_place, shard_requests
from millijoule.workers.storage.protocol import Store

#: Pixels that are drawn and not written yet, of all attempts of a worker: two batches of 16 images of 1024x1024.
MAX_WAITING_BYTES = 128 << 20

T = TypeVar("T")


def device_thread() -> ThreadPoolExecutor:
    """The one thread that talks to a device: models, graphs and libraries hold state per thread."""
    return ThreadPoolExecutor(1, "device")


class AttemptRunner:
    """Runs leases with one loaded generator. How far each got may be asked, and each called off, from any thread.

    `sealing` is what it takes here until what was drawn counts.

    Args:
        worker: this one, as commits name it.
        power: gives commits the power samples to carry.
        device: the thread on which the generator was loaded, see `device_thread`; None: one of its own.
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
        device: ThreadPoolExecutor | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.generator = generator
        self.timeline = timeline
        self.worker = worker
        fitted = FittedGenerator(
            generator, _batch_sizer(config, generator, worker), worker.device_name or worker.device
        )
        self.drawing = Drawing(fitted, timeline, power)
        self.finishing = Finishing(config, store, meter, timeline, power, worker)
        self.budget = ByteBudget(MAX_WAITING_BYTES)
        self._encoders = Encoders(config.cpu_threads, config.image_format, generator.info)
        self._device = device or device_thread()
        self._changed = threading.Condition()
        self.sealing = Expected()
        self._at_work: dict[str, tuple[Attempt, Handover | None]] = {}  # by attempt id, in order
        self._leaves = False

    def run(self, lease: Lease) -> AttemptResult:
        """Attempt `lease`; returns once it is committed, or otherwise ended. Two callers at a time overlap.

        Raises:
            StoreError: storage failed; nothing was committed by this attempt, or it cannot be known.
            NodeError: this worker must not be used again; another node may do better.
        """
        attempt = Attempt(lease)
        with self._changed:
            if self._leaves:
                return AttemptResult(lease, "cancelled")
            if (sick := self.drawing.sick) is not None:
                # the attempt that found out may have ended otherwise: called off, or because storage failed as well
                raise SickWorkerError(*sick.args)
            self._at_work[lease.attempt_id] = attempt, None
        try:
            return self._run(attempt)
        except AttemptCancelled:
            return AttemptResult(lease, "cancelled")
        except MemoryError as error:
            raise NodeError(
                f"{self.worker.host}: out of memory ({error}); give workers more, or start fewer on a node"
            ) from error
        finally:
            with self._changed:
                del self._at_work[lease.attempt_id]
                self._changed.notify_all()

    def _run(self, attempt: Attempt) -> AttemptResult:
        lease = attempt.lease
        rows = read_shard_rows(self.store, lease.shard)
        if lease.probe_rows is not None:
            asked = shard_requests(rows[slice(*lease.probe_rows)], self.config.job_seed)
            return self._on_device(lambda: probe(self.drawing, attempt, asked))
        requests: Requests = requests_by_place(rows, self.config.job_seed)
        if lease.confirm:
            return self._on_device(lambda: confirm(self.drawing, attempt, requests))
        wanted = requests
        if skipped := {row for row, _ in lease.quarantine}:
            wanted = {at: request for at, request in requests.items() if at[0] not in skipped}
        taken = take_parts(self.store, self.config, lease, requests) if lease.resumes else NOTHING_TAKEN
        if taken.rows:
            wanted = {at: request for at, request in wanted.items() if at not in taken.rows}
            attempt.images_done = len(taken.rows)
        attempt.step()
        handover = Handover(attempt, self._encoders, self.budget)
        due = PartClock(self.config.part_s, self.sealing)
        with self._changed:
            attempt.check()
            attempt.waits = True
            handover.begin(self._device, lambda to: self._draw(attempt, wanted, due, to))
            self._at_work[lease.attempt_id] = attempt, handover
        result = self.finishing.finish(attempt, requests, handover, taken)
        if result.outcome == "committed":
            due.stands()
        return result

    def _draw(self, attempt: Attempt, requests: Requests, due: PartClock, handover: Handover) -> DeviceTime:
        """On the device's thread."""
        self._check_device()
        began_wall_ns = now_wall_ns()
        with self.drawing.at_work_for(attempt, "shard"):
            due.begin()
            left = len(requests)
            limit = LeaseClock(attempt.lease.at_most_s, left)
            is_worth_it = False  # rows of which only this worker says that they fail are in no part
            for batch in self.drawing.batches_of(attempt, requests):
                handover.put(batch)
                left -= len(batch)
                is_worth_it = is_worth_it or not all(drawn.is_suspect for drawn in batch)
                is_over = limit.is_over(batch)
                ends = (attempt.leaves or is_over) and left > 0  # what is drawn to its end is committed
                if (due.drew(left) or ends) and is_worth_it:
                    due.cut()
                    handover.seal(self.drawing.stretch(attempt, began_wall_ns), due.stands)
                    is_worth_it = False
                if ends:
                    raise AttemptCancelled
            due.cut()
        return self.drawing.device_time(began_wall_ns)

    def _check_device(self) -> None:
        """What waited for a device that turned out sick is not drawn there."""
        if self.drawing.sick is not None:
            raise AttemptCancelled

    def _on_device(self, work: Callable[[], T]) -> T:
        def checked() -> T:
            self._check_device()
            return work()

        return self._device.submit(checked).result()

    # -- from any thread -----------------------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[AttemptProgress, ...]:
        """Of each attempt at work, in the order of their leases."""
        with self._changed:
            return tuple(attempt.progress for attempt, _ in self._at_work.values())

    def cancel(self, attempt_id: str) -> None:
        """Call an attempt off: it ends after its current batch, or without being drawn."""
        with self._changed:
            attempt, handover = self._at_work.get(attempt_id, (None, None))
            if attempt is not None:
                attempt.cancel()
            if handover is not None:
                handover.withdraw()

    def give_back(self, attempt_id: str) -> bool:
        """Call an attempt off if its drawing has not begun; False where it has."""
        with self._changed:
            attempt, handover = self._at_work.get(attempt_id, (None, None))
            if attempt is None or not attempt.lease.writes or (handover and not handover.withdraw()):
                return False
            attempt.cancel()
            return True

    def leave(self) -> None:
        """The worker is about to end: every attempt ends after the batch that is drawn, and what it has made is sealed.

        What cannot be sealed, because it waits for its device or asks a question, is called off, and so is a lease that comes now:
        it may have been on its way.
        """
        with self._changed:
            self._leaves = True
            for attempt, handover in self._at_work.values():
                attempt.leaves = True
                if handover is None or handover.withdraw():
                    attempt.cancel()

    def close(self) -> None:
        """Wait until no attempt is at work, and end the threads."""
        with self._changed:
            self._changed.wait_for(lambda: not self._at_work)
        if isinstance(self.generator, HoldsProcesses):
            self._device.submit(self.generator.close).result()
        self._device.shutdown()
        self._encoders.close()

    def stated(self, worker: WorkerEnvironment) -> WorkerEnvironment:
        """`worker`, with how its generator was loaded and is called."""
        generator, info = self.generator, self.generator.info
        settings = generator if isinstance(generator, StatesSettings) else None
        return replace(
            worker,
            engine=settings.engine_name if settings else None,
            rungs=settings.rungs_words if settings else None,
            batch_size=self.drawing.fitted.sizer.most((info.width, info.height)),
        )

    # -- beside leases -------------------------------------------------------------------------------------------

    def warm_up(self, request: ImageRequest) -> None:
        """See `Drawing.warm_up`."""
        self._device.submit(self.drawing.warm_up, request).result()

    def calibrate(self, requests: Sequence[ImageRequest]) -> Calibration:
        """Draw and encode `requests`, throw them away, and say what that took."""
        return self._device.submit(self._calibrate, requests).result()

    def _calibrate(self, requests: Sequence[ImageRequest]) -> Calibration:
        self.timeline.close("idle")
        began, encoding = time.monotonic(), []
        for batch in self.drawing.batches_of(None, {(i, 0): r for i, r in enumerate(requests)}):
            encoding += [self._encoders.begin(part) for part in parts_of(batch)]
        encoded = [len(e) for part in encoding for e in part.result() if isinstance(e, bytes)]
        seconds = time.monotonic() - began
        segment = self.timeline.close("warmup")
        return Calibration(
            images=len(encoded),
            seconds=seconds,
            encoded_bytes=sum(encoded),
            energy_mj=self.finishing.energy_mj(segment),
            energy_estimate_mj=segment_estimate_mj(segment),
            energy_method=self.finishing.meter.method,
        )


def _batch_sizer(config: WorkerConfig, generator: Generator, worker: WorkerEnvironment) -> BatchSizer:
    about = {
        "model": generator.info.sha256,
        "name": generator.info.name,
        "device": worker.device_name,
        "options": asdict(config.options),
        "cpu_threads": config.cpu_threads,
    }
    return BatchSizer(batch_limits(generator, config.options.batch_size), BatchNotes(about))
