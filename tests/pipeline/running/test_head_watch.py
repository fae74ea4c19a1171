"""The head of the cluster is looked at, and its loss is told once. A socket stands for the head."""

import socket
import threading

import pytest

from millijoule.pipeline.running import head_watch
from millijoule.pipeline.running.head_watch import PATIENCE_VARIABLE, HeadLoss, head_watched


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(head_watch, "LOOK_PERIOD_S", 0.001)
    monkeypatch.setenv(PATIENCE_VARIABLE, "0")


def test_a_head_that_goes_is_told_of_once():
    lost, told, seen = [], threading.Event(), threading.Event()

    def on_lost(reason):
        lost.append(reason)
        told.set()

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"

        def accept():
            head.accept()[0].close()
            seen.set()

        threading.Thread(target=accept, daemon=True).start()
        watch = head_watched(address, on_lost)
        watch.__enter__()
        assert seen.wait(60)
        assert lost == []
    assert told.wait(60)
    watch.__exit__(None, None, None)
    assert len(lost) == 1
    assert lost[0].startswith(f"{address}: ")


def test_a_head_that_never_answered_here_is_not_watched():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    lost = []
    with head_watched(address, lost.append):
        for thread in [t for t in threading.enumerate() if t.name == "head-watch"]:
            thread.join(60)
            assert not thread.is_alive()
    assert lost == []


def test_a_head_that_goes_right_after_it_was_joined_is_told_of():
    """Nobody has looked since; the head is away for good before the first look of the watch."""
    lost, told = [], threading.Event()
    head = socket.create_server(("127.0.0.1", 0))
    watch = head_watched(
        f"127.0.0.1:{head.getsockname()[1]}", lambda reason: (lost.append(reason), told.set())
    )
    watch.__enter__()
    head.close()
    assert told.wait(60)
    watch.__exit__(None, None, None)
    assert len(lost) == 1


def test_a_loss_is_passed_on_once_to_whoever_hears_first_then_or_later():
    early, late, other = [], [], []
    loss = HeadLoss()
    loss("gone")
    loss.tell(late.append)
    loss.tell(other.append)
    assert (late, other) == (["gone"], [])
    loss = HeadLoss(early.append)
    loss.tell(other.append)
    loss("gone")
    assert (early, other) == (["gone"], [])
