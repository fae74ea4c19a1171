"""Objects are read by several threads: in order, and not far ahead."""

from millijoule.pipeline.output.read_objects import ITEMS_PER_CALL, READ_THREADS, in_threads


def test_items_come_in_order_and_few_are_taken_ahead():
    taken, held = [], []

    def items():
        for number in range(1, 2001):
            taken.append(number)
            yield number

    for number, result in enumerate(in_threads(lambda n: n, items()), 1):
        assert result == number
        held.append(len(taken) - number)
    assert len(held) == 2000
    assert max(held) <= 2 * READ_THREADS * ITEMS_PER_CALL + ITEMS_PER_CALL
