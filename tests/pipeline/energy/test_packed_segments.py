"""Packed segments are the segments that were packed, to the last number, in any order of adding."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.pipeline.energy.packed_segments import PackedSegments
from millijoule.workers.schemas import SEGMENT_CLASSES, CounterRead, Segment

NUMBERS = st.integers(0, 2**63 - 1)

READS = st.builds(
    CounterRead,
    st.sampled_from(["boot-a", "boot-b"]),
    st.integers(0, 3) | NUMBERS,
    NUMBERS,
    NUMBERS,
    st.dictionaries(st.sampled_from(["gpu:GPU-1", "cpu:package-0", "dram:package-0"]), NUMBERS),
    st.none() | NUMBERS,
    st.integers(0, 5),
    st.none() | st.integers(0, 2**31 - 1),
)


@st.composite
def chains(draw):
    """A worker's segments; most close reads open the next segment."""
    reads = draw(st.lists(READS, min_size=2, max_size=5))
    made = []
    for before, after in pairwise(reads):
        opened = draw(READS) if draw(st.integers(0, 4)) == 0 else before
        ids = draw(st.none() | NUMBERS), draw(st.none() | st.text(max_size=12))
        made.append(
            Segment(
                draw(st.sampled_from(["w1", "w2", "é"])),
                draw(st.sampled_from(SEGMENT_CLASSES)),
                opened,
                after,
                *ids,
            )
        )
    return made


SEGMENTS = st.lists(chains(), max_size=4).map(lambda lists: [s for made in lists for s in made])


@given(SEGMENTS)
@settings(max_examples=40, deadline=None)
def test_what_comes_out_is_what_went_in(segments):
    packed = PackedSegments(segments[:1])
    packed.extend(segments[1:])
    assert len(packed) == len(segments)
    assert list(packed) == segments
    assert packed[1:-1] == segments[1:-1]


@pytest.mark.long
@given(SEGMENTS)
@settings(max_examples=40, deadline=None)
def test_stretches_are_in_order_of_time_and_hold_every_segment_once(segments):
    def stretch(s):
        return s.open.boot_id, s.open.t_mono_ns, s.worker_id, s.close.t_mono_ns

    order, begins = PackedSegments(segments).stretches()
    groups = [part.tolist() for part in np.split(order, begins[1:])] if segments else []
    assert sorted(n for numbers in groups for n in numbers) == list(range(len(segments)))
    keys = [{stretch(segments[n]) for n in numbers} for numbers in groups]
    assert [len(k) for k in keys] == [1] * len(keys)
    assert [k.pop() for k in keys] == sorted({stretch(s) for s in segments})
    assert all(numbers == sorted(numbers) for numbers in groups)


@given(SEGMENTS)
@settings(max_examples=40, deadline=None)
def test_columns_are_of_the_segments(segments):
    columns = PackedSegments(segments).columns()
    assert [columns.names[w] for w in columns.worker] == [s.worker_id for s in segments]
    assert columns.attempt.to_pylist() == [s.attempt_id for s in segments]


def test_a_read_that_closes_and_opens_is_kept_once():
    reads = [CounterRead("b", t, t, 0, {"gpu:GPU-1": t}) for t in range(1001)]
    pairs = pairwise(reads)
    packed = PackedSegments(Segment("w", "idle", before, after) for before, after in pairs)
    assert len(packed.columns().energy_mj) == 1001


def test_what_is_no_number_of_64_bits_is_refused():
    with pytest.raises(OverflowError):
        PackedSegments([Segment("w", "idle", CounterRead("b", 2**63, 0, 0), CounterRead("b", 1, 0, 0))])
    with pytest.raises(TypeError):
        PackedSegments(
            [Segment("w", "idle", CounterRead("b", 0, 0, 0), CounterRead("b", 1, 0, 0, {"gpu:x": 1.5}))]
        )
