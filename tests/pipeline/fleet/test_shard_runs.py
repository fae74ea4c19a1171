"""Every kept shard is handed out once, whoever takes it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millijoule.pipeline.fleet.shard_runs import ShardRuns


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=8),
    st.lists(st.sampled_from("abcd")),
)
def test_every_shard_is_taken_once_and_the_own_ones_in_order(kept, takers):
    runs, expected, number = ShardRuns(), [], 0
    own = {name: [] for name in "abcd"}
    for name, n in kept:
        shards = list(range(number, number + n))
        runs.keep(name, shards)
        own[name] += shards
        expected += shards
        number += n
    taken = []
    for name in [*takers, *("d" for _ in expected)]:
        shard = runs.first(name)
        if shard is not None:
            assert shard == own[name][0]
        else:
            shard = runs.last_of_longest()
        if shard is None:
            break
        runs.take(shard, name)
        (holder,) = [n for n, shards in own.items() if shard in shards]
        own[holder].remove(shard)
        taken.append(shard)
        assert runs.kept == len(expected) - len(taken)
    assert sorted(taken) == expected
