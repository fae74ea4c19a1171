"""The first stage of an attempt: what the device's thread does. It alone talks to the generator and closes segments.

A worker draws one attempt at a time, so its device's time is a gapless chain: the segment of an attempt is the time from its
first draw to its last. What becomes of the images goes on beside it (`workers.attempts.finishing`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.encoding import DrawnImage
from millijoule.workers.drawing.isolate import AttemptCancelled, FittedGenerator
from millijoule.workers.errors import NodeError, RowError, SickWorkerError
from millijoule.workers.generators.protocol import GeneratedBatch, ReportsSteps
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.meters.segment_timeline import SegmentTimeline
from millijoule.workers.schemas import ImageRequest, ImageRow, PowerTrace, Segment

log = logging.getLogger(__name__)

#: Longest error text kept per row.
MAX_ERROR_CHARS = 500

#: An image of a shard by (row, image index), in plan order.
Requests = Mapping[tuple[int, int], ImageRequest]


@dataclass(frozen=True)
class DeviceTime:
    """The device's part of an attempt that was drawn to its end.

    `segments` and `power` are all that was closed and sampled since the attempt before, this one's `segment` included: they
    are for this attempt's commit, or to be restored.
    """

    segment: Segment
    segments: tuple[Segment, ...]
    power: tuple[PowerTrace, ...]
    began_wall_ns: int


class Drawing:
    """One loaded generator and its device. All methods are for the device's thread.

    Args:
        fitted: the generator, in calls that fit the device.
        power: gives attempts the power samples to carry.
    """

    def __init__(self, fitted: FittedGenerator, timeline: SegmentTimeline, power: PowerSampler) -> None:
        self.fitted = fitted
        self.generator = generator = fitted.generator
        self.timeline = timeline
        self.power = power
        self.served: ImageRequest | None = None  # a request that was drawn: the health check
        self.sick: SickWorkerError | None = None  # the device failed on what it drew before
        self._attempt: Attempt | None = None
        self._thread = 0
        if isinstance(generator, ReportsSteps):
            generator.on_step = self._between_steps

    @contextmanager
    def at_work_for(self, attempt: Attempt, segment_class: str) -> Iterator[None]:
        """The device's time in this block is the attempt's: a segment of `segment_class`, whose last read ends it.

        Called off it is a "loser", and after an error a "retry".
        """
        lease = attempt.lease
        self.timeline.close("idle")
        self._attempt, self._thread = attempt, threading.get_ident()
        attempt.begin()
        ended_as = "retry"
        try:
            yield
            ended_as = segment_class
        except AttemptCancelled:
            ended_as = "loser"
            raise
        except SickWorkerError as error:
            self.sick = error
            raise
        finally:
            self._attempt = None
            self.timeline.close(ended_as, lease.shard.shard_id, lease.attempt_id)

    def batches_of(self, attempt: Attempt | None, requests: Requests) -> Iterator[list[DrawnImage]]:
        """All of `requests`, drawn batch by batch, those together that can share a call; one the generator fails on has no image.

        Args:
            attempt: for which it is done; None: a calibration.

        Raises:
            SickWorkerError: the device fails on what it drew before.
            NodeError: its memory does not suffice for one image.
            AttemptCancelled, Abandoned: see `Attempt.check`.
        """
        for places in self.fitted.batches(requests):
            if attempt is not None:
                attempt.check()
            yield self._draw_batch(places, [requests[at] for at in places])
            if attempt is not None:
                attempt.images_done += len(places)

    def _draw_batch(
        self, places: Sequence[tuple[int, int]], requests: Sequence[ImageRequest]
    ) -> list[DrawnImage]:
        drawn: list[DrawnImage] = []
        at = iter(places)
        for part, outcome in self.fitted.isolate(requests, self.check_health):
            self._step()
            if isinstance(outcome, Exception):
                why = reason(outcome)
                log.warning("%s: cannot be drawn: %s", part[0].source or part[0].prompt_id, why)
                row = ImageRow(part[0], "quarantined", error=why)
                drawn.append(DrawnImage(next(at), row, is_suspect=not isinstance(outcome, RowError)))
                continue
            height, width = outcome.images.shape[1:3]
            own_steps = self.generator.info.num_inference_steps
            if outcome.rejected.count(None) == len(part):
                drawn += _all_drawn(islice(at, len(part)), part, outcome, own_steps)
                self.served = part[0]
                continue
            for request, image, words, rejected in zip(
                part, outcome.images, outcome.warnings, outcome.rejected, strict=True
            ):
                steps = request.num_inference_steps or own_steps
                row = ImageRow(
                    request, "ok", width=width, height=height, num_inference_steps=steps, warnings=words
                )
                if rejected is None:
                    drawn.append(DrawnImage(next(at), row, image))
                    continue
                status, why = rejected.status, rejected.reason[:MAX_ERROR_CHARS]
                log.warning("%s: %s: %s", request.source or request.prompt_id, status, why)
                if rejected.certain:  # the device has not worked for it
                    row = ImageRow(request, status, error=why, warnings=words)
                else:
                    row = row._replace(status=status, error=why)
                drawn.append(DrawnImage(next(at), row, is_suspect=rejected.may_be_the_device))
            kept = (r for r, why in zip(part, outcome.rejected, strict=True) if why is None)
            self.served = next(kept, self.served)
        return drawn

    def device_time(self, began_wall_ns: int) -> DeviceTime:
        """What the attempt that was just drawn takes along."""
        segments = self.timeline.take()
        return DeviceTime(segments[-1], segments, self.power.take(), began_wall_ns)

    def stretch(self, attempt: Attempt, began_wall_ns: int) -> DeviceTime:
        """Within `at_work_for`: what the attempt takes along of its drawing so far; the next stretch begins."""
        self.timeline.close("shard", attempt.lease.shard.shard_id, attempt.lease.attempt_id)
        return self.device_time(began_wall_ns)

    def warm_up(self, request: ImageRequest) -> None:
        """Draw one image, so that the first shard does not pay for start-up; remembered as the health check.

        Raises:
            SickWorkerError: it cannot be drawn.
        """
        self.draw_healthy(request)
        self.served = request

    def check_health(self) -> None:
        """Draw again what was drawn before; raises SickWorkerError where that fails."""
        if self.served is not None:
            self.draw_healthy(self.served)

    def draw_healthy(self, request: ImageRequest) -> None:
        """Draw what is known to be drawable; raises SickWorkerError where that fails."""
        what = "does not work" if self.served is None else "no longer works"
        try:
            (rejected,) = self.fitted.draw_one(request).rejected
        except (AttemptCancelled, NodeError):
            raise
        except Exception as error:
            raise SickWorkerError(f"the generator {what} on this device: {reason(error)}") from error
        if rejected is not None and rejected.may_be_the_device:
            raise SickWorkerError(f"the generator {what} on this device: {rejected.reason}")

    def _step(self) -> None:
        if (attempt := self._attempt) is not None:
            attempt.step()

    def _between_steps(self) -> None:
        attempt = self._attempt
        if attempt is None:
            return
        attempt.step()
        # a generator may report steps from threads of its own, which have nothing to unwind
        if threading.get_ident() == self._thread and attempt.cancelled:
            raise AttemptCancelled


def _all_drawn(
    places: Iterator[tuple[int, int]],
    requests: Sequence[ImageRequest],
    batch: GeneratedBatch,
    own_steps: int,
) -> Iterator[DrawnImage]:
    """Images of which none was rejected: tuples are made of columns, without a constructor's call for each."""
    height, width = batch.images.shape[1:3]
    steps = [request.num_inference_steps or own_steps for request in requests]
    nothing = repeat(None)
    rows = zip(
        *(requests, repeat("ok"), repeat(width), repeat(height), steps),
        *(nothing, nothing, nothing, nothing, batch.warnings),
        strict=False,
    )
    drawn = zip(places, map(ImageRow._make, rows), batch.images, repeat(False), strict=False)
    return map(DrawnImage._make, drawn)


def now_wall_ns() -> int:
    """Nanoseconds since 1970."""
    return time.time_ns()


def reason(error: Exception) -> str:
    """An error in words that a row can carry."""
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
