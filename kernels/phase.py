"""Phases as integers: a uint16 is a whole turn, and wraps by itself.

Values stand in int32 tensors, always in [0, 65536). sin and cos come from an int8 table, so nothing that follows from a
phase depends on the machine's floating point.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

#: Phase units of a whole turn.
TURN = 65536

#: Entries of the sine table; the phase's upper bits are the index. 1,024 cost nothing against 256, and images differ
#: from the float model's by less than the pixel's own rounding.
TABLE_SIZE = 1024
TABLE_SHIFT = 6  # 16 phase bits to 10 index bits

#: What the tables hold for 1.0.
AMPLITUDE = 127


def _table(shift: int) -> Tensor:
    """round(127 sin(angle)) at the middle of each of the table's intervals, moved by `shift` entries."""
    angles = (2 * math.pi * (i + shift + 0.5) / TABLE_SIZE for i in range(TABLE_SIZE))
    return torch.tensor([round(AMPLITUDE * math.sin(angle)) for angle in angles], dtype=torch.int8)


SIN_TABLE = _table(0)
COS_TABLE = _table(TABLE_SIZE // 4)


def sin_cos(phases: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of int32 phases, int8 in [-127, 127] where 127 is 1.0; any shape."""
    index = (phases >> TABLE_SHIFT).flatten()
    sin, cos = (
        table.to(phases.device).index_select(0, index).view(phases.shape)  # a quarter of indexing's time
        for table in (SIN_TABLE, COS_TABLE)
    )
    return sin, cos


def random_phases(seeds: np.ndarray, n: int) -> Tensor:
    """Uniform phases: the noise of an image, from its seed alone.

    Phases 4k to 4k + 3 are the four 16-bit parts, lowest first, of the k-th output of SplitMix64 (Steele, Lea and
    Flood 2014) started at the seed: uint64 seeds `[batch]` -> int32 `[batch, n]` in [0, 65536), n a multiple of 4.
    """
    if n % 4:
        raise ValueError(f"{n} phases: the number must be a multiple of 4")
    with np.errstate(over="ignore"):
        counter = np.arange(1, n // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = seeds.astype(np.uint64)[:, None] + counter
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    parts = z.astype("<u8").view("<u2").reshape(len(seeds), n)
    return torch.from_numpy(parts.astype(np.int32))
