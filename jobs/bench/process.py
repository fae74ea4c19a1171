"""What a process used: CPU seconds of parts of it and memory, as Linux accounts for them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any


class CpuParts:
    """CPU seconds and calls of functions, by name; a call within another one is part of that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._local = threading.local()

    def timed(self, name: str, function: Callable[..., Any], *, all_threads: bool = False) -> Any:
        """`function`, the CPU time of whose calls is added to part `name`: the calling thread's, or all threads'."""
        clock = time.process_time if all_threads else time.thread_time

        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if getattr(self._local, "inside", False):
                return function(*arguments, **options)
            self._local.inside, began = True, clock()
            try:
                return function(*arguments, **options)
            finally:
                self._local.inside = False
                self.seconds[name] += clock() - began
                self.calls[name] += 1

        return call

    def wrap(self, owner: Any, attribute: str, name: str, *, all_threads: bool = False) -> None:
        """Have every call of `owner.attribute` timed from now on."""
        setattr(owner, attribute, self.timed(name, getattr(owner, attribute), all_threads=all_threads))


def thread_cpu_s(name: str) -> float:
    """CPU seconds of this process's running threads of that name; 0 where there is none."""
    threads = [t.ident for t in threading.enumerate() if t.name == name and t.ident is not None]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in threads)


def memory_mb(process: int | str = "self") -> dict[str, float]:
    """Resident memory of a process now, in MB (10**6 bytes).

    Returns:
        "pss": pages shared with other processes in parts; "private": pages of its own only.
    """
    sizes: dict[str, int] = {}
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
        name, kilobytes = line.split()[:2]
        sizes[name.rstrip(":")] = int(kilobytes) * 1024
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return {"pss": sizes["Pss"] / 1e6, "private": private / 1e6}


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB; `ru_maxrss` would start at the parent's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM in /proc/self/status")
