"""Columns divide a counter as the plain form does, claim by claim and millijoule by millijoule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import plain_split

from millijoule.pipeline.energy import counter_split
from millijoule.pipeline.energy.counter_split import MAX_GAP_NS, Reading

SECOND = 1_000_000_000


@st.composite
def claims(draw):
    """Workers on a counter that runs, is reset, jumps and is misread, over times that fall together now and then."""
    at = sorted(
        draw(st.lists(st.integers(0, 40) | st.integers(0, 3 * MAX_GAP_NS // SECOND), min_size=1, max_size=14))
    )
    readings, mj = [], 1000
    for t in at:
        mj = draw(st.sampled_from([mj + draw(st.integers(0, 50)), mj, 3, mj + 10**12]))
        readings.append(Reading(t * SECOND, mj))
    found = []
    for _ in range(draw(st.integers(1, 12))):
        a, b = (draw(st.integers(0, len(at) - 1)) for _ in range(2))
        ends = readings[min(a, b)], readings[max(a, b)]
        seen = [r if draw(st.integers(0, 5)) else None for r in ends]
        found.append(plain_split.Claim(draw(st.sampled_from("abc")), ends[0].t_ns, ends[1].t_ns, *seen))
    return found


def as_columns(found):
    def column(values, kind=np.int64):
        return np.array(list(values), kind)

    return counter_split.Claims(
        column(ord(c.worker_id) for c in found),
        column(c.t_open_ns for c in found),
        column(c.t_close_ns for c in found),
        column(-7 if c.open is None else c.open.energy_mj for c in found),
        column(-7 if c.close is None else c.close.energy_mj for c in found),
        column((c.open is not None for c in found), bool),
        column((c.close is not None for c in found), bool),
    )


@pytest.mark.long
@pytest.mark.parametrize("pairs", [1, 3, counter_split.PAIRS])
def test_columns_divide_as_the_plain_form_does(pairs, monkeypatch):
    monkeypatch.setattr(counter_split, "PAIRS", pairs)

    @settings(max_examples=120, deadline=None)
    @given(claims())
    def compare(found):
        plain, columns = plain_split.split_counter(found), counter_split.split_counter(as_columns(found))
        assert [None if mj == counter_split.MISSING else mj for mj in columns.shares.tolist()] == plain.shares
        assert columns.unclaimed == plain.unclaimed
        assert columns.runs == plain.runs
        covered = columns.covers(
            np.array([c.t_open_ns for c in found]), np.array([c.t_close_ns for c in found])
        )
        assert covered.tolist() == [plain.covers(c.t_open_ns, c.t_close_ns) for c in found]

    compare()


def test_nobody_who_reads_nothing_gets_anything():
    empty = counter_split.split_counter(as_columns([]))
    assert (len(empty.shares), empty.unclaimed, empty.runs) == (0, [], [])
    assert empty.covers(np.array([1]), np.array([2])).tolist() == [False]
