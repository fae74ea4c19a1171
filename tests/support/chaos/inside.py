"""Faults that the process has which meets them: its device, its disk, its counter, its clock.

A fault is armed by a file in the run's folder `armed`; the first process that comes by where it could happen takes the file
away, writes down that it happened, and has it. So a fault counts only when it came, and once.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pynvml
from support import boards, spending_model
from support.chaos.faults import DEVICE, WRONG_PIXELS

from millijoule.workers.errors import StoreError
from millijoule.workers.generators.protocol import GeneratedBatch, Rejection
from millijoule.workers.layout import COMMITS_PREFIX
from millijoule.workers.storage import local

_ERRNOS = {
    "disk full": errno.ENOSPC,
    "disk read-only": errno.EROFS,
    "disk quota used up": errno.EDQUOT,
    "disk error": errno.EIO,
    "store busy": errno.EAGAIN,
    "driver's disk full": errno.ENOSPC,
    "driver's store busy": errno.EAGAIN,
}
#: A device that hangs does so until somebody ends its process.
HANG_S = 600.0
#: How long a counter is absent or frozen: less and more than it takes to be seen (`runs.STALL_S`), and to the end of the job.
COUNTER_SECONDS = (0.05, 0.4, 1.0, 60.0)


class Ground:
    """The folder of a run, in which faults are armed and written down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.armed = folder / "armed"
        self.ill = folder / "ill"
        self._n = 0

    def arm(self, kind: str) -> None:
        self._n += 1
        (self.armed / f"{kind}#{self._n}").touch()

    def take(self, *kinds: str) -> str | None:
        """The armed fault of one of `kinds` that is ours now."""
        for name in sorted(os.listdir(self.armed)):
            if (kind := name.partition("#")[0]) in kinds:
                try:
                    (self.armed / name).unlink()
                except FileNotFoundError:
                    continue
                self.write(kind)
                return kind
        return None

    def sicken(self, uuid: str, kind: str, value: int, seconds: float) -> None:
        """The counter of a board has `kind` for a while, whoever reads it; `value` is the last it said."""
        note = self.ill / f"{uuid}.{os.getpid()}"
        note.write_text(json.dumps([kind, value, time.monotonic() + seconds]))
        note.replace(self.ill / uuid)

    def illness(self, uuid: str) -> tuple[str, int] | None:
        """What its counter has now, and what it last said."""
        try:
            kind, value, until = json.loads((self.ill / uuid).read_text())
        except FileNotFoundError:
            return None
        return (kind, value) if time.monotonic() < until else None

    def write(self, kind: str) -> None:
        """It happened."""
        line = json.dumps({"kind": kind, "pid": os.getpid(), "t_mono_ns": time.monotonic_ns()}) + "\n"
        file = os.open(self.folder / "injected", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, line.encode())
        os.close(file)

    def written(self) -> list[dict[str, Any]]:
        path = self.folder / "injected"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def install(folder: Path, *, worker: bool) -> None:
    """This process has from now on what is armed in `folder`."""
    ground = Ground(folder)
    clock = _install_clock()
    _install_disk(ground, clock, worker=worker)
    if worker:
        install_device(ground)
        install_counter(ground)


def _install_clock() -> dict[str, int]:
    offset, time_ns = {"ns": 0}, time.time_ns
    time.time_ns = lambda: time_ns() + offset["ns"]
    time.time = lambda: time.time_ns() / 1e9
    return offset


