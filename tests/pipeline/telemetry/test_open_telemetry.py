"""OpenTelemetry: what a collector really receives over HTTP, decoded from its protobuf."""

from __future__ import annotations

import gzip
import logging
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from millijoule.pipeline.running.run import Counts
from millijoule.pipeline.running.spending import Spending
from millijoule.pipeline.telemetry.collector import check_endpoint, exported
from millijoule.workers.errors import InputError
from millijoule.workers.schemas import CounterRead, PowerSample, Segment

CUMULATIVE = 2


class Collector(HTTPServer):
    """Keeps every request; answers `status`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.requests: list[tuple[str, dict[str, str], ExportMetricsServiceRequest]] = []


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        sent = ExportMetricsServiceRequest.FromString(body)
        self.server.requests.append((self.path, dict(self.headers), sent))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def segment(kind: str, begin_s: int, end_s: int, mj: dict[str, tuple[int, int]]) -> Segment:
    reads = [
        CounterRead("boot", t * 10**9, t * 10**9, 0, {d: v[i] for d, v in mj.items()}, 1000 * t)
        for i, t in enumerate((begin_s, end_s))
    ]
    return Segment("w", kind, *reads)


@pytest.fixture
def run() -> SimpleNamespace:
    spending = Spending()
    spending.add([segment("shard", 0, 5, {"gpu:GPU-1": (1, 2)})])  # an earlier run's
    return SimpleNamespace(
        epoch=3,
        spending=spending,
        hosts={"boot": "node-a"},
        latest_power={},
        counts=Counts(images_this_run=3, filtered_this_run=5),
        pool=SimpleNamespace(ready_workers=2),
        coordinator=SimpleNamespace(remaining=7),
    )


JOB = SimpleNamespace(fingerprint="f" * 64)


def points(sent: ExportMetricsServiceRequest) -> dict[str, list[tuple[dict[str, str], float]]]:
    (resource,) = sent.resource_metrics
    (scope,) = resource.scope_metrics
    return {
        metric.name: [
            (
                {a.key: a.value.string_value for a in p.attributes},
                p.as_double if p.WhichOneof("value") == "as_double" else p.as_int,
            )
            for p in getattr(metric, metric.WhichOneof("data")).data_points
        ]
        for metric in scope.metrics
    }


def test_a_collector_receives_joules_and_watts_by_the_conventions(collector, run, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-api-key=marker")
    with exported(check_endpoint(collector.url), JOB, run) as tick:
        read = {"gpu:GPU-1": (1_000, 31_000), "cpu:package-0": (500, 2_500), "dram:package-0": (0, 250)}
        run.spending.add([segment("shard", 10, 20, read), segment("load", 0, 2, {})])
        now = time.time_ns()
        run.latest_power["boot", "GPU-1"] = PowerSample(1, now, 90_000, 120_500)
        run.latest_power["boot", "GPU-2"] = PowerSample(1, now, 80_000, None)
        run.latest_power["boot", "GPU-3"] = PowerSample(1, now - 10**12, 70_000, 70_000)
        tick()
        assert collector.requests == []  # nothing is waited for while the job works
    *_, (path, headers, sent) = collector.requests
    assert (path, headers["x-api-key"]) == ("/v1/metrics", "marker")
    found = points(sent)
    of_gpu = {"hw.id": "GPU-1", "hw.type": "gpu", "host.name": "node-a", "millijoule.job": "f" * 12}
    of_package = of_gpu | {"hw.id": "cpu:package-0", "hw.type": "cpu"}
    of_memory = of_gpu | {"hw.id": "dram:package-0", "hw.type": "memory"}
    energy = {tuple(sorted(labels.items())): joules for labels, joules in found["hw.energy"]}
    expected = {(0, 30.998), (1, 2.0), (2, 0.25)}  # from 2 mJ, where the earlier run ended
    series = (of_gpu, of_package, of_memory)
    assert energy == {tuple(sorted(series[i].items())): joules for i, joules in expected}
    watts = {labels["hw.id"]: value for labels, value in found["hw.power"]}
    assert watts == {"GPU-1": 120.5, "GPU-2": 80.0}  # an old sample says nothing of now
    assert found["millijoule.energy.estimate"][0][1] == 2.0
    assert {labels["status"]: n for labels, n in found["millijoule.images"]} == {
        "ok": 3,
        "filtered": 5,
        "quarantined": 0,
    }
    units = {
        m.name: (m.unit, m.WhichOneof("data")) for m in sent.resource_metrics[0].scope_metrics[0].metrics
    }
    assert units["hw.energy"] == ("J", "sum")
    assert units["hw.power"] == ("W", "gauge")
    (counter,) = (m.sum for m in sent.resource_metrics[0].scope_metrics[0].metrics if m.name == "hw.energy")
    assert (counter.is_monotonic, counter.aggregation_temporality) == (True, CUMULATIVE)
    resource = {a.key: a.value.string_value for a in sent.resource_metrics[0].resource.attributes}
    assert resource["service.name"] == "millijoule"
    assert resource["service.instance.id"] == f"{'f' * 12}-3"


def test_without_counters_there_is_no_energy_series(collector, run):
    run.spending = Spending()
    with exported(check_endpoint(collector.url), JOB, run):
        run.spending.add([segment("load", 0, 2, {})])
    found = points(collector.requests[-1][2])
    assert "hw.energy" not in found
    assert "hw.power" not in found


def test_a_collector_that_refuses_or_is_away_is_named_once_and_harms_nothing(collector, run, caplog):
    collector.status = 400
    with (
        caplog.at_level(logging.INFO, "millijoule"),
        exported(check_endpoint(collector.url), JOB, run) as tick,
    ):
        tick()
    assert [r.levelname for r in caplog.records if "does not take metrics" in r.getMessage()] == ["WARNING"]
    assert "(it answers 400)" in caplog.text
    caplog.clear()
    threads = threading.active_count()
    with exported("http://127.0.0.1:9/v1/metrics", JOB, run) as tick:
        tick()
    assert "(nobody answers there)" in caplog.text
    assert threading.active_count() == threads


def test_no_collector_means_no_thread_and_no_library(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "millijoule.pipeline.telemetry.open_telemetry", raising=False)
    with exported(None, JOB, run) as tick:
        tick()
    assert "millijoule.pipeline.telemetry.open_telemetry" not in sys.modules


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("collector:4318", "not an address"),
        ("ftp://collector", "not an address"),
        ("http://", "not an address"),
        ("http://host:port", "not an address"),
        ("http://user:secret@collector:4318", "OTEL_EXPORTER_OTLP_HEADERS"),
        ("http://collector:4318/v1/metrics?key=secret", "OTEL_EXPORTER_OTLP_HEADERS"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_without_its_secrets(url, words):
    with pytest.raises(InputError, match=words) as refused:
        check_endpoint(url)
    assert "secret" not in str(refused.value)


def test_the_path_is_added_once():
    for url in ("https://c:1", "https://c:1/", "https://c:1/v1/metrics"):
        assert check_endpoint(url) == "https://c:1/v1/metrics"


def test_without_the_library_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.metric_exporter", None)
    with pytest.raises(InputError, match=r"pip install 'millijoule\[otel\]'"):
        check_endpoint("http://collector:4318")
