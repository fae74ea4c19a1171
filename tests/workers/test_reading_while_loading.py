"""What a worker says that still loads when nobody needs it any more."""

import pytest
from support.report_outputs import Clock, WattMeter

from millijoule.workers.actor import ShardWorker
from millijoule.workers.meters.segment_timeline import SegmentTimeline


@pytest.fixture
def loading(monkeypatch):
    """`loading(watts)`: a worker with such counters, one second after it opened its account."""
    monkeypatch.setattr("millijoule.workers.actor.exit_with_parent", lambda: None)

    def made(watts):
        worker, clock = ShardWorker("w1", None), Clock()
        worker._timeline = SegmentTimeline("w1", WattMeter(clock, "boot", watts))
        clock.sleep(1.0)
        return worker

    return made


def test_without_counters_it_states_its_estimate_so_far(loading):
    worker = loading({})
    opened, read = worker._timeline.last_read, worker.read_while_loading()
    assert read.energy_mj == {}
    assert read.estimate_mj - opened.estimate_mj == pytest.approx(10_000, rel=0.01)
    assert worker._timeline.take() == ()  # it has closed nothing


def test_with_counters_it_reads_nothing_somebody_else_does_when_it_is_gone(loading):
    worker = loading({"cpu:package-0": 50.0})
    before = worker._timeline.meter.clock.now_ns
    assert worker.read_while_loading() is None
    assert worker._timeline.meter.clock.now_ns == before


def test_before_it_has_opened_its_meter_there_is_nothing_to_say(loading):
    worker = loading({})
    worker._timeline = None
    assert worker.read_while_loading() is None
