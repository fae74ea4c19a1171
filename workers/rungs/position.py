"""Where in its schedule a call of the pipeline stands: what rungs that differ from step to step go by.

A pipeline evaluates its denoiser, then takes a step of its scheduler; between two of the latter all evaluations are of one
step. How many there will be is the length of the scheduler's list of time steps: two per step for second-order ones.
"""

from __future__ import annotations

import functools
import math
from typing import Any


class Position:
    """Follows one pipeline's scheduler.

    Attributes:
        rows: images of the running call.
        index: of the running step, from 0.
        calls: of the denoiser in the running step, so far.
        kept: what rungs keep of earlier steps of the running call, each under a key of its own; gone after the last step.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.rows = 0
        self.index = 0
        self.calls = 0
        self.kept: dict[object, Any] = {}

    def begin(self, rows: int) -> None:
        """A call for `rows` images begins."""
        self.rows, self.index, self.calls = rows, 0, 0
        self.kept.clear()
        scheduler = self._pipeline.scheduler
        if not hasattr(scheduler.step, "counts_for"):
            self._follow(scheduler)

    @property
    def total(self) -> int:
        """Steps of the running call, as the scheduler counts them."""
        return len(self._pipeline.scheduler.timesteps)

    @property
    def timestep(self) -> float:
        """Of the running step."""
        return float(self._pipeline.scheduler.timesteps[min(self.index, self.total - 1)])

    def is_past(self, part: float) -> bool:
        """Whether `part` (0 to 1) of the steps, rounded up, is over."""
        return self.index >= math.ceil(part * self.total - 1e-9)

    def _follow(self, scheduler: Any) -> None:
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at its parameters
        def count(*args: Any, **kwargs: Any) -> Any:
            self.index += 1
            self.calls = 0
            if self.index >= self.total:  # the decoder needs the memory
                self.kept.clear()
            return step(*args, **kwargs)

        count.counts_for = self  # type: ignore[attr-defined]
        scheduler.step = count
