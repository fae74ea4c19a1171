"""Nodes one by one, and pools whose workers fit them: the oracle of how many stand there together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from hypothesis import strategies as st

from millijoule.pipeline.fleet.room import NodeNow


@dataclass
class Ask:
    asked: dict
    selectors: tuple = ()
    most: int = 99
    least: int = 0


@dataclass
class OneNode:
    """A node on which workers are put one by one: the oracle."""

    resources: dict
    labels: dict
    left: dict = field(default_factory=dict)

    def __post_init__(self):
        self.left = {name: round(1000 * amount) for name, amount in self.resources.items()}

    def takes(self, ask):
        selectors = ask.selectors or ({},)
        labelled = any(s.items() <= self.labels.items() for s in selectors)
        wanted = {name: round(1000 * amount) for name, amount in ask.asked.items() if amount}
        return labelled and bool(wanted) and all(self.left.get(n, 0) >= a for n, a in wanted.items())

    def put(self, ask, sign=1):
        for name, amount in ask.asked.items():
            if amount:
                self.left[name] -= sign * round(1000 * amount)


def can_stand(nodes, asks, numbers, *, as_they_are=False):
    """Whether so many workers of each pool fit at the same time, in any of all ways to put them; `as_they_are`: beside those there."""
    nodes = nodes if as_they_are else [OneNode(n.resources, n.labels) for n in nodes]
    workers = [name for name, n in numbers.items() for _ in range(n)]

    def put_from(i, first):
        if i == len(workers):
            return True
        ask = asks[workers[i]]
        same = i > 0 and workers[i] == workers[i - 1]
        for at in range(first if same else 0, len(nodes)):
            if nodes[at].takes(ask):
                nodes[at].put(ask)
                if put_from(i + 1, at):
                    return True
                nodes[at].put(ask, -1)
        return False

    return put_from(0, 0)


def alone(nodes, ask):
    """Workers of one pool, put on one node after the other."""
    count = 0
    for node in nodes:
        one = OneNode(node.resources, node.labels)
        while one.takes(ask):
            one.put(ask)
            count += 1
    return count


@cache
def resources():
    return st.fixed_dictionaries(
        {"CPU": st.sampled_from([0.0, 1.0, 2.0, 3.0])}, optional={"GPU": st.sampled_from([1.0, 2.0])}
    )


@st.composite
def clusters(draw):
    labels = st.dictionaries(st.sampled_from("xy"), st.sampled_from("ab"), max_size=2)
    nodes = [
        NodeNow(f"n{i}", draw(resources()), {**draw(labels), "ray.io/node-id": f"n{i}"})
        for i in range(draw(st.integers(0, 4)))
    ]
    asks = {}
    for name in "pqr"[: draw(st.integers(1, 3))]:
        selectors = tuple(draw(st.lists(st.sampled_from([{"x": "a"}, {"x": "b"}, {"y": "a"}]), max_size=2)))
        asked = {
            "CPU": draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])),
            "GPU": draw(st.sampled_from([0.0, 0.5, 1.0])),
        }
        asks[name] = Ask(asked, selectors, draw(st.integers(0, 3)), 0)
    return tuple(nodes), asks, draw(st.permutations(list(asks)))
