"""Triton kernels without a GPU: functions run in a process of their own that has Triton's interpreter.

The interpreter is chosen when Triton is imported, for a whole process; that of the tests keeps the compiler.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest


def interpreted(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What `function(*arguments, **options)` returns where kernels are interpreted; `function` is a module's."""
    call = pickle.dumps((function, arguments, options))
    return pickle.loads(_process().submit(_run, call).result())


def with_constants(
    function: Callable[..., Any], constants: dict[str, Any], *arguments: Any, **options: Any
) -> Any:
    """`function` with other constants in its module: what large tensors need is tried with small ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setitem(function.__globals__, name, value)
        return function(*arguments, **options)


@functools.cache
def _process() -> ProcessPoolExecutor:
    """Started with the first call, ends with this process."""
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        assert pool.submit(_interprets).result()
    return pool


def _interprets() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def _run(call: bytes) -> bytes:
    """As bytes, so that tensors are copied and not shared."""
    import numpy as np

    function, arguments, options = pickle.loads(call)
    with np.errstate(all="ignore"):  # numpy stands in for the GPU, where infinities are no news
        return pickle.dumps(function(*arguments, **options))
