"""Which devices are to work, and whether one more shard on a slow one delays the end. Pure functions.

Devices of one pool are alike, so what has to be chosen is a number per pool. The cheapest rate of images per second that is
enough is a fractional knapsack: fill it with the pools that cost least per image. Rounding up to whole devices costs at most
one device's share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

#: Of a rate that is needed, so much is lost to rounding without harm.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Offer:
    """What a pool offers: from `least` to `most` devices, each of `rate` images per second at `cost` per image."""

    name: str
    least: int
    most: int
    rate: float
    cost: float


def choose_devices(offers: Iterable[Offer], needed: float) -> dict[str, int]:
    """How many devices of each pool make at least `needed` images per second for the least cost; all where that is too little.

    The least of each pool works in any case. Of pools that cost the same the one with faster devices comes first.
    """
    offers = list(offers)
    chosen = {offer.name: offer.least for offer in offers}
    missing = needed - sum(offer.least * offer.rate for offer in offers)
    for offer in sorted(offers, key=lambda o: (o.cost, -o.rate)):
        if missing <= needed * _TOLERANCE or offer.rate <= 0:
            continue
        more = min(offer.most - offer.least, math.ceil(missing / offer.rate - _TOLERANCE))
        chosen[offer.name] += more
        missing -= more * offer.rate
    return chosen


def seconds_until_done(busy_s: Sequence[float], shard_s: Sequence[float], shards: int) -> float:
    """When `shards` more shards are done, if every device takes the next one whenever it is free.

    Args:
        busy_s: seconds until each device is free.
        shard_s: seconds that each device takes for a shard.
        shards: that nobody has begun; 0: when the last device that is busy is free.

    Returns:
        Seconds; no device that would end its first shard later than that can help. Infinite without devices.
    """
    busy, each = np.asarray(busy_s, float), np.asarray(shard_s, float)
    if not len(each):
        return math.inf
    if shards <= 0:
        return float(busy.max())
    low, high = 0.0, float((busy + shards * each).min())
    for _ in range(50):
        middle = (low + high) / 2
        if np.floor(np.maximum(0.0, middle - busy) / each + _TOLERANCE).sum() >= shards:
            high = middle
        else:
            low = middle
    return high
