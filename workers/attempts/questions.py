"""Leases that make nothing and only ask: do these rows kill the process, do these images fail here, too?

On the device's thread, like all drawing. docs/failure-domains.md says who asks and what follows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from millijoule.workers.attempts.attempt import Attempt
from millijoule.workers.attempts.drawing import MAX_ERROR_CHARS, Drawing, Requests, reason
from millijoule.workers.drawing.isolate import AttemptCancelled
from millijoule.workers.errors import NodeError
from millijoule.workers.lease import AttemptResult, Suspect
from millijoule.workers.schemas import ImageRequest

#: A probe's rows have survived only if their process still works this long after them: a signal to another thread, or
#: the host's out-of-memory killer, comes a moment after the request has returned.
PROBE_LINGER_S = 1.0


def probe(drawing: Drawing, attempt: Attempt, requests: Sequence[ImageRequest]) -> AttemptResult:
    """Draw some rows. What they raise is no matter here: the question is whether the process survives them."""
    with drawing.at_work_for(attempt, "retry"):
        for _ in drawing.batches_of(attempt, {(i, 0): request for i, request in enumerate(requests)}):
            pass
        time.sleep(PROBE_LINGER_S)
        drawing.check_health()
    return AttemptResult(attempt.lease, "probed")


def confirm(drawing: Drawing, attempt: Attempt, requests: Requests) -> AttemptResult:
    """Draw suspects, each alone beside a healthy request; the first that can be drawn ends it.

    Raises:
        NodeError: memory does not suffice for one of them: that says nothing about it.
        SickWorkerError: the healthy request fails here: this worker's word counts for nothing.
    """
    lease = attempt.lease
    healthy = drawing.served if lease.healthy is None else requests[lease.healthy]
    confirmed: list[Suspect] = []
    with drawing.at_work_for(attempt, "retry"):
        for suspect in lease.confirm:
            attempt.check()
            if healthy is not None:
                drawing.draw_healthy(healthy)
            try:
                (rejected,) = drawing.fitted.draw_one(requests[suspect.row, suspect.image_index]).rejected
            except (AttemptCancelled, NodeError):
                raise
            except Exception as error:
                confirmed.append(replace(suspect, reason=reason(error)))
            else:
                if rejected is None or not rejected.may_be_the_device:
                    return AttemptResult(lease, "contradicted", suspects=(suspect,))
                confirmed.append(replace(suspect, reason=rejected.reason[:MAX_ERROR_CHARS]))
            attempt.step()
        if healthy is not None:
            drawing.draw_healthy(healthy)
    return AttemptResult(lease, "confirmed", suspects=tuple(confirmed))
