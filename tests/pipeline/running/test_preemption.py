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
