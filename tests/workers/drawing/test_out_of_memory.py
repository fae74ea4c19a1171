"""Memory that nobody holds is given back, whenever it became garbage."""

import gc
import weakref

import pytest

from millijoule.workers import factories
from millijoule.workers.drawing.out_of_memory import RARE_COLLECTION, collect_rarely, release_memory
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import load_generator


@pytest.fixture(autouse=True)
def imports_stay_frozen():
    """Not here: what was there at a release is looked through at the next one."""


class Ring:
    """Only a collection of garbage ends it."""

    def __init__(self):
        self.me = self


def test_what_outlived_one_release_is_given_back_by_the_next():
    try:
        kept = Ring()
        release_memory()
        gone = weakref.ref(kept)
        assert gc.get_freeze_count() > 0
        del kept
        gc.collect()
        assert gone() is not None  # collections pass over what was there at the release
        release_memory()
        assert gone() is None
    finally:
        gc.unfreeze()


def test_the_collector_runs_rarely_while_a_model_loads_and_afterwards_as_before(monkeypatch):
    before = gc.get_threshold()
    seen = []

    def factory(device):
        seen.append(gc.get_threshold())
        raise InputError("not this one")

    monkeypatch.setattr(factories, "find_factory", lambda option, model: factory)
    for _ in range(2):
        with pytest.raises(InputError, match="not this one"):
            load_generator("python:somewhere:factory")
        assert gc.get_threshold() == before
    assert [first for first, *_ in seen] == [RARE_COLLECTION] * 2


def test_the_collector_runs_rarely_where_it_is_told_so():
    before = gc.get_threshold()
    try:
        collect_rarely()
        gc.collect()
        kept, runs = [], gc.get_stats()[0]["collections"]
        for _ in range(RARE_COLLECTION // 2):
            kept.append([kept])
        assert gc.get_stats()[0]["collections"] == runs
        for _ in range(RARE_COLLECTION):
            kept.append([kept])
        assert gc.get_stats()[0]["collections"] > runs
    finally:
        gc.set_threshold(*before)
