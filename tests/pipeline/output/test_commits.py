"""Commits are read in the order of shards, and not far ahead."""

import json

from support.ledgers import commit

from millijoule.pipeline.output import commits
from millijoule.pipeline.output.commits import READ_THREADS, CommitCompactor, in_threads, read_commits
from millijoule.workers.layout import commit_key
from millijoule.workers.storage.open import open_store


def test_items_come_in_order_and_few_are_taken_ahead():
    taken, held = [], []

    def items():
        for number in range(1, 2001):
            taken.append(number)
            yield number

    for number, result in enumerate(in_threads(lambda n: n, items()), 1):
        assert result == number
        held.append(len(taken) - number)
    assert len(held) == 2000
    assert max(held) <= 2 * READ_THREADS * commits.ITEMS_PER_CALL + commits.ITEMS_PER_CALL


def test_commits_come_in_order_of_shards_from_parts_in_any_order_and_from_objects(tmp_path):
    store = open_store(str(tmp_path))
    bodies = {n: commit(n, f"a{n}", 1).to_json() for n in range(9)}
    for n, body in bodies.items():
        store.put(commit_key(n), body)
    first, second = CommitCompactor(store, 1), CommitCompactor(store, 2)
    for n in (8, 0, 3):
        first.add(n, bodies[n])
    first.flush()
    for n in (5, 1, 3):  # 3 by both drivers; 2, 4, 6 and 7 by none
        second.add(n, bodies[n])
    second.flush()
    second.add(40, json.dumps({}).encode())  # of a plan that is not ours
    second.flush()
    for _ in range(2):
        assert [c.attempt_id for c in read_commits(store, 9)] == [f"a{n}" for n in range(9)]
