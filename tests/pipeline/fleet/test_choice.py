"""Which devices are enough for the least cost, against all choices there are; and when a fleet is done, against playing it through."""

from __future__ import annotations

import heapq
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.fleet.choice import Offer, choose_devices, seconds_until_done

OFFERS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 20), st.integers(1, 50)),
    min_size=1,
    max_size=3,
)


def offers_of(drawn):
    return [
        Offer(f"p{i}", least, least + more, rate / 4, cost)
        for i, (least, more, rate, cost) in enumerate(drawn)
    ]


@given(OFFERS, st.integers(0, 80))
def test_the_chosen_devices_are_enough_wherever_any_are_and_cost_at_most_one_device_more_than_the_best(
    drawn, needed
):
    offers = offers_of(drawn)
    needed = needed / 4
    chosen = choose_devices(offers, needed)
    assert all(offer.least <= chosen[offer.name] <= offer.most for offer in offers)

    def rate(numbers):
        return sum(n * offer.rate for n, offer in zip(numbers, offers, strict=True))

    def cost(numbers):
        return sum(n * offer.rate * offer.cost for n, offer in zip(numbers, offers, strict=True))

    mine = [chosen[offer.name] for offer in offers]
    ranges = [range(offer.least, offer.most + 1) for offer in offers]
    enough = [numbers for numbers in itertools.product(*ranges) if rate(numbers) >= needed]
    if not enough:
        assert mine == [offer.most for offer in offers]
        return
    assert rate(mine) >= needed * (1 - 1e-6)
    one_more = max(offer.rate * offer.cost for offer in offers)
    assert cost(mine) <= min(map(cost, enough)) + one_more + 1e-9


DEVICES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30)), min_size=1, max_size=6)


@given(DEVICES, st.integers(0, 30))
def test_the_end_is_when_devices_that_always_take_the_next_shard_are_done(devices, shards):
    free = [(busy + each, each) for busy, each in devices]  # when each would end one more
    heapq.heapify(free)
    last = 0.0
    for _ in range(shards):
        last, each = heapq.heappop(free)
        heapq.heappush(free, (last + each, each))
    expected = last if shards else max(busy for busy, _ in devices)
    found = seconds_until_done([b for b, _ in devices], [e for _, e in devices], shards)
    assert found == pytest.approx(expected, abs=1e-6)


def test_without_devices_nothing_ends():
    assert seconds_until_done([], [], 3) == float("inf")
