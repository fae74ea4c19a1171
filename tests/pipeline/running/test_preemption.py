"""Which nodes are being taken away, asked of a Ray that may not answer."""

import threading
import time

from millijoule.pipeline.running import preemption
from millijoule.pipeline.running.preemption import LOOK_PERIOD_S, DrainingNodes


def test_nobody_waits_for_a_head_that_is_away_and_it_is_asked_once(monkeypatch):
    back, asked = threading.Event(), []

    def answers_when_it_is_back():
        asked.append(1)
        back.wait(60)
        return {"n1": round(1000 * (time.time() + 30)), "n2": 0}

    monkeypatch.setattr(preemption, "draining_nodes", answers_when_it_is_back)
    nodes = DrainingNodes()
    for turn in range(10):
        nodes.look(100.0 + turn * LOOK_PERIOD_S)
    assert (len(asked), nodes.ends("n1")) == (1, None)
    back.set()
    deadline = time.monotonic() + 30
    while nodes.ends("n1") is None:
        assert time.monotonic() < deadline
        nodes.look(100.0)
    assert 100 < nodes.ends("n1") <= 131
    assert nodes.ends("n2") == float("inf")


def test_who_is_ending_now_is_what_ray_last_answered_and_what_it_forgot_still_ended_so(monkeypatch):
    answers = [{"n1": 0}, {"n1": 0, "n2": 0}, {"n2": 0}, {}]
    monkeypatch.setattr(preemption, "draining_nodes", lambda: answers.pop(0))
    monkeypatch.setattr(preemption, "in_background", lambda ask: ask())
    nodes, seen = DrainingNodes(), []
    for turn in range(4):
        nodes.look(100.0 + turn * LOOK_PERIOD_S)
        seen.append(set(nodes.now))
        nodes.look(100.0 + turn * LOOK_PERIOD_S)  # nothing new was answered
        assert set(nodes.now) == seen[-1]
    assert seen == [{"n1"}, {"n1", "n2"}, {"n2"}, set()]
    assert nodes.ends("n1") == nodes.ends("n2") == float("inf")
