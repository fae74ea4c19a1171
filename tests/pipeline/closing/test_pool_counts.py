"""What pools made and used, of shards in which several had a part, and of one whose joules nobody read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.ledgers import chain, commit, read, segment

from millijoule.pipeline.closing.pool_counts import count_pools
from millijoule.pipeline.energy.commit_table import CommitTable
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.report.cells import POOL_HEADS, pool_cells
from millijoule.workers.schemas import Commit, WorkerEnvironment


def environment(worker, pool, price=None):
    where = (worker, 1, "n1", "h1", "GPU-1", ("GPU-1",))
    stated = WorkerEnvironment(*where, None, None, "3.11", None, "nvml-counter")
    return replace(stated, pool=pool, price_per_hour=price)


def counted(*, mj_of_slow=True):
    """Shard 1 is the quick worker's; of shard 2 the slow one sealed 3 of 10 images in 30 s, and the quick one drew the rest.

    What a model says of the same is known of the slow one.
    """
    quick = chain([read(0, 0), read(10, 1000), read(17, 1700)], ["shard", "shard"], "w1")
    quick = [replace(quick[0], attempt_id="a1"), replace(quick[1], shard_id=2, attempt_id="a2")]
    slow = segment(
        read(0, 0 if mj_of_slow else None, boot="other", estimate=10),
        read(30, 90 if mj_of_slow else None, boot="other", estimate=70),
        worker="w2",
        shard=2,
        attempt="e9.p0",
    )
    commits = CommitTable.of(
        [
            commit(1, "a1", 10, quick[:1]),
            commit(2, "a2", 10, [slow, quick[1]], parts=("e9.p0",), images_by_others={"w2": 3}),
        ]
    )
    workers = {"w1": environment("w1", "quick", 3.6), "w2": environment("w2", "slow")}
    devices = {"w1": ("GPU-1",), "w2": ("GPU-1",)}
    ledger = build_ledger([*quick, slow], commits.attempts(), devices)
    return count_pools(commits, workers, ledger.entries)


def test_each_pool_has_the_images_that_it_drew_and_what_it_used_for_them():
    pools = counted()
    assert pools["quick"] == {
        "workers": 1,
        "shards": 2,
        "shards_made": 1.7,
        "images_ok": 17,
        "shard_s": 17.0,
        "shard_mj": 1700,
        "shard_estimate_mj": None,
        "device_cost": pytest.approx(17 * 3.6 / 3600),
    }
    slow = {"workers": 1, "shards": 0, "shards_made": 0.3, "images_ok": 3}
    assert pools["slow"] == {
        **slow,
        "shard_s": 30.0,
        "shard_mj": 90,
        "shard_estimate_mj": 60,
        "device_cost": None,
    }


def test_joules_that_nobody_read_are_missing_and_not_zero():
    pools = counted(mj_of_slow=False)
    assert pools["slow"]["shard_mj"] is None
    assert pools["slow"]["shard_estimate_mj"] == 60
    assert pools["quick"]["shard_mj"] == 1700


def test_a_report_says_what_a_shard_takes_on_each_pool():
    rows = {
        row[0]: dict(zip(POOL_HEADS, row, strict=True))
        for row in pool_cells(SimpleNamespace(pools=counted()))
    }
    assert rows["quick"]["device time per shard"] == "10 s"
    assert rows["slow"]["device time per shard"] == "100 s"
    assert rows["slow"]["energy per shard"] == "300 mJ"
    assert rows["slow"]["device cost per shard"] == "not given"
    assert (rows["slow"]["estimate direct"], rows["slow"]["estimate per shard"]) == ("20 mJ", "200 mJ")
    assert (rows["quick"]["estimate direct"], rows["quick"]["estimate per shard"]) == ("-", "-")
    before = {"workers": 1, "shards": 2, "images_ok": 4, "shard_mj": 8}  # of an earlier version
    (row,) = pool_cells(SimpleNamespace(pools={"a": before}))
    assert row == ("a", "1", "2", "4", "2 mJ", "-", "-", "not measured", "-", "not given")


def test_a_commit_from_before_pieces_were_told_apart_is_read():
    body = commit(1, "a1", 4).to_json().replace(b',"images_by_others":{}', b"")
    assert b"images_by_others" not in body
    assert Commit.from_json(body).images_by_others == {}
