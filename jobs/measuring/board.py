"""The board that `bench counters` measures: a real one, or a made-up one whose truth is known.

Both have a clock, an NVML binding that shows one board, a load to switch on and off, and stages of starting up. The made-up one
keeps a clock of its own that only waiting and reading move: a measurement of minutes takes none, and what must come out follows
from its settings. Its watts mean nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pynvml

from millijoule.jobs.measuring.stand_ins import StandInNvml, board_uuid
from millijoule.workers.errors import InputError
from millijoule.workers.meters.nvml import open_gpus

MATRIX = 4096


class CudaBoard:
    """The first board that CUDA would take, with matrix products as its load.

    Raises:
        InputError: its counter cannot be read.
    """

    stand_in = False

    def __init__(self) -> None:
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
        self.nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise InputError(f"bench counters: NVML is not here ({error})") from error
        boards = open_gpus([gpu], self.nvml)
        if not boards.uuids:
            raise InputError(f"bench counters: NVML finds no board {gpu}, or only a part of one")
        self.uuid, self.name = boards.uuids[0], boards.names[0]
        self.driver_version = boards.driver_version
        self._matrix: Any = None

    now_ns = staticmethod(time.monotonic_ns)

    def wait_until(self, t_ns: int) -> None:
        """Sleep to `t_ns`; a time in the past is now."""
        time.sleep(max(0, t_ns - self.now_ns()) / 1e9)

    def start(self) -> Iterator[str]:
        """Do what a worker does before its first image; the name of each stage when it is done."""
        import torch

        yield "import torch"
        self._check_first_device()
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
        yield "CUDA context"
        from millijoule.workers.generators.registry import load_generator
        from millijoule.workers.schemas import ImageRequest

        model = load_generator("default", device="cuda")
        torch.cuda.synchronize()
        yield "load default model"
        requests = [ImageRequest(str(i), 0, "a red cat", seed=i) for i in range(model.info.batch_size)]
        model.generate(requests)
        torch.cuda.synchronize()
        yield "first batch"

    def _check_first_device(self) -> None:
        """Work must go to the board that is read."""
        import torch

        if not torch.cuda.is_available():
            raise InputError("bench counters: PyTorch finds no GPU here")
        if str(torch.cuda.get_device_properties(0).uuid) not in self.uuid:
            raise InputError(
                f"bench counters: CUDA's first device is not {self.uuid}; set CUDA_VISIBLE_DEVICES to its UUID"
            )

    @contextmanager
    def load(self, period_s: float | None) -> Iterator[None]:
        """Work for the length of a block: all the time, or the first half of every `period_s` seconds."""
        import torch

        stop = threading.Event()
        if self._matrix is None:
            self._check_first_device()
            self._matrix = torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)

        def work() -> None:
            x, began = self._matrix, time.monotonic()
            while not stop.is_set():
                if period_s is not None:
                    phase = (time.monotonic() - began) % period_s
                    if phase >= period_s / 2:
                        time.sleep(period_s - phase)
                        continue
                # a few tenths of a millisecond of work per wait: the wave's edges are as sharp
                for _ in range(2 if period_s is not None else 50):
                    x = (x @ x).clamp_(-1, 1)
                torch.cuda.synchronize()

        thread = threading.Thread(target=work, name="load", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@dataclass
class StandInBoard:
    """A board that draws what it is told and counts it as NVML does, by a clock of its own.

    Attributes:
        idle_watts, context_watts, loaded_watts: what it draws before and after its context is made, and under load.
        period_ms: its counter and field 186 move this often.
        quantum_mj: step of its counter.
        lost_mj_per_read: what the counter falls behind at every read of it.
        read_us: what a read takes.
    """

    stand_in = True
    name = driver_version = "stand-in"
    uuid = board_uuid(0)

    idle_watts: float = 70
    context_watts: float = 110
    loaded_watts: float = 600
    period_ms: float = 100
    quantum_mj: int = 1
    lost_mj_per_read: float = 0
    read_us: float = 500

    def __post_init__(self) -> None:
        self._now_ns = 1_000_000_000_000
        self._lost_mj = 0.0
        # stretches of constant course: begin, low and high watts, period in ns (0: low alone)
        self._course: list[tuple[int, float, float, int]] = [(0, self.idle_watts, self.idle_watts, 0)]
        self._energy_mj = [0.0]  # at the beginning of each stretch
        self.nvml = _BoardNvml(self)

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until(self, t_ns: int) -> None:
        self._now_ns = max(self._now_ns, t_ns)

    def draw(self, low: float, high: float | None = None, period_s: float = 0.0) -> None:
        """From now on: `low` watts, or `high` in the first half of each `period_s`."""
        self._energy_mj.append(self.energy_mj(self._now_ns))
        self._course.append((self._now_ns, low, low if high is None else high, round(period_s * 1e9)))

    def energy_mj(self, t_ns: int) -> float:
        """What it has really used by `t_ns`."""
        number = max(i for i, (begin, *_) in enumerate(self._course) if begin <= t_ns)
        begin, low, high, period_ns = self._course[number]
        passed_ns = t_ns - begin
        on_ns = 0.0
        if period_ns:
            whole, rest = divmod(passed_ns, period_ns)
            on_ns = whole * period_ns / 2 + min(rest, period_ns / 2)
        return self._energy_mj[number] + (low * passed_ns + (high - low) * on_ns) / 1e6

    def _read(self) -> int:
        """A read takes its time; when counter and field 186 last moved."""
        self._now_ns += round(self.read_us * 1000)
        period_ns = round(self.period_ms * 1e6)
        return self._now_ns // period_ns * period_ns

    def counter_mj(self) -> int:
        tick_ns = self._read()
        self._lost_mj += self.lost_mj_per_read
        return int((self.energy_mj(tick_ns) - self._lost_mj) // self.quantum_mj * self.quantum_mj)

    def power_mw(self) -> tuple[int, int]:
        """Fields 185 (the last second) and 186 (25 ms before the last tick)."""

        def mean(until_ns: int, over_ns: int) -> int:
            return round((self.energy_mj(until_ns) - self.energy_mj(until_ns - over_ns)) / over_ns * 1e9)

        tick_ns = self._read()
        return mean(self._now_ns, 1_000_000_000), mean(tick_ns, 25_000_000)

    def start(self) -> Iterator[str]:
        """See `CudaBoard.start`. A second each; the second one makes the context."""
        for name in ("import torch", "CUDA context", "load default model", "first batch"):
            if name != "import torch":
                self.draw(self.context_watts)
            self.wait_until(self._now_ns + 1_000_000_000)
            yield name

    @contextmanager
    def load(self, period_s: float | None) -> Iterator[None]:
        """See `CudaBoard.load`."""
        if period_s is None:
            self.draw(self.loaded_watts)
        else:
            self.draw(self.context_watts, self.loaded_watts, period_s)
        yield
        self.draw(self.context_watts)


class _BoardNvml(StandInNvml):
    """NVML of a host whose only board is `board`."""

    def __init__(self, board: StandInBoard) -> None:
        super().__init__(1)
        self._board = board

    def nvmlDeviceGetFieldValues(self, handle: Any, fields: Sequence[int | tuple[int, int]]) -> Any:
        values = (pynvml.c_nvmlFieldValue_t * len(fields))()
        if fields[0] == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
            numbers: tuple[int, ...] = (self._board.counter_mj(),)
        else:
            numbers = self._board.power_mw()
        for value, number in zip(values, numbers, strict=True):
            value.nvmlReturn, value.valueType = pynvml.NVML_SUCCESS, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
            value.value.ullVal = number
        return values
