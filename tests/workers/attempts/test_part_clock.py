"""Where parts are cut: the most that a death can cost, whatever batches and storage take, on a clock of its own."""

import heapq
import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millijoule.workers.attempts.parts import Expected, PartClock

PART_MS = 10_000
TIMES_MS = st.integers(1, 15_000)


class Worker:
    """Draws shards one after the other without a pause. Times are whole milliseconds.

    Attributes:
        pieces: of each piece `(first draw, cut, when it stood)`.
    """

    def __init__(self, sealing_ms):
        self.now = 0
        self.pieces = []
        self._sealing, self._took = Expected(), iter(sealing_ms)
        self._to_come = []  # (when, number, clock) of pieces that will stand

    def draw(self, batches_ms):
        clock = PartClock(PART_MS, self._sealing, lambda: self.now)
        clock.begin()
        began, sealed = self.now, self.now  # a shard's pieces are sealed in turn
        for n, batch_ms in enumerate(batches_ms, 1):
            self._pass(batch_ms)
            left = len(batches_ms) - n
            if clock.drew(left) or not left:
                clock.cut()
                sealed = max(sealed, self.now) + next(self._took)
                heapq.heappush(self._to_come, (sealed, len(self.pieces), clock))
                self.pieces.append((began, self.now, sealed))
                began = self.now

    def _pass(self, ms):
        until = self.now + ms
        while self._to_come and self._to_come[0][0] <= until:
            self.now, _, clock = heapq.heappop(self._to_come)
            clock.stands()
        self.now = until

    @property
    def lost_ms(self):
        """The most that a death costs, at the worst moment: just before the piece stands that was begun first."""
        return max(stood - began for began, _, stood in self.pieces)


def forever(ms):
    while True:
        yield ms


def drawn(shards, sealing_ms):
    worker = Worker(sealing_ms)
    for batches_ms in shards:
        worker.draw(batches_ms)
    return worker


@given(batch_ms=TIMES_MS, sealing_ms=TIMES_MS, shards=st.lists(st.integers(1, 40), min_size=1, max_size=4))
@example(batch_ms=8000, sealing_ms=4000, shards=[6])
@example(batch_ms=100, sealing_ms=100, shards=[105])  # a rest of half a second
@example(batch_ms=100, sealing_ms=6000, shards=[400])  # a store that is slower than half a part
def test_a_death_costs_a_part_or_a_batch_and_two_sealings_where_those_are_longer(
    batch_ms, sealing_ms, shards
):
    worker = Worker(forever(sealing_ms))
    worker._sealing.took(sealing_ms)
    for n in shards:
        worker.draw([batch_ms] * n)
    assert worker.lost_ms <= max(PART_MS, batch_ms + 2 * sealing_ms)


@given(data=st.data())
def test_whatever_batches_and_storage_take_it_costs_their_excess_more_at_most(data):
    shards = data.draw(st.lists(st.lists(TIMES_MS, min_size=1, max_size=25), min_size=1, max_size=4))
    sealing = data.draw(st.lists(TIMES_MS, min_size=sum(map(len, shards)), max_size=sum(map(len, shards))))
    worker = drawn(shards, sealing)
    slowest_batch, slowest_sealing = max(map(max, shards)), max(sealing)
    assert worker.lost_ms <= max(PART_MS, slowest_sealing) + slowest_batch + slowest_sealing


@given(batch_ms=TIMES_MS, sealing_ms=TIMES_MS, n=st.integers(1, 200))
def test_there_are_no_more_parts_than_that_takes(batch_ms, sealing_ms, n):
    """No schedule of pieces that all stand within a part's time has fewer; where none can, a piece is a batch, or waits for the store."""
    worker = Worker(forever(sealing_ms))
    worker._sealing.took(sealing_ms)
    worker.draw([batch_ms] * n)
    batches = max(1, (PART_MS - sealing_ms) // batch_ms)
    if sealing_ms <= 3 / 4 * PART_MS:
        assert len(worker.pieces) <= -(-n // batches)
    lengths = [cut - began for began, cut, _ in worker.pieces[:-1]]
    assert all(length >= max(batch_ms, PART_MS / 4) for length in lengths)


@pytest.mark.parametrize("slow", ["batch", "sealing"])
def test_one_that_was_slow_once_is_forgotten(slow):
    """After a minute's outage or a batch that took a minute, parts are as long as before, soon."""
    batches, sealing = [100] * 2000, [100] * 2000
    {"batch": batches, "sealing": sealing}[slow][3] = 60_000
    lengths = [cut - began for began, cut, _ in drawn([batches], iter(sealing)).pieces]
    assert min(lengths[:-1]) >= PART_MS / 4
    assert lengths[-3] >= PART_MS - 200
    assert len(lengths) <= 2000 * 100 / PART_MS + 8


def test_a_store_that_is_slow_now_and_then_is_not_taken_for_a_quick_one():
    """Every other part takes 4 s instead of a tenth: what is expected falls by half in between, so half of it may come on top."""
    worker = drawn([[100] * 3000], itertools.cycle([4000, 100]))
    later = [stood - began for began, _, stood in worker.pieces[1:]]
    assert max(later) <= PART_MS + 4000 / 2


def test_a_shard_that_is_made_and_stored_within_a_part_s_time_has_none_and_without_that_time_none_has():
    assert len(drawn([[2400] * 4] * 3, forever(100)).pieces) == 3
    assert len(drawn([[2400] * 5], forever(100)).pieces) == 2
    clock = PartClock(0.0, Expected(), lambda: 0.0)
    assert not clock.drew(1)


def test_parts_of_a_store_that_is_slower_than_drawing_do_not_queue():
    pieces = drawn([[100] * 3000], forever(12_000)).pieces
    waited = [later[1] - earlier[2] for earlier, later in itertools.pairwise(pieces[:-1])]
    assert min(waited) >= 0
