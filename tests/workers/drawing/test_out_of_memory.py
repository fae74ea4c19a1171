"""Memory that nobody holds is given back, whenever it became garbage."""

import gc
import weakref

from millijoule.workers.drawing.out_of_memory import release_memory


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
