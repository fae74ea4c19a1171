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


def tree_cpu_s() -> float:
    """CPU seconds of this process and all below it, those that have ended and were waited for included."""
    own = psutil.Process()
    spent = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[:4])  # user, system, and both of children that have ended
    return spent


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
