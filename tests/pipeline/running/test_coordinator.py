"""Leases: what is handed out, taken back, raced and searched."""

import random

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millijoule.pipeline.running.coordinator import (
    HANG_REASON,
    MAX_EMPTY_ATTEMPTS,
    NODE_DEATHS_BEFORE_BLAME,
    POISON_REASON,
    SECOND_OPINION_PATIENCE_S,
    SPECULATION_MIN_S,
    Coordinator,
)
from millijoule.workers.lease import AttemptProgress, AttemptResult, Suspect
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
    assert c.renew(AttemptProgress(lease.attempt_id, images_done=1, steps=4), now=8.0)
    assert c.expired(12.0) == []
    assert not c.renew(
        AttemptProgress(lease.attempt_id, images_done=1, steps=4), now=17.0
    )  # an answer without progress
    assert [e.lease for e in c.expired(18.5)] == [lease]
    c.lease_again(lease.attempt_id)
    assert c.next_lease("b", 19.0).shard.shard_id == 0


def test_steps_of_a_long_batch_or_upload_renew_a_lease_too():
    c = coordinator(1, lease_s=10)
    lease = c.next_lease("a", 0.0)
    for n in range(1, 9):
        assert c.renew(AttemptProgress(lease.attempt_id, images_done=0, steps=n), now=8.0 * n)
        assert c.expired(8.0 * n + 9) == []
    assert c.active[lease.attempt_id].images_done == 0
    assert [e.lease for e in c.expired(64 + 10.5)] == [lease]
    assert not c.renew(AttemptProgress("another", images_done=5, steps=5), now=80.0)


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


def skipped(lease) -> set[int]:
    return {row for row, _ in lease.quarantine}


def test_a_row_that_kills_workers_ends_in_quarantine():
    c = coordinator(1, rows=8)
    leases = 0
    while True:
        lease = c.next_lease("w", 0.0)
        leases += 1
        touched = range(*lease.probe_rows) if lease.probe_rows else range(8)
        if 5 in touched and 5 not in skipped(lease):
            c.crashed(lease.attempt_id, "killed")
        elif lease.probe_rows:
            c.probed(lease.attempt_id)
        else:
            assert lease.quarantine == ((5, POISON_REASON),)
            c.complete(lease.attempt_id, 0, 1.0)
            break
    assert c.done
    assert leases <= 12


def test_a_row_that_hangs_is_quarantined_with_that_reason():
    c = coordinator(1, rows=2)
    while not (lease := c.next_lease("w", 0.0)).quarantine:
        rows = range(*lease.probe_rows) if lease.probe_rows else range(2)
        if 1 in rows:
            c.crashed(lease.attempt_id, "stood still; killed", stood_still=True)
        else:
            c.probed(lease.attempt_id)
    assert lease.quarantine == ((1, HANG_REASON),)


def test_where_no_single_row_kills_all_rows_are_quarantined_with_that_reason():
    c = coordinator(2)
    quarantined = ()
    for _ in range(100):
        lease = c.next_lease("w", 0.0)
        if lease is None:
            break
        if lease.probe_rows:
            c.probed(lease.attempt_id)
        elif lease.shard.shard_id == 0 and not lease.quarantine:
            c.crashed(lease.attempt_id, "node melts")
        else:
            quarantined = quarantined or lease.quarantine
            c.complete(lease.attempt_id, lease.shard.shard_id, 1.0)
    assert c.done
    assert not c.given_up
    assert [row for row, _ in quarantined] == list(range(8))
    assert all("no single row" in reason and "node melts" in reason for _, reason in quarantined)


def test_a_shard_on_which_workers_die_without_drawing_anything_is_given_up():
    c = coordinator(1)
    empty = 0
    while (lease := c.next_lease("w", 0.0)) is not None:
        empty += len(lease.quarantine) == 8
        c.probed(lease.attempt_id) if lease.probe_rows else c.crashed(lease.attempt_id, "node melts")
    assert empty == MAX_EMPTY_ATTEMPTS
    assert "node melts" in c.given_up[0]


def test_trouble_of_storage_or_node_never_counts_against_a_shard():
    c = coordinator(1)
    for now in range(0, 7 * 50, 7):
        lease = c.next_lease("w", now)
        assert not lease.quarantine
        c.released(lease.attempt_id, not_before=now + 7)
        assert c.next_lease("w", now + 6) is None
    assert not c.given_up


def test_a_shard_that_takes_nodes_down_is_searched_in_the_end():
    c = coordinator(1)
    for _ in range(NODE_DEATHS_BEFORE_BLAME - 1):
        lease = c.next_lease("w", 0.0)
        assert lease.probe_rows is None
        c.node_died(lease.attempt_id, "gone")
    for _ in range(2):
        c.node_died(c.next_lease("w", 0.0).attempt_id, "gone")
    assert c.next_lease("w", 0.0).probe_rows == (0, 4)


