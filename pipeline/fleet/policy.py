"""Which workers of which pools a job is to have, and which of them get a lease: decided anew as rates become known.

* With a deadline: the devices that finish in time for the fewest joules (or money), by measured rates.
* Without: only the pool with the fewest joules (or the least money) per image; all devices where speed is preferred.
* A pool of which too little is known first shows it on a few workers.
* A pool whose nodes do not come is waited for, and made up for by the next one meanwhile.
* Nobody gets a shard that somebody else would have done sooner, counted from now to its end.
* A device that is slow beside others gets a piece of a shard: its leases take about as long as theirs (`lease_times`).

Plain state without I/O or clocks. All of it is learnt again within minutes after a restart.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from millijoule.pipeline.fleet.choice import Offer, choose_devices, seconds_until_done
from millijoule.pipeline.fleet.lease_times import LeaseTimes, rest_seconds
from millijoule.pipeline.fleet.pools import Pool, Preference
from millijoule.pipeline.fleet.rates import Rates, ShardCost
from millijoule.pipeline.fleet.worth import NO_CAPACITY_S, PROBE_WORKERS
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import room_of
from millijoule.workers.lease import Piece
from millijoule.workers.schemas import Commit

log = logging.getLogger(__name__)

#: Between two choices; workers come and go in minutes.
CHOICE_PERIOD_S = 10.0
#: Far from the end the workers are looked at so often.
LOOK_PERIOD_S = 1.0
#: A worker takes so long to start, where nobody says how long.
START_S = 30.0
#: More than is needed by so much: rates waver, workers die.
RESERVE = 0.03
#: This part of the job's time until the deadline is kept in hand for what goes wrong last, near it at most this part of what is left.
SPARE, MOST_SPARE = 0.02, 0.25
#: A pool has fewer devices only where it needs fewer by this share: what is stopped has to be started again.
HYSTERESIS = 0.05
#: A device that would have to start counts as dearer than one that works by this: else pools alike take each other's place for ever.
MOVING = 0.05
#: Without a deadline a pool counts as the cheapest within this of the best one.
ALIKE = 0.02
#: Most shards in a run that is kept for one worker.
MOST_RUN = 32
#: Near the end nobody keeps more than this part of what an even share would be.
RUN_SHARE = 0.25
#: Estimates of when a shard ends may be wrong by so much before a device is refused.
STRAGGLER_TOLERANCE = 0.05


class FleetPolicy:
    """Of one run of a job. A worker, for it, is as for `Demand`, and has `pool` and `held` besides.

    Args:
        prefer: None: energy with a deadline, else speed.
        deadline_s: on the clock that `look` is called with; None: there is none.
        price_per_kwh: of electricity, for preference "cost".
    """

    def __init__(
        self,
        pools: Collection[Pool],
        prefer: Preference | None = None,
        *,
        deadline_s: float | None = None,
        price_per_kwh: float = 0.0,
    ) -> None:
        self.pools = {pool.name: pool for pool in pools}
        self.prefer: Preference = prefer or ("speed" if deadline_s is None else "energy")
        self.deadline_s = deadline_s
        self.price_per_kwh = price_per_kwh
        self.rates = Rates(pools)
        self.room = room_of({pool.name: pool.options for pool in pools})
        self.targets = {name: pool.options.max_workers for name, pool in self.pools.items()}
        self.images_made: Counter[str] = Counter()  # accepted ones of committed shards, by pool
        self.leaving: set[str] = set()  # ids of workers that are to end when they have nothing in hand
        self._pool_of: dict[str, str] = {}
        #: Seconds until a worker of a pool is ready, on a node to come.
        self.start_s: Callable[[str], float] = lambda pool: START_S
        self._next_choice = 0.0
        self._known: list[str] = []
        self._is_late = False
        self._unmeasured: set[str] = set()  # pools of which that was said
        self._spans: dict[
            str, tuple[float, float]
        ] = {}  # per worker: seconds until it is free, and per shard
        self._end_s: float | None = None  # until all unleased shards are done; None: far away
        self._shard_images = 1.0
        self._unleased = self._open_shards = self._pieces_out = 0
        self._has_questions = False
        self._next_look = 0.0
        self._began = self._now = -math.inf
        self._quickest_s = self._rest_s = 0.0  # for a shard, and for all rests of shards; 0: not known
        self._is_anyone_in_time = False  # by the deadline, with one more shard

    def observe(self, commit: Commit) -> None:
        """A commit of this run has arrived."""
        if (pool := self._pool_of.get(commit.worker_id)) is not None:
            self.rates.observe(pool, commit)
        others = commit.images_by_others
        made = {**others, commit.worker_id: commit.images_ok - sum(others.values())}
        for worker_id, images in made.items():
            self.images_made[self._pool_of.get(worker_id, "")] += images

    def observe_piece(self, worker_id: str, piece: Piece) -> None:
        """A worker has given a shard back, a piece of it sealed."""
        if (pool := self._pool_of.get(worker_id)) is not None:
            self.rates.observe_piece(pool, worker_id, piece)

    def shard_costs(self) -> dict[str, ShardCost]:
        """What a shard takes on each pool."""
        return {
            name: self.rates.per_shard(name, self._shard_images, self.price_per_kwh) for name in self.pools
        }

    def look(self, coordinator: Coordinator, workers: Collection[Any], now: float) -> None:
        """Take note of what is at work and left; choose anew where it is time to."""
        self._now = now
        if self._began == -math.inf:
            self._began = now
            self._shard_images = coordinator.images_per_shard  # until leases are out
        for worker in workers:
            self._pool_of.setdefault(worker.worker_id, worker.pool)
        self._unleased, self._has_questions = coordinator.unleased, coordinator.has_questions
        # what waits behind another shard can be taken back: it counts as nobody's
        self._open_shards = max(0, self._unleased) + coordinator.n_ahead
        if now < self._next_look and self._end_s is None:
            return
        self._next_look = now + LOOK_PERIOD_S
        self._pieces_out = sum(e.lease.at_most_s is not None for e in coordinator.active.values())
        if coordinator.active:
            self._shard_images = coordinator.images_out / len(coordinator.active) or self._shard_images
        self._look_at_the_end(coordinator, workers, now)
        known = [name for name in self.pools if self.rates.is_known(name, self.prefer)]
        if now >= self._next_choice or known != self._known:
            self._next_choice, self._known = now + CHOICE_PERIOD_S, known
            self._choose(coordinator, workers, now)
        self._let_go(workers)

    # -- how many ------------------------------------------------------------------------------------------------

    def _choose(self, coordinator: Coordinator, workers: Collection[Any], now: float) -> None:
        useful, known = coordinator.useful_workers, self._known
        self._name_unmeasured(known)
        if self.prefer == "speed":
            chosen = self._all(known)
        elif not known:
            chosen = {}
        elif self.deadline_s is None:
            chosen = self._cheapest(known, workers, now)
        else:
            begun = coordinator.images_out - coordinator.images_ahead  # half of that is drawn, in the mean
            left = coordinator.remaining * self._shard_images - begun / 2 - coordinator.images_sealed
            left_s = self.deadline_s - now
            spare_s = min(SPARE * (self.deadline_s - self._began), MOST_SPARE * left_s)
            chosen = self._enough(known, left, max(1.0, left_s - spare_s), workers, now)
        for name, pool in self.pools.items():
            least, most = pool.options.min_workers, pool.options.max_workers
            if name not in known and self.prefer != "speed":
                chosen[name] = max(least, min(most, PROBE_WORKERS))
            before, target = self.targets[name], chosen.get(name, least)
            if before * (1 - HYSTERESIS) < target < before and target > 1:
                target = before
            self.targets[name] = min(max(least, target), useful)

    def order(self) -> list[str]:
        """Names of the pools, by what an image costs there as far as that is known or stated, the faster ones first."""

        def key(name: str) -> tuple[float, float, float]:
            rate = self.rates.images_per_s(name)
            cost = self.rates.cost_per_image(name, self.prefer, self.price_per_kwh)
            price = self.pools[name].price_per_hour if cost is None and self.prefer == "cost" else None
            return math.inf if cost is None else cost, price or math.inf, -(rate or 0.0)

        return sorted(self.pools, key=key)

    def _name_unmeasured(self, known: Collection[str]) -> None:
        """Say once of each pool that its joules will not be known."""
        if self.prefer != "energy":
            return
        for name in known:
            if name not in self._unmeasured and self.rates.has_no_joules(name):
                self._unmeasured.add(name)
                log.warning(
                    "pool %s: nobody measures its joules, so it is chosen last; state them with joules=X",
                    name,
                )

    def _all(self, known: Collection[str]) -> dict[str, int]:
        return {name: pool.options.max_workers for name, pool in self.pools.items()}

    def _offers(self, known: Collection[str], most: Mapping[str, int]) -> list[Offer]:
        offers = []
        for name in known:
            options = self.pools[name].options
            rate = self.rates.images_per_s(name)
            cost = self.rates.cost_per_image(name, self.prefer, self.price_per_kwh)
            assert rate is not None
            assert cost is not None
            offers.append(Offer(name, options.min_workers, most[name], rate, cost))
        return offers

    def _offers_within(
        self, time_s: float, known: Collection[str], most: Mapping[str, int], workers: Collection[Any]
    ) -> list[Offer]:
        """Two offers of each pool, of devices that work and of others, with the images that each makes in time as its rate.

        The last lease of a device ends up to a whole one before the time does, half of one in the mean; a device that is yet to
        start has so much less time, and costs more than one that is there: what starts it, and what starting the other one had cost.
        """
        work = Counter(w.pool for w in workers if w.ready is not None and not w.stopping)
        offers = []
        for offer in self._offers(known, most):
            there = min(work[offer.name], offer.most)
            lease_s = min(self._shard_images / offer.rate, self._times.usual_s)
            for least, devices, use_s, cost in (
                (min(offer.least, there), there, time_s, offer.cost),
                (
                    max(0, offer.least - there),
                    offer.most - there,
                    time_s - self.start_s(offer.name),
                    offer.cost * (1 + MOVING),
                ),
            ):
                images = offer.rate * max(0.0, use_s - min(use_s, lease_s) / 2)
                offers.append(Offer(offer.name, least, devices, images, cost))
        return offers

    def _most(self, known: Collection[str], workers: Collection[Any]) -> Iterator[dict[str, int]]:
        """How many devices each pool may have. Where no node will ever come, pools that fit the same ones have them one after
        the other: first those that are preferred, then, should these be too slow, the fastest."""
        if self.room is None or self.room.may_grow:
            yield {name: self.pools[name].options.max_workers for name in known}
            return
        cheapest = [name for name in self.order() if name in known]
        fastest = sorted(cheapest, key=lambda name: -(self.rates.images_per_s(name) or 0.0))
        others = [w for w in workers if w.pool not in known]
        for names in (cheapest, fastest):
            fit = self._on_nodes(names, others)
            yield {name: max(n, self.pools[name].options.min_workers) for name, n in fit.items()}

    def _there(
        self, known: Collection[str], most: Mapping[str, int], workers: Collection[Any], now: float
    ) -> dict[str, int]:
        """How many devices of each pool can be counted on: the most it may have, unless requests for some wait in vain."""
        there = Counter(w.pool for w in workers if w.node is not None and not w.stopping)
        vain = self._in_vain(workers, now)
        return {
            name: max(self.pools[name].options.min_workers, there[name]) if name in vain else most[name]
            for name in known
        }

    def _in_vain(self, workers: Collection[Any], now: float) -> set[str]:
        """Pools that wait for a node longer than nodes take to come."""
        return {w.pool for w in workers if w.node is None and now - w.spawned > NO_CAPACITY_S}

    def _enough(
        self, known: Collection[str], left: float, time_s: float, workers: Collection[Any], now: float
    ) -> dict[str, int]:
        """The cheapest devices that make `left` images in time; where some of them do not come, others too, until they do."""
        needed, can = left * (1 + RESERVE), 0.0
        for most in self._most(known, workers):
            wished = choose_devices(self._offers_within(time_s, known, most, workers), needed)
            there = self._there(known, most, workers, now)
            offers = self._offers_within(time_s, known, there, workers)
            chosen = choose_devices(offers, needed)
            can = sum(offer.most * offer.rate for offer in offers)
            if can >= needed:
                break
        looked_for = {*known, *self._in_vain(workers, now)}
        if can < left and len(looked_for) == len(self.pools) and not self._is_late:
            self._is_late = True
            log.warning(
                "the deadline will be missed: %.3g images/s are needed, all pools together make %.3g",
                *(left / time_s, can / time_s),
            )
        if can <= 0:
            # none would be ready in time, as far as is known: on nodes that are there one may be, sooner than thought
            return self._on_nodes([name for name in self.order() if name in known], workers)
        return {name: max(wished[name], chosen[name]) for name in known}

    def _on_nodes(self, names: Sequence[str], workers: Collection[Any]) -> dict[str, int]:
        """Devices that each pool may have on the nodes that are there beside `workers`, one pool after the other."""
        bounds = {name: self.pools[name].options.bounds_at_once for name in names}
        if self.room is None:
            return {name: most for name, (_, most) in bounds.items()}
        held = [(w.pool, w.node.node_id) for w in workers if w.node is not None]
        return self.room.together(names, bounds, held)

    def _cheapest(self, known: Collection[str], workers: Collection[Any], now: float) -> dict[str, int]:
        """All devices of the pool that costs least per image; of the next one as well while its nodes do not come."""
        counted_on = self._there(known, next(self._most(known, workers)), workers, now)
        chosen: dict[str, int] = {}
        offers = sorted(self._offers(known, counted_on), key=lambda offer: offer.cost)
        best = offers[0].cost
        for offer in offers:
            if offer.cost > best * (1 + ALIKE) and chosen:
                break
            chosen[offer.name] = self.pools[offer.name].options.max_workers
            if offer.most == 0 and len(chosen) < len(offers):
                best = offers[
                    len(chosen)
                ].cost  # nothing of it is to be had: the next one is the best there is
        return chosen

    def _let_go(self, workers: Collection[Any]) -> None:
        """Name those that are too many: of each pool the slowest."""
        staying: dict[str, list[Any]] = {name: [] for name in self.pools}
        for worker in workers:
            if worker.ready is not None and not worker.stopping:
                staying[worker.pool].append(worker)
        leaving = set()
        for name, own in staying.items():
            if (too_many := len(own) - self.targets[name]) > 0:
                own.sort(key=lambda w: (w.worker_id not in self.leaving, self._rate(w), w.worker_id))
                leaving |= {w.worker_id for w in own[:too_many]}
        self.leaving = leaving

    # -- who gets a lease ----------------------------------------------------------------------------------------

    def _rate(self, worker: Any) -> float:
        return self.rates.worker_images_per_s(worker.worker_id, worker.pool) or 0.0

    def _look_at_the_end(self, coordinator: Coordinator, workers: Collection[Any], now: float) -> None:
        """When everything is done as things stand; far from the end nobody asks."""
        ready = [w for w in workers if w.ready is not None and not w.stopping]
        rates = {w.worker_id: rate for w in ready if (rate := self._rate(w)) > 0}
        self._spans, self._end_s, self._is_anyone_in_time = {}, None, False
        for worker_id, rate in rates.items():
            self._spans[worker_id] = (0.0, self._shard_images / rate)
        if not rates:
            return
        shard_s = [each for _, each in self._spans.values()]
        self._quickest_s, self._rest_s = min(shard_s), rest_seconds(shard_s)
        self._is_anyone_in_time = self.deadline_s is not None and now + self._quickest_s <= self.deadline_s
        shards = max(0, math.ceil(self._open_shards - coordinator.images_waiting / self._shard_images))
        slowest_s = max(shard_s)
        if shards * self._shard_images / sum(rates.values()) > slowest_s:
            return
        busy = dict.fromkeys(rates, 0.0)
        for entry in coordinator.active.values():
            worker_id = entry.lease.worker_id
            if worker_id in busy and entry.lease.writes and not entry.is_ahead:
                images, drawn = entry.lease.shard.n_images, (now - entry.started) * rates[worker_id]
                left_s = max(0.0, images - max(drawn, entry.images_done)) / rates[worker_id]
                most_s = entry.lease.at_most_s
                busy[worker_id] += (
                    left_s if most_s is None else min(left_s, max(0, entry.started + most_s - now))
                )
        self._spans = {w: (busy[w], each) for w, (_, each) in self._spans.items()}
        spans = list(self._spans.values())
        self._end_s = seconds_until_done([b for b, _ in spans], [e for _, e in spans], shards)

    def may_lease(self, worker: Any) -> bool:
        """Whether one more shard for this worker, begun when it is free, is of use."""
        if worker.worker_id in self.leaving:
            return False
        if self._has_questions or self._open_shards <= 0:  # answers and second leases need whoever is there
            return True
        span = self._span(worker)
        if span is None:  # what it is worth shows in one lease, near the end in a piece
            return not worker.held and (self._end_s is None or self._times.piece_s(0.0) > 0)
        if self._ends_before_deadline(worker, span[1]) and (self._end_s is None or self._is_in_time(span)):
            return True
        return self._times.piece_s(self._busy_s(span, ahead=bool(worker.held))) > 0

    def _span(self, worker: Any) -> tuple[float, float] | None:
        """Seconds until it is free, and for one more shard; None: not known. It may have committed its first since the last look."""
        rate = self._rate(worker)
        return self._spans.get(worker.worker_id) or ((0.0, self._shard_images / rate) if rate else None)

    def _ends_before_deadline(self, worker: Any, shard_s: float) -> bool:
        """Whether one more shard of it would; and where the others' would not, or all are late, that is no reason to refuse it."""
        if self.deadline_s is None or self._is_late or not self._is_anyone_in_time:
            return True
        shards = 2 if worker.held else 1
        return self._now + shards * shard_s <= self.deadline_s

    def _is_in_time(self, span: tuple[float, float]) -> bool:
        """Whether a device that is free and takes so long would end one more shard before the others have done all there is."""
        assert self._end_s is not None
        busy_s, shard_s = span
        return busy_s + shard_s <= self._end_s * (1 + STRAGGLER_TOLERANCE)

    @property
    def _times(self) -> LeaseTimes:
        end_s = math.inf if self._end_s is None else self._end_s
        if self.deadline_s is not None and not self._is_late and self._is_anyone_in_time:
            end_s = min(end_s, self.deadline_s - self._now)
        return LeaseTimes(self._quickest_s, self._rest_s, end_s, len(self.pools) > 1)

    def _busy_s(self, span: tuple[float, float], *, ahead: bool) -> float:
        """Seconds until a device can begin with one more lease; far from the end nobody has counted them."""
        return min(span[1], self._times.usual_s) if ahead and self._end_s is None else span[0]

    def at_most_s(self, worker_id: str, is_ahead: bool) -> float | None:
        """How long this worker may draw for one lease; None: until its shard is made."""
        if (span := self._spans.get(worker_id)) is None:
            rate = self.rates.worker_images_per_s(worker_id, self._pool_of[worker_id])
            return self._times.at_most_s(self._shard_images / rate if rate else None, 0.0)
        return self._times.at_most_s(span[1], self._busy_s(span, ahead=is_ahead))

    def waits_for_rests(self, worker: Any, waiting: int) -> bool:
        """Whether a worker that has nothing to do is to make the rest of a shard that a slow one gives back soon, beside so many."""
        span = self._span(worker)
        return span is not None and self._times.is_quick(span[1]) and waiting < self._pieces_out

    def wants_back(self, worker: Any) -> bool:
        """Whether the shard that waits behind the one at work is better done elsewhere."""
        if worker.worker_id in self.leaving:
            return True
        if self._end_s is None or worker.worker_id not in self._spans:
            return False
        span = self._spans[worker.worker_id]
        return not self._is_in_time(span) and not self._times.piece_s(span[0])

    def may_start(self, pool: str, start_s: float) -> bool:
        """Whether a worker of `pool` that is asked for now, and ready in `start_s`, can still be of use."""
        rate = self.rates.images_per_s(pool)
        if self._end_s is None or rate is None:
            return True
        return start_s + self._shard_images / rate <= self._end_s

    def expected_s(self, worker_id: str) -> float | None:
        """How long this worker takes for a shard; None: not known."""
        span = self._spans.get(worker_id)
        return span[1] if span else None

    def run_length(self, worker_id: str) -> int:
        """Shards that take this worker about as long as the slowest worker takes for a lease."""
        own = self._spans.get(worker_id)
        if own is None or self._end_s is not None:
            return 1
        slowest_s = min(max(shard_s for _, shard_s in self._spans.values()), self._times.usual_s)
        share = RUN_SHARE * self._unleased / len(self._spans)
        return max(1, min(MOST_RUN, round(slowest_s / own[1]), int(share)))
