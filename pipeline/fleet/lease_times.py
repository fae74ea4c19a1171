"""How long a lease takes where devices are unlike: a quick one makes a run of shards in that time, a slow one a piece of a shard.

Of a piece the attempt seals what it has and gives the shard back; whoever takes it next goes on from there. Pure functions of seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

#: A lease takes so long, or as long as the quickest device takes for so many shards: to give one back and go on from there
#: takes a second or two.
LEASE_S, LEASE_SHARDS = 60.0, 4
#: To seal, give back, and begin where another ended.
HAND_OVER_S = 2.0
#: Devices that take this many times as long as the quickest one, or less, are quick as well.
QUICK = 2.0
#: Near the end a piece is worth while from here on.
LEAST_PIECE_S = 10.0
#: A piece takes this part of the time that is left for it.
PIECE_SHARE = 0.5


def rest_seconds(shard_s: Iterable[float]) -> float:
    """How long before the end pieces are to be given back, by devices of which each takes so long for a shard.

    All slow ones may give theirs back at once, just when the quick ones have begun with a shard; a rest is nearly a whole one at worst.
    """
    each = list(shard_s)
    if not each:
        return 0.0
    quickest_s = min(each)
    quick = sum(s <= QUICK * quickest_s for s in each)
    return quickest_s * (1 + math.ceil((len(each) - quick) / quick)) + HAND_OVER_S


@dataclass(frozen=True)
class LeaseTimes:
    """Of the devices of a job at one moment.

    Attributes:
        quickest_s: how long the quickest device takes for a shard; 0: not known.
        rest_s: how long before the end a piece is to be given back.
        end_s: until everything is to be done; infinite: far away.
        are_unlike: whether there are devices of several pools.
    """

    quickest_s: float = 0.0
    rest_s: float = 0.0
    end_s: float = math.inf
    are_unlike: bool = False

    @property
    def usual_s(self) -> float:
        """How long a lease takes at most."""
        return max(LEASE_S, LEASE_SHARDS * self.quickest_s) if self.are_unlike else math.inf

    def piece_s(self, busy_s: float) -> float:
        """How long a device that is free in `busy_s` may draw, so that others make the rest of its shard in time; 0: not long enough.

        That is half of the time there seems to be: the end comes sooner than it looks where pieces help."""
        if not self.are_unlike:
            return 0.0
        seconds = min(self.usual_s, (self.end_s - busy_s - self.rest_s) * PIECE_SHARE)
        return seconds if seconds >= LEAST_PIECE_S else 0.0

    def is_quick(self, shard_s: float) -> bool:
        """Whether a device that takes so long for a shard is one that makes the rests of others' shards."""
        return self.are_unlike and shard_s <= QUICK * self.quickest_s

    def at_most_s(self, shard_s: float | None, busy_s: float) -> float | None:
        """How long a device that is free in `busy_s` and takes `shard_s` for a shard may draw for one lease; None: to its shard's
        end. What it takes is shown by a piece where it is not known."""
        in_time = shard_s is not None and busy_s + shard_s <= self.end_s
        most_s = self.usual_s if in_time else self.piece_s(busy_s) or self.usual_s
        return None if most_s == math.inf or (shard_s is not None and shard_s <= most_s) else most_s