def test_an_expired_lease_whose_worker_then_dies_is_queued_once():
    c = coordinator(1, lease_s=10)
    lease = c.next_lease("a", 0.0)
    (late,) = c.expired(11.0)
    c.lease_again(late.lease.attempt_id)
    c.crashed(lease.attempt_id, "stood still")
    assert c.next_lease("b", 12.0).shard.shard_id == 0
    assert c.next_lease("c", 12.0) is None


def test_a_lease_that_waits_for_storage_does_not_expire():
    c = coordinator(1, lease_s=10)
    lease = c.next_lease("a", 0.0)
    for n in range(1, 50):
        assert c.renew(AttemptProgress(lease.attempt_id), 9.0 * n, waits_for_store=True)
        assert c.expired(9.0 * n) == []


# -- rows that fail ----------------------------------------------------------------------------------------------

PEERS = {"a": "node 1", "b": "node 1", "c": "node 2"}


def accuse(c, worker="a", now=0.0, rows=(3,)):
    lease = c.next_lease(worker, now, PEERS)
    suspects = tuple(Suspect(row, 0, "no") for row in rows)
    c.suspected(AttemptResult(lease, "suspect", b"commit", suspects, (0, 0)), PEERS[worker], now)
    return lease


def test_a_row_that_failed_is_tried_on_another_node_if_there_is_one():
    c = coordinator(1)
    accuse(c)
    assert c.next_lease("a", 1.0, PEERS) is None
    assert c.next_lease("b", 1.0, PEERS) is None  # of the same node
    lease = c.next_lease("c", 1.0, PEERS)
    assert (lease.confirm, lease.healthy, lease.writes) == ((Suspect(3, 0, "no"),), (0, 0), False)


def test_else_on_another_worker_of_the_node():
    c = coordinator(1)
    accuse(c)
    peers = {"a": "node 1", "b": "node 1"}
    assert c.next_lease("a", 1.0, peers) is None
    assert c.next_lease("b", 1.0, peers).confirm


def test_the_only_worker_is_asked_again_at_once_and_the_last_one_left_after_a_while():
    c = coordinator(1)
    accuse(c)
    assert c.useful_workers == 2  # ask for a second one
    assert c.next_lease("a", SECOND_OPINION_PATIENCE_S - 1, {"a": "node 1"}) is None
    assert c.next_lease("a", SECOND_OPINION_PATIENCE_S + 1, {"a": "node 1"}).confirm
    c = coordinator(1)
    accuse(c)
    assert c.next_lease("a", 0.0, {"a": "node 1"}, alone=True).confirm


def test_a_confirmed_failure_lets_the_waiting_commit_stand():
    c = coordinator(1)
    first = accuse(c)
    lease = c.next_lease("c", 1.0, PEERS)
    result = c.confirmed(lease.attempt_id)
    assert (result.lease, result.commit_json) == (first, b"commit")
    assert c.next_lease("b", 1.0, PEERS) is None  # nobody makes the shard meanwhile
    assert c.complete(first.attempt_id, 0, 2.0)
    assert c.take_void(all_waiting=True) == []


def test_a_failure_that_another_worker_does_not_have_voids_the_attempt():
    c = coordinator(1)
    first = accuse(c)
    lease = c.next_lease("c", 1.0, PEERS)
    assert c.contradicted(lease.attempt_id).worker_id == "a"
    assert [r.lease for r in c.take_void()] == [first]
    again = c.next_lease("c", 1.0, PEERS)
    assert again.writes
    assert not again.quarantine


def test_a_hearing_that_comes_to_nothing_is_held_again():
    c = coordinator(1)
    accuse(c)
    c.released(c.next_lease("c", 1.0, PEERS).attempt_id)
    assert c.next_lease("c", 1.0, PEERS).confirm


def test_a_worker_that_dies_in_a_hearing_voids_the_attempt_and_the_search_goes_on():
    c = coordinator(1)
    first = accuse(c)
    c.crashed(c.next_lease("c", 1.0, PEERS).attempt_id, "killed")
    assert [r.lease for r in c.take_void()] == [first]
    c.crashed(c.next_lease("b", 1.0, PEERS).attempt_id, "killed")
    assert c.next_lease("b", 1.0, PEERS).probe_rows


def test_an_attempt_that_waits_when_the_run_ends_or_another_commits_is_void():
    c = coordinator(2)
    first = accuse(c)
    c.complete("somebody else", 0, 1.0)
    assert [r.lease for r in c.take_void()] == [first]
    second = accuse(c)
    assert c.take_void() == []
    assert [r.lease for r in c.take_void(all_waiting=True)] == [second]


