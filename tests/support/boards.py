"""Stand-in GPUs whose counters are files: what they ran is known to the millijoule, however the processes died.

A counter grows by what is spent on it (`Board.spend`) and by 1 mJ with every reading, so that it never stands still, and
by nothing else. Each change is one record, appended by one system call under a lock: the last record's value is the
counter, and all of them are its history, for whoever has to judge what a job says that it used.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pynvml

from millijoule.workers import life
from millijoule.workers.meters import meter

SITE = Path(__file__).parent / "fake_boards"
TESTS = Path(__file__).parents[1]

READ, SPEND, RESET, REBOOT = range(4)

_RECORD = struct.Struct("<QQQQ")

#: A counter starts here and falls by so much with each reset, far more than any test spends: it is behind its last reading
#: for certain. One that is near 0 when it is reset may be past it again before anybody looks, and then nobody can know.
START_MJ = 10**12
RESET_MJ = 10**11


class Record(NamedTuple):
    """One change: the counter's value after it, what it was, whose process did it, CLOCK_MONOTONIC nanoseconds."""

    value_mj: int
    kind: int
    pid: int
    t_mono_ns: int


@dataclass(frozen=True)
class Board:
    """A board; its file's name is its UUID."""

    path: Path

    @property
    def uuid(self) -> str:
        return self.path.name

    def spend(self, energy_mj: int) -> None:
        """The device works: `energy_mj` is used."""
        self._append(SPEND, lambda value: value + energy_mj)

    def read(self) -> int:
        """The counter, as NVML would give it."""
        return self._append(READ, lambda value: value + 1)

    def reset(self, *, reboot: bool = False) -> None:
        """The driver is loaded again, or the host started anew: the counter begins afresh, `RESET_MJ` below its last beginning."""
        began = next(r.value_mj for r in reversed(self.records()) if r.kind in (RESET, REBOOT))
        self._append(REBOOT if reboot else RESET, lambda value: began - RESET_MJ)

    def records(self) -> list[Record]:
        """The history so far."""
        return [Record(*fields) for fields in _RECORD.iter_unpack(self.path.read_bytes())]

    def _append(self, kind: int, change) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = os.fstat(file).st_size
            value = Record(*_RECORD.unpack(os.pread(file, _RECORD.size, end - _RECORD.size))).value_mj
            value = change(value)
            os.write(file, _RECORD.pack(value, kind, os.getpid(), time.monotonic_ns()))
            return value
        finally:
            os.close(file)


def make_boards(folder: Path, n: int, name: str = "0") -> list[Board]:
    """New boards in `folder`, which becomes one host's: its counter book and signs of life are there, too."""
    (folder / "boards").mkdir(parents=True)
    (folder / "powercap").mkdir()
    for i in range(n):
        path = folder / "boards" / f"GPU-{name}{i}"
        path.write_bytes(_RECORD.pack(START_MJ, RESET, 0, time.monotonic_ns()))
    return boards_of(folder)


def boards_of(folder: Path) -> list[Board]:
    """The boards of a host, in the order in which NVML counts them."""
    return [Board(path) for path in sorted((folder / "boards").iterdir())]


def assigned_board(folder: Path) -> Board:
    """The board that this process was given, by UUID or index in CUDA_VISIBLE_DEVICES."""
    name = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[0]
    boards = boards_of(folder)
    return boards[int(name)] if name.isdigit() else next(b for b in boards if b.uuid == name)


class FileNvml:
    """NVML of a host with stand-in boards, by the names `workers.meters.nvml` uses. They have no power reading and no MIG."""

    def __init__(self, folder: Path) -> None:
        self.boards = boards_of(folder)

    def __getattr__(self, name: str):
        if not name.startswith("NVML"):  # constants and exceptions do
            raise AttributeError(name)
        return getattr(pynvml, name)

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str:
        return "stand-in"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.boards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Board:
        return self.boards[index]

    def nvmlDeviceGetUUID(self, handle: Board) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Board) -> str:
        return "stand-in board"

    def nvmlDeviceGetMigMode(self, handle: Board) -> list[int]:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Board) -> int:
        return handle.read()

    def nvmlDeviceGetFieldValues(
        self, handle: Board, fields: Sequence[int | tuple[int, int]]
    ) -> list[pynvml.c_nvmlFieldValue_t]:
        values = []
        for field in fields:
            value = pynvml.c_nvmlFieldValue_t()
            if field == pynvml.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION:
                value.valueType, value.value.ullVal = pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, handle.read()
            else:
                value.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
            values.append(value)
        return values


def install(folder: Path, boot_id: str | None = None) -> None:
    """From now on this process is on the host of `folder`: its meters, counter book and signs of life are there."""
    meter.open_meter.__kwdefaults__.update(
        nvml=FileNvml(folder),
        powercap_root=folder / "powercap",
        book_directory=folder,
        boot_id=boot_id,
    )
    life.shared_folder = lambda: folder
