"""How many workers of several pools fit the nodes that are there together. Pure functions of one snapshot of nodes.

Each pool has a turn and takes what it may have; the next one gets what is left. A worker takes a place as Ray would give it
one: where the labels that its pool prefers are, on a node with a GPU only where it asks for one or no other has room; among
those, where the fewest pools whose turn is still to come could work, and where the least is left. Nodes alike are counted
together, so that a thousand of them take no longer than their kinds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

#: Ray counts resources in such parts of one.
RAY_UNITS = 10_000


@dataclass(frozen=True)
class NodeNow:
    """One node: all that it has, others' work aside."""

    node_id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a cluster at one time. `may_grow`: others may come."""

    there: tuple[NodeNow, ...] = ()
    may_grow: bool = True


class Asking(Protocol):
    """What a worker of a pool asks for, and labels that its node has to have, those of one of `selectors`."""

    @property
    def asked(self) -> Mapping[str, float]: ...
    @property
    def selectors(self) -> Sequence[Mapping[str, str]]: ...


def units(amount: float) -> int:
    """An amount of a resource as Ray counts it."""
    return round(amount * RAY_UNITS)


def how_many(have: Mapping[str, float], asked: Mapping[str, float]) -> int:
    """Workers that ask for `asked` and fit one node that has `have`."""
    wanted = {name: units(amount) for name, amount in asked.items()}
    return min((units(have.get(name, 0)) // n for name, n in wanted.items() if n), default=0)


def choice_of(labels: Mapping[str, str], selectors: Sequence[Mapping[str, str]]) -> int | None:
    """Which of `selectors` a node with `labels` meets first; of no selectors 0; None: none of them."""
    met = (i for i, s in enumerate(selectors) if all(labels.get(n) == v for n, v in s.items()))
    return next(met, None) if selectors else 0


@dataclass(frozen=True)
class _Kind:
    """Of a node: which selector of each pool it meets, and what it has left of each resource that somebody asks for."""

    choices: tuple[int | None, ...]
    has_gpu: bool
    left: tuple[int, ...]


class Room:
    """The nodes as the pools see them. A kind of node goes by its number, so that thousands of workers are looked up quickly.

    Args:
        pools: by name.
    """

    def __init__(self, nodes: Nodes, pools: Mapping[str, Asking]) -> None:
        self.may_grow = nodes.may_grow
        asked = {pool: {n: units(a) for n, a in asking.asked.items()} for pool, asking in pools.items()}
        names = sorted({name for of_pool in asked.values() for name, n in of_pool.items() if n})
        self._asked = {pool: tuple(n.get(name, 0) for name in names) for pool, n in asked.items()}
        self._column = {pool: i for i, pool in enumerate(pools)}
        self._wants_gpu = {pool: bool(n.get("GPU")) for pool, n in asked.items()}
        self._kinds: list[_Kind] = []
        self._numbers: dict[_Kind, int] = {}
        self.fits: list[dict[str, int]] = []  # workers of each pool that fit a node of each kind
        self._after: dict[tuple[int, str, int], int] = {}
        self._kind_of = {
            node.node_id: self._number(
                _Kind(
                    tuple(choice_of(node.labels, asking.selectors) for asking in pools.values()),
                    node.resources.get("GPU", 0) > 0,
                    tuple(units(node.resources.get(name, 0)) for name in names),
                )
            )
            for node in nodes.there
        }
        self._empty = Counter(self._kind_of.values())

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._kind_of

    def places(self, order: Sequence[str], held: Iterable[tuple[str, str]] = ()) -> Places:
        """The places that are free.

        Args:
            order: the pools by their turns.
            held: pool and node of each worker that has a node.
        """
        begun: dict[str, int] = {}  # what nodes with workers are by now
        for pool, node_id in held:
            if (kind := begun.get(node_id, self._kind_of.get(node_id))) is not None:
                begun[node_id] = self.after(kind, pool)
        free = Counter(self._empty)
        free.subtract(self._kind_of[node_id] for node_id in begun)
        free.update(begun.values())
        return Places(self, tuple(order), +free)

    def together(
        self,
        order: Sequence[str],
        bounds: Mapping[str, tuple[int, int]],
        held: Iterable[tuple[str, str]] = (),
    ) -> dict[str, int]:
        """Workers that each pool has once all have taken what they may, those that are there (`held`) included.

        Args:
            bounds: of each pool, workers that it is to have before any other gets more, and may have.
        """
        held = list(held)
        places, shares = self.places(order, held), Counter(pool for pool, _ in held)
        for bound in (0, 1):
            for pool in order:
                shares[pool] += places.take(pool, bounds[pool][bound] - shares[pool])
        return {pool: shares[pool] for pool in order}

    def after(self, kind: int, pool: str, n: int = 1) -> int:
        """What a node of this kind is once it has `n` more workers of `pool`."""
        if (after := self._after.get((kind, pool, n))) is None:
            before = self._kinds[kind]
            left = tuple(have - n * asked for have, asked in zip(before.left, self._asked[pool], strict=True))
            after = self._after[kind, pool, n] = self._number(replace(before, left=left))
        return after

    def rank(self, kind: int, pool: str, later: Sequence[str]) -> tuple[int, bool, int, int, tuple[int, ...]]:
        """A worker of `pool` gets a place on a kind of node for which this is least."""
        node, fits = self._kinds[kind], self.fits[kind]
        choice = node.choices[self._column[pool]]
        assert choice is not None
        avoided = node.has_gpu and not self._wants_gpu[pool]
        return choice, avoided, sum(fits[other] > 0 for other in later), fits[pool], node.left

    def _number(self, kind: _Kind) -> int:
        if (number := self._numbers.get(kind)) is None:
            number = self._numbers[kind] = len(self._kinds)
            self._kinds.append(kind)
            self.fits.append({pool: self._fit(kind, pool) for pool in self._asked})
        return number

    def _fit(self, kind: _Kind, pool: str) -> int:
        if kind.choices[self._column[pool]] is None:
            return 0
        each = (have // n for have, n in zip(kind.left, self._asked[pool], strict=True) if n)
        return max(0, min(each, default=0))


@dataclass
class Places:
    """What is left for pools, which take in the order of `room.places`: nodes counted by kind."""

    room: Room
    order: tuple[str, ...]
    free: Counter[int]

    def copy(self) -> Places:
        return Places(self.room, self.order, Counter(self.free))

    def fits(self, pool: str) -> int:
        """Further workers of `pool` that have a place."""
        return sum(n * self.room.fits[kind][pool] for kind, n in self.free.items())

    def take(self, pool: str, workers: int) -> int:
        """Give places to so many workers, as far as there are some; returns to how many."""
        later = self.order[self.order.index(pool) + 1 :]
        kinds = [kind for kind in self.free if self.room.fits[kind][pool]] if workers > 0 else []
        taken = 0
        for kind in sorted(kinds, key=lambda kind: self.room.rank(kind, pool, later)):
            each = self.room.fits[kind][pool]
            full, rest = divmod(min(workers - taken, each * self.free[kind]), each)
            for nodes, n in ((full, each), (int(rest > 0), rest)):
                self.free[kind] -= nodes
                self.free[self.room.after(kind, pool, n)] += nodes
            taken += full * each + rest
        self.free = +self.free
        return taken