# -- leases ahead ------------------------------------------------------------------------------------------------


def test_a_lease_ahead_is_given_only_where_as_many_shards_are_left_as_there_are_workers():
    c = coordinator(5)
    first = c.next_lease("a", 0.0)
    assert c.next_lease_ahead(first, 0.0, workers=5) is None
    ahead = c.next_lease_ahead(first, 0.0, workers=4)
    assert ahead.shard.shard_id == 1
    assert c.next_lease_ahead(first, 0.0, workers=1) is None  # one at most
    assert (len(c.active), c.at_work) == (2, 1)


def test_a_lease_ahead_begins_when_the_one_before_has_ended():
    c = coordinator(4)
    first = c.next_lease("a", 0.0)
    ahead = c.next_lease_ahead(first, 0.0, 1)
    c.complete(first.attempt_id, 0, 7.0)
    entry = c.active[ahead.attempt_id]
    assert (entry.is_ahead, entry.started, c.at_work) == (False, 7.0, 1)
    assert c.next_lease_ahead(ahead, 7.0, 1).shard.shard_id == 2


def test_or_when_its_worker_says_so():
    c = coordinator(4)
    ahead = c.next_lease_ahead(c.next_lease("a", 0.0), 0.0, 1)
    c.renew(AttemptProgress(ahead.attempt_id, waits=True), 3.0)
    assert c.active[ahead.attempt_id].is_ahead
    c.renew(AttemptProgress(ahead.attempt_id, has_begun=True), 5.0)
    assert (c.active[ahead.attempt_id].is_ahead, c.active[ahead.attempt_id].started) == (False, 5.0)


def test_a_lease_that_only_waits_for_its_own_workers_device_does_not_expire():
    c = coordinator(4, lease_s=10)
    first = c.next_lease("a", 0.0)
    ahead = c.next_lease_ahead(first, 0.0, 1)
    for n in range(1, 9):
        c.renew(AttemptProgress(ahead.attempt_id, waits=True), 8.0 * n)
    assert [e.lease for e in c.expired(64.0)] == [first]


def test_a_straggler_is_not_raced_for_what_it_holds_ahead():
    c = coordinator(4)
    done, slow = c.next_lease("a", 0.0), c.next_lease("b", 0.0)
    ahead = c.next_lease_ahead(slow, 0.0, 1)
    c.complete(done.attempt_id, 0, 1.0)
    c.complete(c.next_lease("a", 1.0).attempt_id, 3, 2.0)
    assert c.next_lease("a", 100.0).shard.shard_id == slow.shard.shard_id
    assert c.next_lease("c", 100.0) is None
    assert c.active[ahead.attempt_id].is_ahead


def test_a_shard_that_made_trouble_is_leased_beside_no_other():
    c = coordinator(6)
    first = c.next_lease("a", 0.0)
    ahead = c.next_lease_ahead(first, 0.0, 1)
    for lease in (first, ahead):
        c.crashed(lease.attempt_id, "killed")
    fresh = c.next_lease("b", 0.0)
    assert fresh.shard.shard_id == 0
    assert c.next_lease_ahead(fresh, 0.0, 1) is None
    c.complete(fresh.attempt_id, 0, 1.0)
    other = c.next_lease("b", 1.0)
    assert other.shard.shard_id == 1
    c.complete(other.attempt_id, 1, 1.0)
    assert c.next_lease_ahead(c.next_lease("b", 1.0), 1.0, 1)


def test_no_lease_ahead_while_a_question_waits_for_a_worker_with_empty_hands():
    c = coordinator(9)
    accuse(c)
    assert c.next_lease_ahead(c.next_lease("b", 0.0, PEERS), 0.0, 1) is None
    c = coordinator(9)
    for _ in range(2):
        c.crashed(c.next_lease("a", 0.0).attempt_id, "killed")
    lease = c.next_lease("b", 0.0)
    assert lease.probe_rows
    assert c.next_lease_ahead(lease, 0.0, 1) is None  # nor beside one