def _install_disk(ground: Ground, clock: dict[str, int], *, worker: bool) -> None:
    names = ("disk full", "disk read-only", "disk quota used up", "disk error", "store busy")
    kinds = names if worker else ("driver's disk full", "driver's store busy")
    left = {"times": 0, "errno": 0}
    flush_file, write_new_file = local._flush_file, local._write_new_file
    put_exclusive = local.LocalStore.put_exclusive

    def meet() -> None:
        if ground.take("clock jumps"):
            clock["ns"] += random.choice((-1, 1)) * random.randrange(10**9, 10**15)
        if worker and ground.take("disk slow"):
            time.sleep(0.7)
        if left["times"] == 0 and (kind := ground.take(*kinds)):
            left.update(times=random.randint(1, 3), errno=_ERRNOS[kind])
        if left["times"]:
            left["times"] -= 1
            raise OSError(left["errno"], os.strerror(left["errno"]))

    def flush(path: Path) -> None:
        if not path.is_dir():
            meet()
        flush_file(path)

    def write(path: Path, data: bytes) -> None:
        meet()
        write_new_file(path, data)

    def create(self, key: str, data: bytes) -> None:
        put_exclusive(self, key, data)
        if worker and key.startswith(COMMITS_PREFIX) and ground.take("acknowledgement lost"):
            raise StoreError(f"{key}: the connection was lost", transient=True)

    local._flush_file, local._write_new_file = flush, write
    local.LocalStore.put_exclusive = create  # type: ignore[method-assign]


#: Devices that have one of these have it from then on.
ALWAYS = (
    *("device fails always", "device draws too few images", "device draws no numbers"),
    *("device draws other shapes", "out of memory always", WRONG_PIXELS),
)


def install_device(ground: Ground, *, hangs_in_its_first_call: bool = True) -> None:
    """What the stand-in device of this process has; one that hangs before it drew anything is waited for much longer."""
    generate = spending_model.Spending.generate
    sick: list[str] = []
    kinds = [*DEVICE, WRONG_PIXELS]
    if not hangs_in_its_first_call:
        kinds.remove("device hangs")

    def meet(self, requests):
        kind = sick[0] if sick else ground.take(*kinds)
        if "device hangs" not in kinds and requests[0].prompt_id != "warm-up":
            kinds.append("device hangs")
        if kind in ALWAYS:
            sick[:] = [kind]
        if kind in ("device fails once", "device fails always"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if kind == "device hangs":
            time.sleep(HANG_S)
        if kind in ("out of memory once", "out of memory always"):
            raise MemoryError("the device has no memory left")
        if kind == "device draws no numbers":
            pixels = np.zeros((len(requests), 8, 8, 3), np.uint8)
            rejected = tuple(Rejection("quarantined", "its pixels are no finite numbers") for _ in requests)
            return GeneratedBatch(pixels, (), rejected)
        drawn = generate(self, requests)
        if kind == "device draws too few images":
            return GeneratedBatch(drawn.images[:0], (), ())
        if kind == "device draws other shapes":
            return GeneratedBatch(drawn.images[:, :4, :, :1], (), ())
        if kind == WRONG_PIXELS:
            return GeneratedBatch(np.roll(drawn.images, 1, axis=2), drawn.warnings, drawn.rejected)
        return drawn

    spending_model.Spending.generate = meet  # type: ignore[method-assign]


def install_counter(ground: Ground) -> None:
    """A counter is absent from some reading on; it freezes amid work, ahead of the last reading and behind what runs."""
    read, spend = boards.Board.read, boards.Board.spend

    def meet(self) -> int:
        if ground.take("counter absent"):
            ground.sicken(self.uuid, "counter absent", 0, random.choice(COUNTER_SECONDS))
        match ground.illness(self.uuid):
            case "counter absent", _:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
            case "counter frozen", value:
                return value
        return read(self)

    def work(self, energy_mj: int) -> None:
        spend(self, energy_mj // 2)
        kind = ground.take("counter frozen", "worker dies as its counter freezes")
        if kind:
            value = self.records()[-1].value_mj
            ground.sicken(self.uuid, "counter frozen", value, random.choice(COUNTER_SECONDS))
        spend(self, energy_mj - energy_mj // 2)
        if kind == "worker dies as its counter freezes":
            os.kill(os.getpid(), signal.SIGKILL)

    boards.Board.read = meet  # type: ignore[method-assign]
    boards.Board.spend = work  # type: ignore[method-assign]
