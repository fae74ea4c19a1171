"""What a process used: CPU seconds of parts of it and memory, as Linux accounts for them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import psutil

#: Between two looks at what processes used.
LOOK_PERIOD_S = 0.2


class CpuParts:
    """CPU seconds of functions, by name; a call within another one is part of that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._local = threading.local()

    def timed(self, name: str, function: Callable[..., Any]) -> Any:
        """`function`, the CPU time of whose calls (the calling thread's) is added to part `name`."""

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if getattr(self._local, "inside", False):
                return function(*arguments, **options)
            self._local.inside, began = True, time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                self._local.inside = False
                self.seconds[name] += time.thread_time() - began

        return call

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Have every call of `owner.attribute` timed from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute)))


def thread_cpu_s(name: str) -> float:
    """CPU seconds of this process's running threads of that name; 0 where there is none."""
    threads = [t.ident for t in threading.enumerate() if t.name == name and t.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads)


class TreeCpu:
    """CPU seconds that this process and all below it use within a block.

    It looks every `LOOK_PERIOD_S`: what a process uses after the last look before its end is missing.
    """

    def __init__(self) -> None:
        self._at_first: dict[psutil.Process, float] = {}
        self._now: dict[psutil.Process, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> TreeCpu:
        self._look()
        self._at_first = dict(self._now)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    @property
    def seconds(self) -> float:
        """So far."""
        return sum(self._now.values()) - sum(self._at_first.values())

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_PERIOD_S):
            self._look()

    def _look(self) -> None:
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                self._now[process] = sum(process.cpu_times()[:2])  # user and system


def private_mb() -> float:
    """Resident memory of this process now that no other shares, MB (10**6 bytes)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB; `ru_maxrss` would start at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM in /proc/self/status")
