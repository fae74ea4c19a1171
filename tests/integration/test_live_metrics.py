"""Live metrics: what Ray's endpoint really exports, and that the dashboard asks for nothing else."""

import json
import re
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from millijoule.pipeline.energy.carbon import Rate
from millijoule.pipeline.fleet.rates import ShardCost
from millijoule.pipeline.running.live_metrics import COUNTERS, GAUGES, LiveMetrics
from millijoule.pipeline.running.run import Counts
from millijoule.pipeline.running.spending import Caps, Spending
from millijoule.workers.schemas import CounterRead, Segment

FINGERPRINT = "f" * 64
DASHBOARD = Path(__file__).parents[2] / "infra" / "grafana" / "millijoule.json"


def segment(kind: str, begin_s: int, end_s: int, mj: tuple[int, int] | None) -> Segment:
    reads = [
        CounterRead("boot", t * 10**9, t * 10**9, 0, {"gpu:GPU-1": mj[i]} if mj else {}, 1000 * t)
        for i, t in enumerate((begin_s, end_s))
    ]
    return Segment("w", kind, *reads)


def samples(port: int) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Metric name -> (labels, value), of our names and `FINGERPRINT`'s job: other tests run jobs on the same cluster."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        for line in page.read().decode().splitlines():
            if match := re.fullmatch(r"(ray_millijoule_\w+)\{(.*)\} (\S+)", line):
                labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
                if labels["job"] == FINGERPRINT[:12]:
                    found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


@pytest.fixture(scope="module")
def exported(ray_address):
    """What the endpoint shows of a run with every metric in use, after two updates."""
    caps = Caps(max_kwh=1.0, max_gco2=0.5, carbon=Rate("declared", (400.0,)))
    spending = Spending(caps)
    spending.add([segment("shard", 0, 5, (1, 2))])  # an earlier run's: no part of what this one counts
    run = SimpleNamespace(
        spending=spending,
        hosts={"boot": "node-a"},
        counts=Counts(images_this_run=3, filtered_this_run=5, quarantined_this_run=1, lost_attempts=2),
        pool=SimpleNamespace(ready_workers=2),
        coordinator=SimpleNamespace(remaining=7),
        fleet=SimpleNamespace(
            shard_costs=lambda: {"fast": ShardCost(2.0, 150.0, 0.25), "new": ShardCost(None, None, None)},
            images_made={"fast": 11, "new": 0},
        ),
    )
    ray.init(address=ray_address, log_to_driver=False)
    try:
        metrics = LiveMetrics(SimpleNamespace(fingerprint=FINGERPRINT), run)
        metrics.publish()
        spending.add([segment("shard", 10, 20, (1_000, 31_000)), segment("idle", 30, 34, (33_000, 34_000))])
        spending.add([segment("load", 0, 2, None)])
        run.counts.images_this_run = 8
        metrics.publish()
        port = ray.nodes()[0]["MetricsExportPort"]
        deadline = time.monotonic() + 60
        while len(found := samples(port)) < len(COUNTERS) + len(GAUGES) and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        ray.shutdown()
    return found


def value(exported, name: str, **labels: str) -> float:
    (only,) = [v for found, v in exported[name] if labels.items() <= found.items()]
    return only


def test_every_metric_is_exported_with_its_value(exported):
    counters = {f"ray_{name}_total" for name in COUNTERS}
    assert set(exported) == counters | {f"ray_{name}" for name in GAUGES}
    assert value(exported, "ray_millijoule_images_total", status="ok") == 8
    assert value(exported, "ray_millijoule_images_total", status="filtered") == 5
    assert value(exported, "ray_millijoule_images_total", status="quarantined") == 1
    joules = value(exported, "ray_millijoule_energy_joules_total", host="node-a", device="gpu:GPU-1")
    assert joules == pytest.approx(33.998)  # from the end of what was counted before to the last read
    assert value(exported, "ray_millijoule_energy_unclaimed_joules") == pytest.approx(2.998)
    assert value(exported, "ray_millijoule_energy_estimate_joules_total") == pytest.approx(2.0)
    assert value(exported, "ray_millijoule_worker_seconds_total", **{"class": "idle"}) == 4
    assert value(exported, "ray_millijoule_worker_seconds_total", **{"class": "shard"}) == 10
    assert value(exported, "ray_millijoule_lost_attempts_total") == 2
    assert value(exported, "ray_millijoule_shards_remaining") == 7
    assert value(exported, "ray_millijoule_cap_used_share", cap="kWh") == pytest.approx(
        36_000 / 3.6e9, rel=0.01
    )


def test_no_label_grows_with_the_job(exported):
    allowed = {"job", *(label for labels, _ in (COUNTERS | GAUGES).values() for label in labels)}
    rays_own = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
    for found in exported.values():
        for labels, _ in found:
            assert {k for k in labels if not k.startswith("otel_")} <= allowed | rays_own


def test_the_dashboard_asks_for_what_is_exported(exported):
    dashboard = json.loads(DASHBOARD.read_text())
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        assert panel["targets"], panel["title"]
        assert panel["description"]
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names, target
            asked |= names
            for name, selector in re.findall(r"(ray_\w+)\{([^}]*)\}", target["expr"]):
                labels = set(re.findall(r"(\w+)=~?", selector))
                known = {label for found, _ in exported[name] for label in found}
                assert labels <= known, f"{panel['title']}: {labels - known} is no label of {name}"
    asked |= set(re.findall(r"ray_\w+", json.dumps(dashboard["templating"])))
    assert asked == set(exported)
    boxes = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [
        (x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert all(x < 24 for x, _ in cells)
