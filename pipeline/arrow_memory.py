"""Arrow in little memory: its own allocator keeps what it once held, in a heap per thread; the C library's gives it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def lean_arrow() -> Iterator[None]:
    """Within it, all of this process's new Arrow buffers come from the C library's allocator."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)
