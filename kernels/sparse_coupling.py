"""Sparsely coupled oscillators in compiled code: all steps of a batch in one call, with sums made anew or by events.

`kernels.oscillator` has the equation, the plain reference and the PyTorch form; here it is fused: look-up, int8 products, multipliers
and phases stay in the caches. The sums of a step are found in one of two ways that give the same integers:

* *dense*: products of all weights with all sines and cosines, as the image kernel's;
* *by events*: they are kept, and an oscillator whose table entry is another than a step before sends the difference to the targets that it
  reaches, its own cell and four neighbours through L and all through V; so does a z that changed, through U. Where more than a given
  share of the sources changed, the sums are made anew.

An image of which no phase moved in a step would not move in any later one: it may leave, and those that stay close its gap.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.native_library import native_library
from millijoule.kernels.phase import COS_TABLE, SIN_TABLE

#: By form of `native_library.FORMS`: the share of changed sources up to which sending differences takes less time than making sums
#: anew (`benchmarks/kernels/events.json`).
WORTH_SENDING = (1.0, 0.3, 0.08)

#: Blocks of the local weights: a cell's own and its four neighbours'.
BLOCKS = 5


@dataclass(frozen=True)
class Relaxed:
    """Phases after the steps, and what an event-driven coupling sent on the way; all counts `[steps]`, of the whole batch.

    Attributes:
        phases: int32 `[batch, n]` in [0, 65536).
        sent: oscillators whose sine or cosine was another than a step before; in the first step all.
        spread: z of an image that were others, in sines or cosines; in the first step all, the rank in each image.
        left: images of which no phase moved in this step, and which took no further one.
    """

    phases: Tensor
    sent: tuple[int, ...]
    spread: tuple[int, ...]
    left: tuple[int, ...]


@dataclass(frozen=True)
class Multipliers:
    """Fixed-point numbers of a step, int64: `local` `[C]`, `gather` `[r]`, `spread` `[n]`."""

    local: Tensor
    gather: Tensor
    spread: Tensor


class SparseKernel:
    """A coupling packed for this processor: int8 L `[C, 5 C]`, V `[n, r]`, U `[n, r]`, whose sums fit int32, without -128.

    Raises:
        ValueError: shapes that do not belong together, or a -128, which the AVX2 form cannot negate.
        RuntimeError: there is no compiled code, or none is wanted.
        MemoryError: there is no room for it.
    """

    def __init__(self, local: Tensor, gather: Tensor, spread: Tensor) -> None:
        library = native_library()
        if library is None:
            raise RuntimeError("no compiled kernels")
        self._weights = local, gather, spread
        self._library = library
        self.n, self.rank = gather.shape
        self.channels = local.shape[0]
        grid = math.isqrt(self.n // self.channels)
        shapes = (self.channels, BLOCKS * self.channels), (self.n, self.rank), (self.n, self.rank)
        if (
            grid * grid * self.channels != self.n
            or not self.rank
            or shapes != tuple(map(_shape, self._weights))
        ):
            raise ValueError(f"weights {[list(x.shape) for x in self._weights]} of a coupling")
        arrays = [np.ascontiguousarray(x.numpy()) for x in self._weights]
        if any(x.dtype != np.int8 for x in arrays) or not takes(*self._weights):
            raise ValueError("weights of a coupling: int8 from -127 to 127")
        waves = SIN_TABLE.to(torch.int32).bitwise_and(0xFFFF) | (COS_TABLE.to(torch.int32) << 16)
        library.millijoule_sparse_coupling.restype = ctypes.c_void_p
        library.millijoule_sparse_coupling.argtypes = [*(ctypes.c_void_p,) * 4, *(ctypes.c_int32,) * 3]
        library.millijoule_sparse_relax.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int32, *(ctypes.c_void_p,) * 6, ctypes.c_int32),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_int32),
            *(ctypes.c_void_p,) * 2,
        ]
        self._packed = library.millijoule_sparse_coupling(
            *(x.ctypes.data for x in (*arrays, np.ascontiguousarray(waves.numpy()))),
            *(grid, self.channels, self.rank),
        )
        if not self._packed:
            raise MemoryError("no memory for a coupling")

    def relax(
        self,
        phases: Tensor,
        drives: tuple[Tensor, Tensor, Tensor],
        multipliers: Multipliers,
        steps: int,
        form: int,
        *,
        up_to: float | None = None,
        leave: bool = False,
    ) -> Relaxed:
        """After `steps` steps from int32 `phases` `[batch, n]`, which count modulo a turn, under `drives`: a, b and omega, int32 `[batch, n]`.

        It takes as many threads as PyTorch has; results do not depend on them.

        Args:
            form: of `native_library.FORMS`.
            up_to: sums by events in steps in which at most this share of the sources changed; None: never.
            leave: whether images at rest leave.

        Raises:
            ValueError: arrays of other shapes or types, or fewer than 0 steps.
            MemoryError: there is no room for sums.
        """
        theta = np.array(phases.numpy(), order="C")  # a copy, which is worked in
        given = [np.ascontiguousarray(x.numpy()) for x in drives]
        fixed = [
            np.ascontiguousarray(x.numpy())
            for x in (multipliers.local, multipliers.gather, multipliers.spread)
        ]
        if (
            steps < 0
            or len(given) != 3
            or any(x.shape != (len(theta), self.n) or x.dtype != np.int32 for x in (theta, *given))
            or [x.shape for x in fixed] != [(self.channels,), (self.rank,), (self.n,)]
            or any(x.dtype != np.int64 for x in fixed)
        ):
            raise ValueError(
                f"phases {list(theta.shape)}, {steps} steps: of a coupling of {self.n} oscillators"
            )
        counts = np.zeros((3, steps), np.int64)
        failed = self._library.millijoule_sparse_relax(
            *(self._packed, form, *(x.ctypes.data for x in (*given, *fixed)), steps),
            *(len(theta), torch.get_num_threads(), up_to is not None, up_to or 0.0, leave),
            *(counts.ctypes.data, theta.ctypes.data),
        )
        if failed:
            raise MemoryError("no memory to relax oscillators")
        return Relaxed(torch.from_numpy(theta), *(tuple(map(int, row)) for row in counts))

    def __reduce__(self) -> tuple[type[SparseKernel], tuple[Tensor, ...]]:
        return SparseKernel, self._weights  # what was packed stays in its process

    def __del__(self) -> None:
        if packed := getattr(self, "_packed", None):
            self._library.millijoule_sparse_coupling_free(ctypes.c_void_p(packed))


def takes(*weights: Tensor) -> bool:
    """Whether the compiled code multiplies by such int8 weights."""
    return all(int(x.min()) > -128 for x in weights)


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
