"""Leases: what is handed out, taken back, raced and searched."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from millijoule.pipeline.coordinator import (
    MAX_FAILURES,
    SPECULATION_MIN_S,
    Coordinator,
)
from millijoule.workers.shard_rows import Shard


class Shards(list):
    """Stands for a shard index: the coordinator only asks for length and items."""


def shards(n: int, rows: int = 8) -> Shards:
    return Shards(Shard(i, "part", i, rows, rows, None, None, None, f"p{i}", "") for i in range(n))


def coordinator(n: int, *, done: tuple[int, ...] = (), lease_s: float = 10.0, rows: int = 8) -> Coordinator:
    committed = np.zeros(n, dtype=bool)
    committed[list(done)] = True
    return Coordinator(shards(n, rows), committed, lease_s, driver_epoch=1)


def test_committed_shards_are_not_leased_again():
    c = coordinator(4, done=(0, 2))
    leased = [c.next_lease("w", 0.0) for _ in range(3)]
    assert [x.shard.shard_id for x in leased[:2]] == [1, 3]
    assert leased[2] is None


def test_a_silent_lease_expires_and_progress_renews_it():
    c = coordinator(1, lease_s=10)
    lease = c.next_lease("a", 0.0)
    assert c.renew(lease.attempt_id, images_done=1, steps=4, now=8.0)
    assert c.expired(12.0) == []
    assert not c.renew(lease.attempt_id, images_done=1, steps=4, now=17.0)  # an answer without progress
    assert [e.lease for e in c.expired(18.5)] == [lease]
    c.lease_again(lease.attempt_id)
    assert c.next_lease("b", 19.0).shard.shard_id == 0


def test_steps_of_a_long_batch_or_upload_renew_a_lease_too():
    c = coordinator(1, lease_s=10)
    lease = c.next_lease("a", 0.0)
    for n in range(1, 9):
        assert c.renew(lease.attempt_id, images_done=0, steps=n, now=8.0 * n)
        assert c.expired(8.0 * n + 9) == []
    assert c.active[lease.attempt_id].images_done == 0
    assert [e.lease for e in c.expired(64 + 10.5)] == [lease]
    assert not c.renew("another", images_done=5, steps=5, now=80.0)


def test_a_straggler_gets_one_rival_at_the_tail_and_only_there():
    c = coordinator(2)
    first, second = c.next_lease("a", 0.0), c.next_lease("b", 0.0)
    assert c.next_lease("c", 100.0) is None  # nothing finished yet: no notion of slow
    c.complete(first.attempt_id, 0, 1.0)
    assert c.next_lease("a", 1.0 + SPECULATION_MIN_S / 2) is None
    rival = c.next_lease("a", 2.0 + SPECULATION_MIN_S)
    assert rival.shard.shard_id == 1
    assert rival.attempt_id != second.attempt_id
    assert c.next_lease("c", 99.0) is None  # never a third
    assert c.complete(rival.attempt_id, 1, 99.0) is True
    assert c.complete(second.attempt_id, 1, 99.5) is False
    assert c.done


def test_a_worker_never_races_itself():
    c = coordinator(2)
    first, _ = c.next_lease("a", 0.0), c.next_lease("b", 0.0)
    c.complete(first.attempt_id, 0, 1.0)
    assert c.next_lease("b", 100.0) is None


def test_a_row_that_kills_workers_ends_in_skip_rows():
    c = coordinator(1, rows=8)
    leases = 0
    while True:
        lease = c.next_lease("w", 0.0)
        leases += 1
        touched = range(*lease.probe_rows) if lease.probe_rows else range(8)
        if 5 in touched and 5 not in lease.skip_rows:
            c.crashed(lease.attempt_id, "killed")
        elif lease.probe_rows:
            c.probed(lease.attempt_id)
        else:
            assert lease.skip_rows == (5,)
            c.complete(lease.attempt_id, 0, 1.0)
            break
    assert c.done
    assert leases <= 12


def test_a_shard_that_kills_workers_without_a_guilty_row_is_given_up():
    c = coordinator(2)
    for _ in range(100):
        lease = c.next_lease("w", 0.0)
        if lease is None:
            break
        if lease.probe_rows:
            c.probed(lease.attempt_id)
        elif lease.shard.shard_id == 0:
            c.crashed(lease.attempt_id, "node melts")
        else:
            c.complete(lease.attempt_id, 1, 1.0)
    assert c.done
    assert "node melts" in c.given_up[0]


def test_a_failing_shard_waits_then_is_given_up():
    c = coordinator(1)
    now = 0.0
    for i in range(MAX_FAILURES):
        lease = c.next_lease("w", now)
        c.failed(lease.attempt_id, "503", not_before=now + 7)
        if i < MAX_FAILURES - 1:
            assert c.next_lease("w", now + 6) is None
        now += 7
    assert c.given_up == {0: "503"}


@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), poison=st.sets(st.integers(0, 95), max_size=3))
@settings(max_examples=150, deadline=None)
def test_whatever_happens_every_shard_is_committed_once_and_only_poison_is_skipped(seed, n, poison):
    """Random deaths, expiries, races, zombies and storage errors; the world is played by the test."""
    rng = random.Random(seed)
    c = coordinator(n, lease_s=5)
    commits: dict[int, tuple[int, ...]] = {}
    held = {}
    now = 0.0
    for turn in range(20_000):
        if c.done:
            break
        now += rng.random()
        calm = turn > 400  # from some point on nothing but poison goes wrong
        for worker in "abc":
            if worker not in held and (lease := c.next_lease(worker, now)) is not None:
                assert not c.committed[lease.shard.shard_id]
                held[worker] = lease
        for entry in c.expired(now):
            c.lease_again(entry.lease.attempt_id)
        for worker, lease in list(held.items()):
            fate = rng.random()
            if fate < 0.5:
                continue
            del held[worker]
            shard_id = lease.shard.shard_id
            rows = range(*lease.probe_rows) if lease.probe_rows else range(8)
            deadly = any(8 * shard_id + r in poison and r not in lease.skip_rows for r in rows)
            if deadly:
                c.crashed(lease.attempt_id, "poison")
            elif not calm and fate < 0.52:
                c.released(lease.attempt_id)
            elif not calm and fate < 0.53:
                c.failed(lease.attempt_id, "503", now + 1)
            elif lease.probe_rows:
                c.probed(lease.attempt_id)
            else:
                commits.setdefault(shard_id, lease.skip_rows)  # the store's exclusive create
                c.complete(lease.attempt_id, shard_id, now)
    assert c.done
    assert set(commits) | set(c.given_up) == set(range(n))
    for shard_id, skipped in commits.items():
        assert set(skipped) == {p % 8 for p in poison if p // 8 == shard_id}
