"""The search for rows that kill workers."""

from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.running.bisection import Bisection


@given(st.data(), st.integers(1, 300))
def test_it_finds_exactly_the_poison_rows(data, n_rows):
    poison = data.draw(st.sets(st.integers(0, n_rows - 1), max_size=5))
    search = Bisection(n_rows)
    while not search.done:
        start, stop = search.next_range()
        search.report((start, stop), survived=not poison.intersection(range(start, stop)))
    assert sorted(search.poison) == sorted(poison)


@given(st.integers(1, 4096), st.data())
def test_one_poison_row_costs_about_two_probes_per_halving(n_rows, data):
    poison = data.draw(st.integers(0, n_rows - 1))
    search, probes = Bisection(n_rows), 0
    while not search.done:
        start, stop = search.next_range()
        search.report((start, stop), survived=not start <= poison < stop)
        probes += 1
    assert probes <= 2 * (n_rows.bit_length() + 1)
