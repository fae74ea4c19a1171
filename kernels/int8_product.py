"""Products of int8 matrices, exact in int32, in the form that is fastest on this processor.

No form is fastest everywhere: `torch._int_mm` is where the processor multiplies int8 in vectors (VNNI, AMX, a GPU), and some
twenty times slower than float32 where it does not. Sums of int8 products are integers, and float32 adds integers exactly,
in any order, while no partial sum leaves 2**24: so both forms give the same bits, longer sums in parts. On a CPU the form is
chosen by timing both, once per process and shape; a GPU multiplies integers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

#: The forms, by the type they multiply in.
FORMS = ("float32", "int8")

#: float32 holds every integer up to this.
MAX_FLOAT_SUM = 2**24

#: The largest magnitude of an int8.
INT8_LIMIT = 128

#: The forms are timed on as many rows as make at most so many products: milliseconds where a form is slow.
TIMED_PRODUCTS = 2**22
TIMED_ROUNDS = 3


class Int8Matrix:
    """The right operand of products, int8 `[k, n]`, kept as it is multiplied.

    Raises:
        ValueError: the matrix is empty, or its sums could leave int32.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        if not weights.numel():
            raise ValueError(f"int8 weights {list(weights.shape)}: nothing to multiply by")
        largest = int(weights.to(torch.int32).abs().sum(0).max()) * INT8_LIMIT
        if largest >= 2**31:
            raise ValueError(
                f"int8 weights {list(weights.shape)}: sums up to {largest} do not fit int32; use fewer rows"
            )

    def product(self, left: Tensor, form: str | None = None) -> Tensor:
        """int8 `[m, k]`, on this matrix' device, @ this -> int32 `[m, n]`, exact; `form` is the fastest by default."""
        if left.is_cuda:  # cuBLAS takes a multiple of 32 rows, and the right operand by columns
            padded = F.pad(left, (0, 0, 0, -len(left) % 32))
            return torch._int_mm(padded, self._by_columns)[: len(left)]
        if (form or fastest_form(self, left.shape[0])) == "float32":
            return self._float32(left)
        return torch._int_mm(left, self._by_rows)

    def _float32(self, left: Tensor) -> Tensor:
        columns = left.to(torch.float32).split([len(part) for part in self._float_parts], 1)
        pairs = zip(columns, self._float_parts, strict=True)
        return reduce(Tensor.add_, (_float_mm(x, part).to(torch.int32) for x, part in pairs))

    @cached_property
    def _by_rows(self) -> Tensor:
        """A transposed column counts as contiguous, and `_int_mm` then reads it by the wrong stride: hence the copy."""
        return torch.empty_like(self.weights, memory_format=torch.contiguous_format).copy_(self.weights)

    @cached_property
    def _by_columns(self) -> Tensor:
        return self._by_rows.t().contiguous().t()

    @cached_property
    def _float_parts(self) -> list[Tensor]:
        """float32 `[rows, n]`: runs of rows whose sums stay within 2**24, whatever the left operand is."""
        sums = self.weights.to(torch.int32).abs().cumsum(0)  # [k, n]
        floats = self.weights.to(torch.float32)
        parts, start = [], 0
        while start < len(sums):
            before = sums[start - 1] if start else torch.zeros_like(sums[0])
            reach = (sums[start:] - before).amax(1) * INT8_LIMIT  # grows with every row
            end = start + int((reach <= MAX_FLOAT_SUM).sum())
            parts.append(floats[start:end].contiguous())
            start = end
        return parts


def fastest_form(matrix: Int8Matrix, rows: int) -> str:
    """Of `FORMS`, the one whose product of `rows` rows by `matrix` takes least time in this process.

    Timed once for each shape and number of threads; the rows count by powers of two.
    """
    if _only is not None:
        return _only
    most = max(TIMED_PRODUCTS // matrix.weights.numel(), 1)
    timed = min(1 << max(rows - 1, 0).bit_length(), 1 << (most.bit_length() - 1))
    key = (timed, *matrix.weights.shape, torch.get_num_threads())
    with _timing:  # two that time at once would disturb each other
        if key not in known_forms:
            known_forms[key] = time_forms(matrix, timed)
        return known_forms[key]


@contextmanager
def only(form: str) -> Iterator[None]:
    """All products of this process in `form`, whatever takes least time: for comparing the forms."""
    global _only
    before, _only = _only, form
    try:
        yield
    finally:
        _only = before


_only: str | None = None
known_forms: dict[tuple[int, ...], str] = {}
_timing = threading.Lock()


def time_forms(matrix: Int8Matrix, rows: int) -> str:
    """The form of least time; one that is missing here, or is not exact, is left out.

    Some processors' int8 instructions saturate sums of two products in 16 bits, and libraries have used them.
    """
    left = _operand(rows, len(matrix.weights))
    exact, best = _timed(matrix, left, "float32")
    seconds = {"float32": best}
    try:
        found, seconds["int8"] = _timed(matrix, left, "int8")
    except RuntimeError as error:
        log.info("int8 products do not run as such on this processor, float32 is used: %s", error)
        return "float32"
    if not torch.equal(found, exact):
        log.warning("int8 products are not exact on this processor, float32 is used")
        return "float32"
    for _ in range(TIMED_ROUNDS):
        for form in FORMS:
            seconds[form] = min(seconds[form], _timed(matrix, left, form)[1])
    return min(seconds, key=seconds.__getitem__)


def _operand(rows: int, k: int) -> Tensor:
    """int8 `[rows, k]` of all values, with rows of the extremes."""
    values = torch.arange(rows * k, dtype=torch.int64).mul_(97).remainder_(256).sub_(INT8_LIMIT)
    left = values.to(torch.int8).view(rows, k)
    left[0], left[-1] = -INT8_LIMIT, INT8_LIMIT - 1
    return left


def _timed(matrix: Int8Matrix, left: Tensor, form: str) -> tuple[Tensor, float]:
    """The product and the seconds this thread worked for it: on a busy machine it may have to wait for the processor."""
    began = time.thread_time()
    found = matrix.product(left, form)
    return found, time.thread_time() - began


def _float_mm(left: Tensor, right: Tensor) -> Tensor:
    """Into a tensor of ours: then autocast, which would round the sums, leaves the product alone. That of the operands to
    bfloat16 or TF32, which `torch.set_float32_matmul_precision` may ask for, changes no int8."""
    return torch.mm(left, right, out=torch.empty(len(left), right.shape[1], dtype=torch.float32))
