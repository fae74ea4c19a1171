"""The storage benchmark's rows are as small as promised, and its two queries give the right sums."""

import pytest

from millijoule.jobs.bench.energy_tables import (
    PER_NODE,
    PER_SHARD,
    SHARD_SECONDS,
    BenchOptions,
    counter_blocks,
    timed,
    write_tables,
)
from millijoule.workers.storage.open import open_store

OPTIONS = BenchOptions(nodes=2, gpus_per_node=4, seconds=600, repeats=1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    store = open_store(str(tmp_path_factory.mktemp("bench")))
    return store, write_tables(store, OPTIONS)


def test_a_counter_row_takes_at_most_nine_bytes(written):
    _, sizes = written
    assert sizes["counter_rows"] == 8 * 600 * 10
    assert sizes["bytes_per_row"] <= 9


def test_the_queries_give_the_growth_of_the_counters(written):
    store, _ = written
    first, last = {}, {}
    for _, block in counter_blocks(OPTIONS):
        for row in block.select(["worker_id", "t_mono_ns", "energy_mj"]).to_pylist():
            first.setdefault(row["worker_id"], row["energy_mj"])
            last[row["worker_id"]] = row["energy_mj"]
    grown = [last[w] - first[w] for w in sorted(first)]
    rows = timed(store, PER_NODE, OPTIONS)["rows"]
    assert rows == [
        {"host": "node-0", "energy_mj": sum(grown[:4])},
        {"host": "node-1", "energy_mj": sum(grown[4:])},
    ]
    (joined,) = timed(store, PER_SHARD, OPTIONS)["rows"]
    assert joined["shards"] == 8 * 600 // SHARD_SECONDS
    # shards lie end to end from read 0 or 1 to the last one
    assert sum(grown) * 0.995 < joined["energy_mj"] <= sum(grown)
