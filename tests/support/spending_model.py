"""A generator that spends energy on its worker's stand-in board, `--model python:support.spending_model:load`.

What an image costs follows from its prompt ("mj=N ms=N"), and so do the accidents on the way: "slow" sits in a batch for
MILLIJOULE_TEST_SLOW_S the first time it is drawn, "die" ends its process that time, "raise" always raises. Settings come from
the environment.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support.boards import Board, assigned_board
from support.models import Plain, first_time

from millijoule.workers.generators.protocol import GeneratedBatch
from millijoule.workers.schemas import ImageRequest

#: An image's energy is spent in so many parts, so that a process that dies has often spent some.
PARTS = 3

#: Loading and warming up cost something, too.
LOAD_MJ, WARM_UP_MJ = 500, 700


def passing(point: str) -> None:
    """A place at which tests let processes die; they replace this function."""


class Spending(Plain):
    """Images as `Plain` draws them, at a cost; a batch reports its steps."""

    def __init__(self, device: str, board: Board) -> None:
        super().__init__(device)
        self.board = board
        self.on_step: Callable[[], None] = lambda: None

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        for request in requests:
            if request.prompt_id == "warm-up":
                passing("warm-up")
                self.board.spend(WARM_UP_MJ)
                continue
            self._spend(request)
            passing("in-batch")
        return super().generate(requests)

    def _spend(self, request: ImageRequest) -> None:
        mj, ms = (int(re.search(rf"{name}=(\d+)", request.prompt)[1]) for name in ("mj", "ms"))
        if "slow" in request.prompt and first_time(f"slow-{request.prompt_id}"):
            self.sit(float(os.environ["MILLIJOULE_TEST_SLOW_S"]), mj)
            if "die" in request.prompt:
                os.kill(os.getpid(), signal.SIGKILL)
        for part in range(PARTS):
            self.board.spend(mj // PARTS + (part < mj % PARTS))
            time.sleep(ms / 1000 / PARTS)
        if "raise" in request.prompt:
            raise ValueError("cannot draw this")

    def sit(self, seconds: float, mj: int) -> None:
        """A long batch: it goes on spending, and says nothing of its steps."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.board.spend(mj)
            time.sleep(0.05)


def load(device: str) -> Spending:
    board = assigned_board(Path(os.environ["MILLIJOULE_TEST_BOARDS"]))
    board.spend(LOAD_MJ)
    passing("loading")
    return Spending(device, board)
