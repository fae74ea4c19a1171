"""A shard's energy is divided to the millijoule, as it is when every image is given its share by hand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.ledgers import commit
from support.plain_split import shard_energy

from millijoule.pipeline.energy.counter_split import MISSING
from millijoule.pipeline.energy.packed import NONE
from millijoule.pipeline.energy.shard_shares import commit_shares, equal_shares, shard_shares


@st.composite
def shards(draw):
    """Energy, ok, filtered and drawn of a shard."""
    ok, filtered = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    energy = draw(st.none() | st.integers(0, 10**12))
    if draw(st.booleans()):
        return energy, ok, 0, None
    return energy, ok, filtered, ok + filtered + draw(st.integers(0, 300))


def column(values, missing):
    return np.array([missing if v is None else v for v in values], np.int64)


@given(st.lists(shards(), min_size=1, max_size=20))
def test_parts_are_those_made_image_by_image(made):
    energy, ok, filtered, drawn = zip(*made, strict=True)
    shares = shard_shares(column(energy, MISSING), np.array(ok), np.array(filtered), column(drawn, NONE))
    for n, shard in enumerate(made):
        images, hidden, bad = shard_energy(*shard)
        found = (shares.accepted_mj[n], shares.filtered_mj[n], shares.quarantined_mj[n])
        if shard[0] is None:
            assert found == (MISSING, MISSING, MISSING)
            continue
        assert sum(found) == shard[0]
        assert found[1:] == (hidden, bad)
        if images:
            given_out = equal_shares(np.array([found[0]]), np.zeros(len(images), np.int64)).tolist()
            assert given_out == images


def test_a_commit_that_counts_more_images_than_it_drew_gives_nothing_twice():
    """Of a damaged commit; `check` names it."""
    damaged = commit(1, "a", 3, images_filtered=2, images_drawn=1)
    assert commit_shares(damaged, 10) == (6, 4, 0)
