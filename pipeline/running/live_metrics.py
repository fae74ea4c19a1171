"""Prometheus metrics of a running job, through Ray's own metrics endpoints; `infra/grafana/millijoule.json` draws them.

The driver publishes them, from what commits and workers tell it: nothing is measured a second time. Labels are few
(job, host, device, class, status, cap); what belongs to one image stays in the tables. Ray writes `ray_` before the
names and, for counters, `_total` behind them. A counter starts at 0 with each run of a job. The evidence class is not among
them: it follows from the closure of complete books, which a running job does not have.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from typing import Any

from ray.util.metrics import Counter, Gauge

from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.running.run import JobRun

#: Between two updates; Prometheus seldom looks more often.
PERIOD_S = 5.0
#: Counters of energy with a series of their own. Ray keeps 2,000 series of a metric and drops the labels of all others, the job's
#: among them, and it counts a series twice where an export comes between two updates: the energy of what comes later is told by
#: kind of counter, with `OTHERS` for host.
MAX_DEVICE_SERIES = 900
OTHERS = "others"
#: Name -> labels besides `job`, and what it says.
COUNTERS = {
    "millijoule_images": (("status",), "Images of committed shards, by status: ok, filtered or quarantined."),
    "millijoule_energy_joules": (
        ("host", "device"),
        "Growth of the energy counters, each counted once however many workers share it; those beyond the first 900 "
        "together, by kind. Absent without counters.",
    ),
    "millijoule_energy_estimate_joules": (
        (),
        "Estimate (CPU time at an assumed power) of workers that have no energy counter. Not a measurement.",
    ),
    "millijoule_worker_seconds": (("class",), "Worker time by what it went into: shard, idle, load, ..."),
    "millijoule_pool_images": (("pool",), "Accepted images of committed shards, by the pool that drew them."),
    "millijoule_lost_attempts": ((), "Attempts that found their shard committed by another."),
}
GAUGES = {
    "millijoule_workers": ((), "Workers that are ready."),
    "millijoule_pool_shard_seconds": (("pool",), "Device time that a shard takes on a worker of the pool."),
    "millijoule_pool_shard_joules": (("pool",), "Energy of a shard there, as measured, modelled or stated."),
    "millijoule_pool_shard_cost": (
        ("pool",),
        "Money for a shard there: the device's time and its electricity.",
    ),
    "millijoule_shards_remaining": ((), "Shards not committed yet."),
    "millijoule_energy_unclaimed_joules": (
        (),
        "Residual: counted during the job, but in no segment that has arrived yet.",
    ),
    "millijoule_cap_used_share": (("cap",), "What was used of a cap, 1 being all of it."),
}


def device_joules(
    run: JobRun, counters_before: Mapping[tuple[str, int, str], int]
) -> dict[tuple[str, str], float]:
    """By host and domain, how much the counters have grown beyond `counters_before`, millijoules by counter."""
    joules: dict[tuple[str, str], float] = defaultdict(float)
    for (boot_id, epoch, domain), counter in run.spending.counters.items():
        grown_mj = counter.total_mj - counters_before.get((boot_id, epoch, domain), 0)
        joules[run.hosts.get(boot_id, boot_id), domain] += grown_mj / 1000
    return joules


class LiveMetrics:
    """Publishes a `JobRun` while it works; call `tick` from the run and `publish` at its end."""

    def __init__(self, job: JobSpec, run: JobRun) -> None:
        self.run = run
        self._job = job.fingerprint[:12]
        self._metrics: dict[str, Any] = {
            name: kind(name, description=text, tag_keys=("job", *labels))
            for kind, metrics in ((Counter, COUNTERS), (Gauge, GAUGES))
            for name, (labels, text) in metrics.items()
        }
        self._published: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self._own: dict[tuple[str, str], None] = {}  # hosts and devices with a series of their own
        # what earlier runs used is no part of what this one counts
        self._estimate_before = run.spending.estimated_mj
        self._counters_before = {key: counter.total_mj for key, counter in run.spending.counters.items()}
        self._seconds_before = dict(run.spending.seconds)
        self._next = 0.0

    def tick(self) -> None:
        """Publish, if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PERIOD_S
            self.publish()

    def publish(self) -> None:
        run, spending = self.run, self.run.spending
        self._count("millijoule_images", run.counts.images_this_run, status="ok")
        self._count("millijoule_images", run.counts.filtered_this_run, status="filtered")
        self._count("millijoule_images", run.counts.quarantined_this_run, status="quarantined")
        self._count("millijoule_lost_attempts", run.counts.lost_attempts)
        for (host, device), grown in self._shown(device_joules(run, self._counters_before)).items():
            self._count("millijoule_energy_joules", grown, host=host, device=device)
        estimate_mj = spending.estimated_mj - self._estimate_before
        self._count("millijoule_energy_estimate_joules", estimate_mj / 1000)
        for name, seconds in spending.seconds.items():
            grown = seconds - self._seconds_before.get(name, 0.0)
            self._count("millijoule_worker_seconds", grown, **{"class": name})
        self._set("millijoule_workers", run.pool.ready_workers)
        self._set("millijoule_shards_remaining", run.coordinator.remaining)
        self._set("millijoule_energy_unclaimed_joules", spending.unclaimed_mj / 1000)
        if (fleet := run.fleet) is not None:
            for pool, cost in fleet.shard_costs().items():
                self._count("millijoule_pool_images", fleet.images_made[pool], pool=pool)
                for what, value in (
                    ("seconds", cost.seconds),
                    ("joules", cost.joules),
                    ("cost", cost.money),
                ):
                    if value is not None:
                        self._set(f"millijoule_pool_shard_{what}", value, pool=pool)
        for cap, share in spending.used_shares().items():
            self._set("millijoule_cap_used_share", share, cap=cap)

    def _shown(self, joules: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
        """`joules` of those that have a series of their own, and of all others by kind; who has one keeps it."""
        own = self._own
        own.update(
            dict.fromkeys(islice((key for key in joules if key not in own), MAX_DEVICE_SERIES - len(own)))
        )
        if len(own) >= len(joules):
            return dict(joules)
        shown: dict[tuple[str, str], float] = defaultdict(float)
        for (host, device), grown in joules.items():
            key = (host, device) if (host, device) in own else (OTHERS, device.partition(":")[0])
            shown[key] += grown
        return shown

    def _count(self, name: str, total: float, **labels: str) -> None:
        """Bring a counter to `total`; Ray's counters take increments."""
        key = name, tuple(sorted(labels.items()))
        if total > self._published[key]:
            self._metrics[name].inc(total - self._published[key], tags={"job": self._job, **labels})
            self._published[key] = total

    def _set(self, name: str, value: float, **labels: str) -> None:
        self._metrics[name].set(value, tags={"job": self._job, **labels})
