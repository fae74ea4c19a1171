"""The thread that looks again and again: it looks, it pauses as it is told, it ends."""

import threading

import pytest

from millijoule.workers.meters.periodic import PeriodicThread

LIMIT_S = 20.0


def test_it_looks_after_each_pause_until_it_is_stopped():
    enough, pauses, looks = threading.Event(), [], []

    def pause():
        pauses.append(len(looks))
        return 0.001

    def look():
        looks.append(threading.current_thread().name)
        if len(looks) == 3:
            enough.set()

    thread = PeriodicThread("looker", look, pause)
    thread.start()
    assert enough.wait(LIMIT_S)
    thread.stop(LIMIT_S)
    assert not thread.is_alive()
    assert set(looks) == {"looker"}
    assert pauses == list(range(len(pauses)))  # one before each look


@pytest.mark.parametrize(("last_look", "looks"), [(False, 0), (True, 1)])
def test_a_long_pause_does_not_hold_it_up(last_look, looks):
    seen = []
    thread = PeriodicThread("looker", lambda: seen.append(1), lambda: 3600.0, last_look=last_look)
    thread.start()
    thread.stop(LIMIT_S)
    assert not thread.is_alive()
    assert len(seen) == looks


def test_a_look_that_hangs_is_left_to_itself():
    begun, released = threading.Event(), threading.Event()

    def look():
        begun.set()
        released.wait(LIMIT_S)

    thread = PeriodicThread("looker", look, lambda: 0.0)
    thread.start()
    assert begun.wait(LIMIT_S)
    thread.stop(0.01)
    assert thread.is_alive()
    released.set()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_what_was_never_started_can_be_stopped():
    PeriodicThread("looker", lambda: None, lambda: 0.0).stop(0.0)
