"""Numbers and their nouns."""

import pytest

from millijoule.workers.counted import counted


@pytest.mark.parametrize(
    ("n", "words", "expected"),
    [
        (0, ("shard",), "0 shards"),
        (1, ("shard",), "1 shard"),
        (12_000, ("shard",), "12,000 shards"),
        (1, ("stretch", "stretches"), "1 stretch"),
        (2, ("stretch", "stretches"), "2 stretches"),
    ],
)
def test_one_thing_is_in_the_singular(n, words, expected):
    assert counted(n, *words) == expected
