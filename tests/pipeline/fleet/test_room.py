"""How many workers of several pools fit the same nodes: against workers put on single nodes, and against all ways to put them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.single_nodes import Ask, OneNode, alone, can_stand, clusters

from millijoule.pipeline.fleet.room import NodeNow, Nodes, Room, how_many


@given(clusters(), st.data())
def test_never_more_than_fit_together_and_nobody_is_left_out_for_whom_there_is_room(cluster, data):
    nodes, asks, order = cluster
    room = Room(Nodes(nodes), asks)
    bounds = {name: (min(ask.most, data.draw(st.integers(0, 1))), ask.most) for name, ask in asks.items()}
    shares = room.together(order, bounds)
    assert can_stand(nodes, asks, shares)
    first = order[0]
    if not any(least for name, (least, _) in bounds.items() if name != first):
        assert shares[first] == min(asks[first].most, alone(nodes, asks[first]))
    # the last one takes whatever is left for it
    places = room.places(order)
    for name in order:
        places.take(name, shares[name])
    for name, ask in asks.items():
        assert shares[name] == ask.most or places.fits(name) == 0


@given(clusters())
def test_a_pool_alone_has_what_its_nodes_hold_one_by_one(cluster):
    nodes, asks, order = cluster
    for name, ask in asks.items():
        assert Room(Nodes(nodes), {name: ask}).places([name]).fits(name) == alone(nodes, ask)
        assert Room(Nodes(nodes), asks).places(order).fits(name) == alone(nodes, ask)


@given(clusters(), st.data())
def test_workers_that_are_there_hold_their_room_where_they_are(cluster, data):
    nodes, asks, order = cluster
    singles = {n.node_id: OneNode(n.resources, n.labels) for n in nodes}
    held = []
    for _ in range(data.draw(st.integers(0, 4))):
        fitting = [(name, n) for name, ask in asks.items() for n, node in singles.items() if node.takes(ask)]
        if fitting:
            name, node_id = data.draw(st.sampled_from(fitting))
            singles[node_id].put(asks[name])
            held.append((name, node_id))
    places = Room(Nodes(nodes), asks).places(order, [*held, (order[0], "a node that came later")])
    for name, ask in asks.items():
        count = 0
        for single in singles.values():
            copy = OneNode(single.resources, single.labels)
            copy.left = dict(single.left)
            while copy.takes(ask):
                copy.put(ask)
                count += 1
        assert places.fits(name) == count


@given(clusters(), st.data())
def test_pools_whose_labels_share_no_node_have_each_what_they_have_alone(cluster, data):
    nodes, asks, order = cluster
    selectors = {name: ({"only": name},) for name in asks}
    nodes = tuple(NodeNow(n.node_id, n.resources, {"only": data.draw(st.sampled_from(order))}) for n in nodes)
    asks = {name: Ask(ask.asked, selectors[name], ask.most) for name, ask in asks.items()}
    shares = Room(Nodes(nodes), asks).together(order, {name: (0, ask.most) for name, ask in asks.items()})
    assert shares == {name: min(ask.most, alone(nodes, ask)) for name, ask in asks.items()}


def node(name, cpus, gpus=0.0, **labels):
    return NodeNow(name, {"CPU": cpus, **({"GPU": gpus} if gpus else {})}, labels)


CPU = {"CPU": 1.0}


@pytest.mark.parametrize("order", [["any", "gpu"], ["gpu", "any"]])
def test_work_without_gpus_leaves_nodes_with_gpus_to_others(order):
    """Of nine processors two stand beside GPUs; seven workers have them all but those."""
    nodes = Nodes((node("g", 2, 2), node("c", 7)))
    room = Room(nodes, {"any": Ask(CPU), "gpu": Ask({"CPU": 1.0, "GPU": 1.0})})
    assert room.together(order, {"any": (0, 7), "gpu": (0, 9)}) == {"any": 7, "gpu": 2}


def test_a_worker_stands_where_the_fewest_others_can():
    nodes = Nodes((node("wanted", 1, x="a"), node("plain", 1)))
    room = Room(nodes, {"any": Ask(CPU), "x": Ask(CPU, ({"x": "a"},))})
    assert room.together(["any", "x"], {"any": (0, 1), "x": (0, 1)}) == {"any": 1, "x": 1}


def test_two_pools_of_the_same_nodes_have_them_once_the_first_first():
    nodes = Nodes((node("n", 2),))
    room = Room(nodes, {"a": Ask(CPU), "b": Ask(CPU)})
    assert room.together(["b", "a"], {"a": (0, 2), "b": (0, 2)}) == {"b": 2, "a": 0}
    assert room.together(["b", "a"], {"a": (1, 2), "b": (0, 2)}) == {"b": 1, "a": 1}
    assert room.together(["b", "a"], {"a": (0, 2), "b": (0, 2)}, [("a", "n")]) == {"b": 1, "a": 1}


def test_amounts_are_counted_as_ray_counts_them():
    """0.6 / 0.2 is a little less than 3 in floats."""
    assert how_many({"CPU": 0.6}, {"CPU": 0.2}) == 3
    room = Room(Nodes((node("n", 0.6),)), {"a": Ask({"CPU": 0.2})})
    assert room.together(["a"], {"a": (0, 9)}) == {"a": 3}
    assert room.places(["a"], [("a", "n")]).fits("a") == 2


def test_a_thousand_nodes_are_no_more_work_than_their_kinds():
    """Counted in kinds that are looked at: those of the nodes, and one more for each pool that began one of them."""
    nodes = tuple(node(f"n{i}", 8, 4 * (i % 2), zone=str(i % 5)) for i in range(1000))
    asks = {f"p{i}": Ask({"CPU": 1.0, "GPU": float(i % 2)}, ({"zone": str(i % 5)},)) for i in range(10)}
    room = Room(Nodes(nodes), asks)
    held = [(f"p{i % 10}", f"n{i}") for i in range(1000)]
    places = room.places(list(asks), held)
    for name in asks:
        places.take(name, 77)
        assert len(places.free) <= 60
    assert sum(places.free.values()) == 1000
