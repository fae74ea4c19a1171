"""Shards hold rows that can share a model's calls, as far as that leaves them full."""

from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.pipeline.planning import shard_cutter
from millijoule.pipeline.planning.shard_cutter import ShardCutter
from millijoule.workers.schemas import PLAN_ROW_SCHEMA


def plan_rows(rows):
    """A batch of plan rows from (guidance, negative prompt, width, number of images); a prompt is the row's number."""
    records = [
        {
            "prompt_id": str(i),
            "prompt": str(i),
            "source": f"f:{i}",
            "guidance_scale": guidance,
            "negative_prompt": negative,
            "width": width,
            "num_images": n,
        }
        for i, (guidance, negative, width, n) in enumerate(rows)
    ]
    return pa.RecordBatch.from_pylist(records, PLAN_ROW_SCHEMA)


def cut(rows, shard_size, chunk=1000):
    """The shards of `rows`: lists of their numbers."""
    shards = []

    def emit(batch, ranges):
        numbers = [int(p) for p in batch["prompt"].to_pylist()]
        shards.extend(numbers[start:end] for start, end in ranges)

    cutter = ShardCutter(shard_size, emit)
    table = plan_rows(rows)
    for start in range(0, len(rows), chunk):
        cutter.add(table.slice(start, chunk))
    cutter.finish()
    return shards


def key(row):
    guidance, negative, width, _ = row
    return width, guidance, negative is None


def runs(shard, rows):
    """How many stretches of rows that can share a call a shard has."""
    return len(list(groupby(key(rows[i]) for i in shard)))


def test_full_shards_are_of_one_guidance_scale_and_the_rest_shares_one():
    rows = [([1.0, 4.0, 7.5][i % 3], None, None, 1) for i in range(3 * 70)]
    shards = cut(rows, 64)
    assert [len(s) for s in shards] == [64, 64, 64, 18]
    assert [runs(s, rows) for s in shards] == [1, 1, 1, 3]


def test_rows_with_and_without_a_negative_prompt_are_apart():
    rows = [(None, [None, "ugly", ""][i % 3], None, 1) for i in range(48)]
    shards = cut(rows, 16)
    assert [len(s) for s in shards] == [16, 16, 16]
    assert all(runs(s, rows) == 1 for s in shards)


def test_guidance_that_differs_in_every_row_does_not_make_a_shard_of_every_row():
    random = np.random.default_rng(0)
    rows = [(float(g), None, None, 1) for g in random.uniform(1, 9, 1000)]
    shards = cut(rows, 64)
    assert sorted(len(s) for s in shards) == [40] + [64] * 15


def test_nor_where_too_many_rows_wait(monkeypatch):
    monkeypatch.setattr(shard_cutter, "MAX_WAITING_ROWS", 300)
    random = np.random.default_rng(0)
    rows = [(float(g), None, None, 1) for g in random.uniform(1, 9, 5000)]
    shards = cut(rows, 64, chunk=50)
    assert sorted(i for s in shards for i in s) == list(range(5000))
    assert len(shards) <= 1.2 * 5000 / 64
    # what was merged is in order of guidance
    assert all(rows[a][0] <= rows[b][0] for s in shards for a, b in pairwise(s))


def test_rows_of_one_guidance_scale_are_cut_as_they_come():
    shards = cut([(None, None, None, 1)] * 100, 30, chunk=7)
    assert shards == [list(range(start, min(start + 30, 100))) for start in range(0, 100, 30)]


ROWS = st.lists(
    st.tuples(
        st.sampled_from([None, 0.0, 1.0, 7.5]) | st.floats(0, 20),
        st.sampled_from([None, "", "bad"]),
        st.sampled_from([None, 64, 128]),
        st.integers(1, 9),
    ),
    min_size=1,
    max_size=200,
)


@pytest.mark.long
@settings(deadline=None)
@given(rows=ROWS, shard_size=st.integers(1, 24), chunk=st.integers(1, 50), waiting=st.integers(1, 100))
def test_every_row_is_in_one_shard_of_its_size_and_few_shards_are_short(rows, shard_size, chunk, waiting):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_cutter, "MAX_WAITING_ROWS", waiting)
        shards = cut(rows, shard_size, chunk)
    assert Counter(i for s in shards for i in s) == Counter(range(len(rows)))
    for shard in shards:
        assert len({rows[i][2] for i in shard}) == 1
        images = sum(rows[i][3] for i in shard)
        assert images <= shard_size or len(shard) == 1
        # a shard has each group in one stretch, and a group's rows in their order
        stretches = [k for k, _ in groupby(key(rows[i]) for i in shard)]
        assert len(stretches) == len(set(stretches))
        for _, group in groupby(shard, lambda i: key(rows[i])):
            members = list(group)
            assert members == sorted(members)
