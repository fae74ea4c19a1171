"""A fleet with more counters than Ray has series for: no energy is lost, and who has a series keeps it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from millijoule.jobs.simulating.metrics_load import driver_before, hear_of_all
from millijoule.pipeline.running import live_metrics
from millijoule.pipeline.running.live_metrics import OTHERS, LiveMetrics

HOSTS, WORKERS, SERIES = 3, 6, 8


@pytest.fixture
def published(monkeypatch):
    """Values by name and labels."""
    values: dict[tuple, float] = defaultdict(float)

    class Metric:
        def __init__(self, name, description="", tag_keys=()):
            self.name = name

        def inc(self, by, tags):
            values[self.name, tags.get("host"), tags.get("device")] += by

        def set(self, value, tags): ...

    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(live_metrics, kind, Metric)
    monkeypatch.setattr(live_metrics, "MAX_DEVICE_SERIES", SERIES)
    return values


def energy(published) -> dict[tuple[str, str], float]:
    name = "millijoule_energy_joules"
    return {(host, device): joules for (n, host, device), joules in published.items() if n == name}


def test_energy_beyond_the_series_is_told_by_kind_and_none_is_lost(published):
    run = driver_before(WORKERS)
    metrics = LiveMetrics(run.planned.job, run)
    hear_of_all(run, HOSTS, WORKERS, turn=0)
    metrics.publish()
    first = energy(published)
    hear_of_all(run, HOSTS, WORKERS, turn=1)
    metrics.publish()
    last = energy(published)
    own = {key for key in last if key[0] != OTHERS}
    assert len(own) == SERIES < len(run.spending.counters)
    assert {device for host, device in last if host == OTHERS} <= {"gpu", "cpu", "dram"}
    assert own == {key for key in first if key[0] != OTHERS}
    counted = sum(counter.total_mj for counter in run.spending.counters.values()) / 1000
    assert sum(last.values()) == pytest.approx(counted)
    assert counted > sum(first.values())


def test_a_fleet_with_few_counters_has_a_series_for_each(published, monkeypatch):
    monkeypatch.setattr(live_metrics, "MAX_DEVICE_SERIES", 100)
    run = driver_before(WORKERS)
    metrics = LiveMetrics(run.planned.job, run)
    hear_of_all(run, HOSTS, WORKERS, turn=0)
    metrics.publish()
    assert len(energy(published)) == len(run.spending.counters) == WORKERS + 4 * HOSTS