@given(
    seed=st.integers(0, 2**32),
    n=st.integers(1, 12),
    poison=st.sets(st.integers(0, 95), max_size=3),
    bad=st.sets(st.integers(0, 95), max_size=3),
)
@example(
    seed=9, n=6, poison=set(), bad={0}
)  # a shard is committed while rows of another attempt at it wait to be heard
@settings(max_examples=150, deadline=None)
def test_whatever_happens_every_shard_is_committed_once_and_only_poison_is_skipped(seed, n, poison, bad):
    """Random deaths, expiries, races, zombies, storage errors and a node that fails on what others draw; the world is
    played by the test. `poison` rows kill, `bad` rows raise everywhere."""
    rng = random.Random(seed)
    bad = bad - poison
    c = coordinator(n, lease_s=5)
    peers = {"a": "1", "b": "2", "c": "2"}
    commits: dict[int, set[int]] = {}
    held = {}
    waiting = {}  # leases ahead, by worker
    now = 0.0
    for turn in range(20_000):
        if c.done:
            break
        now += rng.random()
        calm = turn > 400  # from some point on nothing but poison and bad rows go wrong
        for worker in peers:
            if worker not in held and (lease := c.next_lease(worker, now, peers)) is not None:
                assert not c.committed[lease.shard.shard_id]
                held[worker] = lease
            if worker in held and worker not in waiting:
                ahead = c.next_lease_ahead(held[worker], now, len(peers))
                if ahead is not None:
                    assert not c.committed[ahead.shard.shard_id]
                    assert held[worker].writes
                    assert ahead.writes
                    assert not ahead.quarantine
                    waiting[worker] = ahead
        for worker, lease in list(waiting.items()):
            if rng.random() < 0.1:  # taken back
                del waiting[worker]
                c.released(lease.attempt_id)
        for entry in c.expired(now):
            c.lease_again(entry.lease.attempt_id)
        c.take_void()
        assert {a for a, e in c.active.items() if e.is_ahead} == {x.attempt_id for x in waiting.values()}
        assert c.at_work == len(c.active) - len(waiting)
        for worker, lease in list(held.items()):
            fate = rng.random()
            if fate < 0.5:
                continue
            del held[worker]
            if worker in waiting:
                held[worker] = waiting.pop(worker)  # the device comes to it
            shard_id = lease.shard.shard_id
            if lease.probe_rows:
                rows = set(range(*lease.probe_rows))
            elif lease.confirm:
                rows = {s.row for s in lease.confirm}
            else:
                rows = set(range(8)) - skipped(lease)
            failing = {r for r in rows if 8 * shard_id + r in bad}
            if worker == "a" and not calm and rng.random() < 0.3:
                failing |= set(rng.sample(sorted(rows), k=1))  # this node's own fault
            if any(8 * shard_id + r in poison for r in rows):
                for lost in dict.fromkeys((lease, held.pop(worker, lease))):  # nobody knows of which it died
                    c.crashed(lost.attempt_id, "poison")
            elif not calm and fate < 0.52:
                c.released(lease.attempt_id, *([now + 1] if rng.random() < 0.5 else []))
            elif not calm and fate < 0.53:
                for lost in dict.fromkeys((lease, held.pop(worker, lease))):
                    c.node_died(lost.attempt_id, "gone")
            elif lease.probe_rows:
                c.probed(lease.attempt_id)
            elif lease.confirm:
                if failing == rows:
                    result = c.confirmed(lease.attempt_id)
                    if result is not None:
                        first = result.lease
                        rows_of = skipped(first) | {s.row for s in result.suspects}
                        commits.setdefault(shard_id, rows_of)
                        c.complete(first.attempt_id, shard_id, now)
                else:
                    c.contradicted(lease.attempt_id)
            elif failing:
                suspects = tuple(Suspect(r, 0, "no") for r in sorted(failing))
                c.suspected(AttemptResult(lease, "suspect", b"", suspects), peers[worker], now)
            else:
                commits.setdefault(shard_id, skipped(lease))  # the store's exclusive create
                c.complete(lease.attempt_id, shard_id, now)
    assert c.done
    assert not c.given_up
    assert set(commits) == set(range(n))
    for shard_id, rows in commits.items():
        assert rows == {p % 8 for p in poison | bad if p // 8 == shard_id}


def test_a_run_of_shards_is_kept_for_one_worker_until_others_have_nothing_left():
    shards = [Shard(i, "part", i, 1, 1, None, None, None, f"p{i}", "") for i in range(8)]
    lengths = {"fast": 4, "slow": 1}
    coordinator = Coordinator(shards, np.zeros(8, bool), 10.0, 1, run_length=lengths.__getitem__)

    def next_shard(worker):
        lease = coordinator.next_lease(worker, 0.0)
        return None if lease is None else lease.shard.shard_id

    assert next_shard("fast") == 0
    assert [next_shard("slow") for _ in range(2)] == [4, 5]
    assert coordinator.unleased == 5
    assert next_shard("fast") == 1
    assert [next_shard("slow") for _ in range(3)] == [6, 7, 3]  # the end of the run
    assert next_shard("fast") == 2
    assert coordinator.unleased == 0
