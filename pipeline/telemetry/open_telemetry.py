"""OpenTelemetry metrics of a running job, sent to a collector (OTLP over HTTP); the same figures as Prometheus has.

`hw.energy` (J) and `hw.power` (W) are those of the semantic conventions for hardware: one series per device, told apart by `hw.id`
and `host.name`. Only what counters and devices said is under these names; the model of CPU time has a name of its own. A
collector that does not answer delays nothing and fails nothing: figures are sent by a thread that this file owns and joins. The
library is optional: `collector` imports this file where it is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.metrics import Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from millijoule.pipeline.output.job import JobSpec
from millijoule.pipeline.running.live_metrics import device_joules
from millijoule.pipeline.running.run import JobRun

log = logging.getLogger(__name__)

#: Between two updates, and between two exports; collectors seldom keep more.
PERIOD_S = 10.0
#: For one export with its repetitions, and for the last one at the end of a job.
EXPORT_TIMEOUT_S = 5.0
#: A sample of power older than this says nothing of now; samples travel with commits.
POWER_FRESH_S = 120.0

#: Domains of counters, by what stands before the colon, as `hw.type`.
HW_TYPES = {"gpu": "gpu", "cpu": "cpu", "dram": "memory"}


class Instrument(NamedTuple):
    kind: str  # "counter" or "gauge"
    unit: str
    text: str


INSTRUMENTS = {
    "hw.energy": Instrument(
        "counter", "J", "Energy consumed by the component, as its counter says, since the run began."
    ),
    "hw.power": Instrument("gauge", "W", "Power of the component, as it said last."),
    "millijoule.energy.estimate": Instrument(
        "counter", "J", "Estimate (CPU time at an assumed power) of workers without a counter. Not measured."
    ),
    "millijoule.energy.unclaimed": Instrument("gauge", "J", "Counted, but in no segment that arrived yet."),
    "millijoule.images": Instrument("counter", "{image}", "Images of committed shards, by status."),
    "millijoule.shards.remaining": Instrument("gauge", "{shard}", "Shards not committed yet."),
    "millijoule.workers": Instrument("gauge", "{worker}", "Workers that are ready."),
}

Observed = tuple[float, Mapping[str, str]]


class AnnouncingExporter(OTLPMetricExporter):
    """Says once that a collector does not take what it is sent, and once that it does again."""

    failing = False

    def __init__(self, endpoint: str, timeout: float) -> None:
        session = requests.Session()
        session.hooks["response"] = [self._note_answer]
        self._answer = ""
        super().__init__(endpoint, timeout=timeout, session=session)

    def _note_answer(self, response: requests.Response, **_: Any) -> None:
        self._answer = f"it answers {response.status_code}"

    def export(self, *args: Any, **kwargs: Any) -> MetricExportResult:
        self._answer = "nobody answers there"
        result = super().export(*args, **kwargs)
        failed = result is not MetricExportResult.SUCCESS
        if failed and not self.failing:
            log.warning(
                "the collector at %s does not take metrics (%s); the job goes on",
                *(self._endpoint, self._answer),
            )
        elif self.failing and not failed:
            log.info("the collector at %s takes metrics again", self._endpoint)
        self.failing = failed
        return result


class OpenTelemetryMetrics:
    """Sends what `publish` last saw; `tick` publishes when it is time to, `close` sends the last figures and ends."""

    def __init__(self, endpoint: str, job: JobSpec, run: JobRun) -> None:
        self.run = run
        self._job = job.fingerprint[:12]
        self._counters_before = {key: counter.total_mj for key, counter in run.spending.counters.items()}
        self._estimate_before = run.spending.estimated_mj
        # replaced as a whole: the exporter's thread reads it
        self._observed: Mapping[str, list[Observed]] = {}
        self._next = 0.0
        self._provider = self._start(endpoint)

    def tick(self) -> None:
        """Publish, if it is time to."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PERIOD_S
            self.publish()

    def publish(self) -> None:
        """Take the figures of now."""
        self._observed = observe(self.run, self._job, self._counters_before, self._estimate_before)

    def close(self) -> None:
        """Send the last figures, and wait for that as long as one export may take."""
        self.publish()
        self._provider.shutdown(timeout_millis=EXPORT_TIMEOUT_S * 1000)

    def _start(self, endpoint: str) -> MeterProvider:
        for noisy in ("opentelemetry.exporter", "urllib3"):  # each attempt, with its trace
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        exporter = AnnouncingExporter(endpoint, EXPORT_TIMEOUT_S)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=PERIOD_S * 1000)
        about = {
            "service.name": "millijoule",
            "service.version": version("millijoule"),
            "service.instance.id": f"{self._job}-{self.run.epoch}",
        }
        provider = MeterProvider([reader], Resource(about), shutdown_on_exit=False)
        meter = provider.get_meter("millijoule", about["service.version"])

        def reading_of(name: str) -> Callable[[Any], list[Observation]]:
            return lambda _: [
                Observation(value, dict(labels)) for value, labels in self._observed.get(name, ())
            ]

        for name, instrument in INSTRUMENTS.items():
            create = getattr(meter, f"create_observable_{instrument.kind}")
            create(name, [reading_of(name)], unit=instrument.unit, description=instrument.text)
        return provider


def observe(
    run: JobRun, job: str, counters_before: Mapping[tuple[str, int, str], int], estimate_before: int
) -> dict[str, list[Observed]]:
    """The figures of now by name, each with what tells its series apart."""
    counts, spending = run.counts, run.spending
    of_job = {"millijoule.job": job}

    def component(host: str, domain: str) -> dict[str, str]:
        hw_type = HW_TYPES.get(domain.partition(":")[0], "other")
        identity = domain.removeprefix("gpu:")
        return {"hw.id": identity, "hw.type": hw_type, "host.name": host, **of_job}

    now_ns = time.time_ns()
    watts: list[Observed] = []
    for (boot_id, device), sample in run.latest_power.items():
        milliwatts = (
            sample.power_instant_mw if sample.power_instant_mw is not None else sample.power_average_mw
        )
        if milliwatts is not None and now_ns - sample.t_wall_ns < POWER_FRESH_S * 1e9:
            host = run.hosts.get(boot_id, boot_id)
            watts.append((milliwatts / 1000, component(host, f"gpu:{device}")))
    images = {
        "ok": counts.images_this_run,
        "filtered": counts.filtered_this_run,
        "quarantined": counts.quarantined_this_run,
    }
    return {
        "hw.energy": [
            (joules, component(host, domain))
            for (host, domain), joules in device_joules(run, counters_before).items()
        ],
        "hw.power": watts,
        "millijoule.energy.estimate": [((spending.estimated_mj - estimate_before) / 1000, of_job)],
        "millijoule.energy.unclaimed": [(spending.unclaimed_mj / 1000, of_job)],
        "millijoule.images": [(n, {"status": status, **of_job}) for status, n in images.items()],
        "millijoule.shards.remaining": [(run.coordinator.remaining, of_job)],
        "millijoule.workers": [(run.pool.ready_workers, of_job)],
    }
