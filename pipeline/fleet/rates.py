"""How fast the workers of each pool are and what an image costs there, learnt from commits as they arrive."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from millijoule.pipeline.fleet.pools import Pool, Preference
from millijoule.workers.lease import Piece
from millijoule.workers.schemas import Commit

#: A pool is as fast as its last so many shards were, a worker as its own last few.
POOL_SHARDS, WORKER_SHARDS = 256, 4
#: Fewer shards of a pool than these do not yet replace what was stated.
ENOUGH_SHARDS = 2


@dataclass
class _Window:
    """Sums over the last shards."""

    most: int
    shards: deque[tuple[int, float, float | None]] = field(default_factory=deque)
    images: int = 0
    seconds: float = 0.0
    joules: float = 0.0
    with_joules: int = 0  # images of shards whose energy is known

    def add(self, images: int, seconds: float, joules: float | None) -> None:
        self.shards.append((images, seconds, joules))
        self._count(1, images, seconds, joules)
        if len(self.shards) > self.most:
            self._count(-1, *self.shards.popleft())

    def _count(self, sign: int, images: int, seconds: float, joules: float | None) -> None:
        self.images += sign * images
        self.seconds += sign * seconds
        if joules is not None:
            self.joules += sign * joules
            self.with_joules += sign * images

    @property
    def rate(self) -> float | None:
        return self.images / self.seconds if self.seconds > 0 and self.images else None


@dataclass(frozen=True)
class ShardCost:
    """What a shard takes on one worker: device seconds, joules while it draws, and money for both; None: not known."""

    seconds: float | None
    joules: float | None
    money: float | None


class Rates:
    """Of the pools of one job, by name; a worker is named by its id."""

    def __init__(self, pools: Iterable[Pool]) -> None:
        self.pools = {pool.name: pool for pool in pools}
        self._of_pool: dict[str, _Window] = defaultdict(lambda: _Window(POOL_SHARDS))
        self._of_worker: dict[str, _Window] = defaultdict(lambda: _Window(WORKER_SHARDS))

    def observe(self, pool: str, commit: Commit) -> None:
        """A worker of `pool` has committed a shard; one that took over parts of others says nothing of its own speed."""
        if any(not part.startswith(f"{commit.attempt_id}.") for part in commit.parts):
            return
        images = commit.images_drawn or commit.images_ok
        made_in = {commit.attempt_id, *commit.parts}
        own = [s for s in commit.segments if s.attempt_id in made_in]
        seconds = sum(s.close.t_mono_ns - s.open.t_mono_ns for s in own) / 1e9
        if seconds <= 0:  # without telemetry there are no segments
            seconds = (commit.t_end_wall_ns - commit.t_start_wall_ns) / 1e9
        mj = commit.energy_mj if commit.energy_mj is not None else commit.energy_estimate_mj
        self._add(pool, commit.worker_id, images, seconds, mj)

    def observe_piece(self, pool: str, worker_id: str, piece: Piece) -> None:
        """A worker of `pool` has sealed a piece of a shard and given the rest back."""
        mj = piece.energy_mj if piece.energy_mj is not None else piece.energy_estimate_mj
        self._add(pool, worker_id, piece.images, piece.seconds, mj)

    def _add(self, pool: str, worker_id: str, images: int, seconds: float, mj: int | None) -> None:
        if images <= 0 or seconds <= 0:
            return
        for window in (self._of_pool[pool], self._of_worker[worker_id]):
            window.add(images, seconds, None if mj is None else mj / 1000)

    def images_per_s(self, pool: str) -> float | None:
        """Of one worker while it draws; as measured, else as stated; None: not known yet."""
        window = self._of_pool[pool]
        if len(window.shards) >= ENOUGH_SHARDS:
            return window.rate
        return self.pools[pool].images_per_s or window.rate

    def worker_images_per_s(self, worker_id: str, pool: str) -> float | None:
        """Of this very worker; as its pool while it has not shown anything."""
        return self._of_worker[worker_id].rate or self.images_per_s(pool)

    def joules_per_image(self, pool: str) -> float | None:
        """While it draws: measured where there are counters, else modelled, else as stated; None: not known."""
        window = self._of_pool[pool]
        if window.with_joules and len(window.shards) >= ENOUGH_SHARDS:
            return window.joules / window.with_joules
        return self.pools[pool].joules_per_image

    def per_shard(self, pool: str, images: float, price_per_kwh: float = 0.0) -> ShardCost:
        """What so many images take on one worker of a pool, as far as is known."""
        rate, joules = self.images_per_s(pool), self.joules_per_image(pool)
        seconds = images / rate if rate else None
        money = None
        if self.pools[pool].price_per_hour is not None:
            per_image = self.cost_per_image(pool, "cost", price_per_kwh)
            money = None if per_image is None else per_image * images
        return ShardCost(seconds, None if joules is None else joules * images, money)

    def cost_per_image(self, pool: str, prefer: Preference, price_per_kwh: float = 0.0) -> float | None:
        """What is to be saved, per image: joules, or money for the device's hours and its electricity; 0 where only speed counts.

        Infinite where shards have been made whose joules nobody knows: the pool is the last to be chosen.
        """
        if prefer == "speed":
            return 0.0
        joules = self.joules_per_image(pool)
        if prefer == "energy":
            return math.inf if joules is None and self.has_no_joules(pool) else joules
        rate, price = self.images_per_s(pool), self.pools[pool].price_per_hour
        if rate is None or price is None:
            return None
        return price / 3600 / rate + (joules or 0.0) / 3.6e6 * price_per_kwh

    def has_no_joules(self, pool: str) -> bool:
        """Whether it was to be measured and could not be: no counter, no model of it, and nothing stated."""
        return len(self._of_pool[pool].shards) >= ENOUGH_SHARDS and self.joules_per_image(pool) is None

    def is_known(self, pool: str, prefer: Preference) -> bool:
        """Whether enough is known to choose by."""
        return self.images_per_s(pool) is not None and self.cost_per_image(pool, prefer) is not None
