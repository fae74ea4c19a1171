"""Telling that memory ran out from every other failure, and giving back what a failed call held."""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

#: How the libraries below a generator begin the words of a RuntimeError that says so: PyTorch's allocators, CUDA's and HIP's
#: runtimes, cuBLAS, cuDNN, oneDNN. Only beginnings count: a prompt that a message quotes may say anything.
_SAID = re.compile(
    r"(\[enforce fail at [^\]]*\][^:]{0,40}?)?Default(Mobile)?CPUAllocator: (can't|not enough)"
    r"|((CUDA|HIP|XPU|MPS)( driver)? )?(error: )?out of memory"
    r"|(CUDA|HIP) error: (CU|HIP)BLAS_STATUS_ALLOC_FAILED"
    r"|cuDNN error: CUDNN_STATUS_ALLOC_FAILED"
    r"|could not allocate",
    re.IGNORECASE,
)


#: Lists, tuples and the like that are made, and not yet let go of, between two looks for garbage: those of a shard of small images.
RARE_COLLECTION = 50_000


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that the device's or the host's memory does not suffice."""
    seen: BaseException | None = error
    for _ in range(10):  # a chain can be circular
        if seen is None:
            return False
        if isinstance(seen, MemoryError):
            return True
        torch = sys.modules.get("torch")  # whoever raises its errors has imported it
        if torch is not None and isinstance(seen, torch.OutOfMemoryError):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        if isinstance(seen, RuntimeError) and _SAID.match(str(seen)):
            return True
        seen = seen.__cause__
    return False


def release_memory() -> None:
    """Give back what nobody holds any more: garbage, what the C library keeps of it, and the blocks that PyTorch keeps of a GPU.

    What is left is likely to stay, so later collections pass over it until this is called again: to walk through PyTorch's
    modules now and then takes a twelfth of a worker's time where images are small.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def loading() -> Iterator[None]:
    """The time in which a model loads: garbage is looked for as rarely as by `collect_rarely`. To walk through thousands of modules
    while they are imported, of which none is garbage, takes a tenth of a diffusion pipeline's start."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def collect_rarely() -> None:
    """Look for garbage once in `RARE_COLLECTION` objects, in a process whose work leaves none: what a shard consists of is not walked
    through again and again."""
    gc.set_threshold(RARE_COLLECTION, *gc.get_threshold()[1:])
