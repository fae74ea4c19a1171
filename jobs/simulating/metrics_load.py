"""Series of a large fleet's live metrics: the product's own, of a driver that heard of every worker, through a real Ray's endpoint.

Hosts, workers and what they did are made up (`made_up_commit`); `JobRun` takes their commits, `LiveMetrics` publishes, Ray exports, and
what Prometheus would read is counted. What an OpenTelemetry collector would be sent is counted beside it.
"""

from __future__ import annotations

import re
import time
import urllib.request
from collections import Counter
from typing import Any

from millijoule.jobs.measuring.made_up import made_up_commit
from millijoule.jobs.simulating.clocked_ray import ClockedRay, installed
from millijoule.jobs.simulating.devices import Fleet
from millijoule.jobs.simulating.job import FINGERPRINT, made_up_plan
from millijoule.jobs.simulating.memory_store import MemoryStore, PromptWriter

#: Workers, shards left, energy that nobody claimed.
GAUGES_SET = 3
#: Ray looks at metrics every ten seconds.
WAIT_S = 90.0
_LINE = re.compile(r"(ray_millijoule_\w+)\{(.*)\} \S+")


def measure_series(hosts: int, workers: int) -> dict[str, Any]:
    """Series, lines and bytes of `workers` on `hosts`, one GPU each, four counters of a host, and what publishing them takes."""
    import ray

    from millijoule.jobs.set_up.ray_cluster import connected
    from millijoule.pipeline.running.live_metrics import PERIOD_S, LiveMetrics

    with connected(None):
        run = driver_before(workers)
        metrics = LiveMetrics(run.planned.job, run)
        hear_of_all(run, hosts, workers, turn=0)
        first_ms = _cpu_ms(metrics.publish)
        hear_of_all(run, hosts, workers, turn=1)
        again_ms = _cpu_ms(metrics.publish)
        (node,) = ray.nodes()
        page = _scraped(node["MetricsExportPort"], metrics)
    lines = [line for line in page.splitlines() if "ray_millijoule_" in line]
    series = [match for line in lines if (match := _LINE.fullmatch(line))]
    labels = sorted({name for match in series for name in re.findall(r'(\w+)="', match[2])})
    by_metric = Counter(match[1] for match in series)
    return {
        "hosts": hosts,
        "workers": workers,
        "counters": len(run.spending.counters),
        "series": len(series),
        "overflowed": sum('otel_metrics_overflow="' in match[2] for match in series),
        "series_by_metric": dict(sorted(by_metric.items())),
        "labels": labels,
        "lines": len(lines),
        "bytes": sum(len(line) + 1 for line in lines),
        "publish_cpu_ms": {"first": first_ms, "later": again_ms},
        "publish_every_s": PERIOD_S,
        "open_telemetry": _observations(run),
    }


def driver_before(workers: int) -> Any:
    """A driver of a job with two shards for each worker, which has heard of none."""
    from millijoule.pipeline.running.demand import PoolOptions
    from millijoule.pipeline.running.run import JobRun

    ray = ClockedRay(lambda *_: None, Fleet({}, 1))
    options = PoolOptions(0, workers, gpus_per_worker=1.0)
    with installed(ray, PromptWriter):
        planned = made_up_plan(2 * workers, 100)
        return JobRun(MemoryStore(), planned, options, ray.actor_class, lease_s=120.0, speculate=True)


def hear_of_all(run: Any, hosts: int, workers: int, turn: int) -> None:
    """Give the driver the commit of one shard of each worker."""
    from millijoule.workers.lease import AttemptResult

    for number in range(workers):
        lease = run.coordinator.next_lease(f"w{number}", 0.0)
        commit = made_up_commit(lease.shard.shard_id, number, 31 * turn, (1, 30), nodes=hosts, images=100)
        assert commit.plan_fingerprint == FINGERPRINT
        run.committed(AttemptResult(lease, "committed", commit.to_json()), news=True)
        run.coordinator.complete(lease.attempt_id, lease.shard.shard_id, 1.0)


def _cpu_ms(act: Any) -> float:
    began = time.process_time()
    act()
    return round(1000 * (time.process_time() - began), 1)


def _scraped(port: int, metrics: Any) -> str:
    """What the endpoint shows once it has all that was published, or after `WAIT_S`; gauges are there while they are set."""
    deadline = time.monotonic() + WAIT_S
    while True:
        metrics.publish()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            page: str = answer.read().decode()
        there = sum(line.startswith("ray_millijoule_") for line in page.splitlines())
        published = sum(value > 0 for value in metrics._published.values())
        if there >= published + GAUGES_SET or time.monotonic() > deadline:
            return page
        time.sleep(2.0)


def _observations(run: Any) -> dict[str, int] | None:
    """Points by name that one export carries; None where the library is not installed."""
    try:
        from millijoule.pipeline.telemetry.open_telemetry import observe
    except ModuleNotFoundError:
        return None
    found = observe(run, FINGERPRINT[:12], {}, 0)
    return {name: len(points) for name, points in found.items() if points}
