"""Books of many shards in little memory: what is no longer needed goes back to the system."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

_M_MMAP_THRESHOLD = -3  # malloc.h

#: Larger blocks are mapped one by one. Left alone, glibc raises this to 32 MB, and columns that grow in turns leave holes.
_MAPPED_BYTES = 512 << 10


@contextmanager
def lean_memory() -> Iterator[None]:
    """Within it, new Arrow buffers come from the C library: Arrow's own allocator keeps a heap per thread.

    From then on this process's large blocks are mapped one by one, where the C library is glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)
