"""Divide counted millijoules exactly: nothing is created, nothing is lost.

`apportion` divides one number by weights; `pipeline.energy.counter_split` divides a counter's growth among workers that shared the
device. Pure, and in integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: An unclaimed stretch longer than this is not a pause of the job but the time between two runs of it. A worker that
#: dies takes the record of at most one shard with it, which is minutes.
MAX_GAP_NS = 30 * 60 * 1_000_000_000


def apportion(total_mj: int, weights: Sequence[int]) -> list[int]:
    """Divide `total_mj` in proportion to `weights`: integers that add up to it exactly.

    Largest remainder (Hamilton); equal remainders go to the earlier one.

    Raises:
        ValueError: a number is negative, or there is nobody to take a total that is not 0.
    """
    whole = sum(weights)
    if total_mj < 0 or any(w < 0 for w in weights) or (total_mj and not whole):
        raise ValueError(f"cannot apportion {total_mj} mJ by weights that add up to {whole}")
    if not whole:
        return [0] * len(weights)
    shares = [total_mj * w // whole for w in weights]
    rest = total_mj - sum(shares)
    if rest:
        order = sorted(range(len(weights)), key=lambda i: (-(total_mj * weights[i] % whole), i))
        for i in order[:rest]:
            shares[i] += 1
    return shares


def image_energy(shard_energy_mj: int | None, n_images: int) -> list[int | None]:
    """Equal shares of a shard's energy for its images, which cost the same; None where it was not measured."""
    if shard_energy_mj is None:
        return [None] * n_images
    return list(apportion(shard_energy_mj, [1] * n_images)) if n_images else []


def sum_or_none(parts: Iterable[int | None]) -> int | None:
    """The sum, or None where a part is missing or there are none: a part of the energy is not the energy."""
    known = list(parts)
    return None if not known or None in known else sum(p for p in known if p is not None)


class Reading(NamedTuple):
    """A counter's value `energy_mj` at `t_ns`."""

    t_ns: int
    energy_mj: int


@dataclass(frozen=True)
class Run:
    """A stretch in which one counter's readings follow each other plausibly: its growth is what is divided."""

    first: Reading
    last: Reading

    @property
    def energy_mj(self) -> int:
        return self.last.energy_mj - self.first.energy_mj


@dataclass(frozen=True)
class Unclaimed:
    """Counted energy that no segment can have. `segment_class` is "gap", or "off" between two runs of a job."""

    t_open_ns: int
    t_close_ns: int
    segment_class: str
    energy_mj: int
