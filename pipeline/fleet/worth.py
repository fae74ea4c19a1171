"""How many workers the work that is left is worth, shared out over all pools in one place. Pure functions.

A worker that has no node yet is a request, for which an autoscaler buys one. A further worker is worth that where, when it is
ready, nobody has begun what it then works on for as long as it took to start, and at least a shard; and where the others go on
as long beside it. So a start is repaid by as much work, and who starts has a shard to begin with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from millijoule.pipeline.fleet.room import Places

#: Nodes that one pool of several may have before it is known how fast its workers are.
PROBE_WORKERS = 2
#: So many times faster than the fastest one known may a pool be of which nothing is known: it gets a node where there is work even then.
UNLIKE = 4.0
#: A request for a worker that is not met within this time counts as capacity that is not there.
NO_CAPACITY_S = 180.0


@dataclass(frozen=True)
class Standing:
    """How one pool stands.

    Attributes:
        least, most: workers it is to have in any case, and may have.
        room: workers that fit the nodes that are there, were they the pool's alone; None: nobody counts nodes, all are asked for at once.
        there: workers that have a node.
        asked: of those that have none, how many may get one any moment.
        ending: workers whose place is free any moment, besides.
        in_hand: of those at work, images that each still has in hand.
        coming: of those that have nothing in hand, seconds until each is ready.
        images_per_s: of one worker, as far as is known the most it can be.
        is_known: that is its own rate, measured or stated.
        wait_s: seconds until a worker that is asked for is ready.
        repaid_s: seconds of work that make a start worth while.
        waits_in_vain: its requests are not met for longer than nodes take to come.
    """

    name: str
    least: int
    most: int
    room: int | None
    there: int
    asked: int
    ending: int
    in_hand: tuple[float, ...]
    coming: tuple[float, ...]
    images_per_s: float
    is_known: bool
    wait_s: float
    repaid_s: float
    waits_in_vain: bool = False


def share_out(
    pools: Sequence[Standing],
    useful: int,
    unbegun: float,
    shard_images: float,
    places: Places | None = None,
) -> Share:
    """Workers that each pool is to have, those that are there included.

    In all never more than `useful`, but for the least that each pool is to have and those that are there.

    Args:
        pools: those preferred first.
        useful: shards that are not done, and questions that wait for a worker.
        unbegun: images of shards that nobody has begun.
        places: what workers leave free of the nodes that are there; None: each pool's `room` is its own.
    """
    share = Share(pools, useful, unbegun, shard_images, places)
    hopeful = [pool for pool in pools if not pool.waits_in_vain]
    for pool in pools:
        share.settle(pool)
    if places is not None and not places.room.may_grow:
        return share
    for pool in pools:
        if pool.waits_in_vain and share.wanted[pool.name] == pool.there:
            share.give(pool, 1)  # that shows when its nodes come
    if not any(share.wanted[pool.name] for pool in hopeful):
        for pool in [pool for pool in hopeful if pool.most > 0][:1]:
            share.give(pool, 1)
    share.buy(hopeful)
    share.buy([pool for pool in pools if pool.waits_in_vain])
    return share


class Share:
    """`wanted` workers by pool, of which `room` have a place on nodes that are there, and how many more there may be in all."""

    def __init__(
        self,
        pools: Sequence[Standing],
        useful: int,
        unbegun: float,
        shard_images: float,
        places: Places | None,
    ) -> None:
        self.pools = pools
        self.unbegun, self.shard_images = unbegun, shard_images
        # those there beyond the most are let go: nobody is to take their place, but they have what is in their hands
        self.wanted = {pool.name: max(pool.least, min(pool.there, pool.most)) for pool in pools}
        self.budget = useful - sum(max(self.wanted[pool.name], pool.there) for pool in pools)
        self.room: dict[str, int] = {}
        self.places = None if places is None else places.copy()
        self._kept = dict.fromkeys(self.wanted, 0)  # places that are no other pool's
        if self.places is not None:
            for pool in pools:
                self.places.take(pool.name, max(0, self.wanted[pool.name] - pool.there))
            for pool in pools:
                asked = pool.asked - max(0, self.wanted[pool.name] - pool.there)
                self._kept[pool.name] = pool.ending + self.places.take(pool.name, max(0, asked))

    def settle(self, pool: Standing) -> None:
        """Give `pool` what fits the nodes that are there, beside what others have been given before."""
        wanted, kept = self.wanted[pool.name], self._kept[pool.name]
        room = pool.most if pool.room is None else pool.room
        if self.places is not None:
            room = min(room, wanted + kept + self.places.fits(pool.name))
        if pool.room is not None:
            self.room[pool.name] = room
        given = self.give(pool, room - wanted)
        if self.places is not None:
            self.places.take(pool.name, max(0, given - kept))

    def give(self, pool: Standing, more: int) -> int:
        more = max(0, min(more, pool.most - self.wanted[pool.name], self.budget))
        self.wanted[pool.name] += more
        self.budget -= more
        return more

    def buy(self, pools: Iterable[Standing]) -> None:
        """Give `pools`, in order, what is worth a node; those not known yet a few, and at most half of what is worth one."""
        pools = list(pools)
        known = [pool for pool in pools if pool.is_known or len(self.pools) == 1]
        unknown = [pool for pool in pools if pool not in known]
        for pool in known:
            worth = self.worth(pool)
            shown = sum(self._to_show(other) for other in unknown)
            self.give(pool, worth - min(worth // 2, shown))
        for pool in unknown:
            self.give(pool, min(self.worth(pool), self._to_show(pool)))
        for pool in known:
            self.give(pool, self.worth(pool))

    def _to_show(self, pool: Standing) -> int:
        return max(0, min(pool.most, PROBE_WORKERS) - self.wanted[pool.name])

    def worth(self, pool: Standing) -> int:
        """Further workers of `pool` that are worth a node, all others as they are to be; 0 where none may be had."""
        if min(pool.most - self.wanted[pool.name], self.budget) <= 0:
            return 0  # none may be had, so nobody has to go through what all workers have in hand
        rate = pool.images_per_s
        least_s = max(pool.repaid_s, self.shard_images / rate)  # that each is to work
        left = self.unbegun - sum(self._taken(other, pool.wait_s, least_s) for other in self.pools)
        return max(0, math.floor(left / (least_s * rate)))

    def _taken(self, pool: Standing, wait_s: float, least_s: float) -> float:
        """Images that workers of `pool` begin within `wait_s`, in whole shards, and those that they are to go on with."""
        rate, shard = pool.images_per_s, self.shard_images
        ends = [rate * wait_s - left for left in pool.in_hand[: pool.most]]
        begun = sum(math.ceil(images / shard) for images in ends if images > 0)
        ready = [rate * (wait_s - ready_s) for ready_s in pool.coming]
        begun += sum(max(1, math.ceil(images / shard)) for images in ready)
        asked = max(0, self.wanted[pool.name] - pool.there)
        begun += asked * max(1, math.ceil(rate * (wait_s - pool.wait_s) / shard))
        going_on = len(ends) + len(ready) + asked
        return begun * shard + going_on * rate * max(0.0, least_s - shard / rate)
