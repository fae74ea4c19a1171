"""The runbook has an entry for each alert and each overlay, and the rules know the metrics that the code exports."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml
from support.manifests.documents import OVERLAYS, ROOT, distinct_fields, spoilt
from support.tools import missing, needs

from millijoule.pipeline.running.live_metrics import COUNTERS, GAUGES

FOLDER = ROOT / "infra/prometheus"
RULES = yaml.safe_load((FOLDER / "rules.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RUNBOOK = (ROOT / "infra/README.md").read_text()
needs_promtool = needs(missing("promtool"))


def promtool(*arguments: object) -> int:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, check=False).returncode


@pytest.mark.parametrize("alert", ALERTS, ids=lambda a: a["alert"])
def test_an_alert_has_an_entry_that_it_links_and_a_severity(alert):
    assert f"\n### {alert['alert']}\n" in RUNBOOK
    assert alert["annotations"]["runbook"] == f"infra/README.md#{alert['alert'].lower()}"
    assert alert["labels"]["severity"] in ("info", "warning", "critical")


def test_every_overlay_stands_in_the_runbook():
    assert [overlay for overlay in OVERLAYS if f"`{overlay}`" not in RUNBOOK] == []


def test_rules_ask_for_metrics_and_labels_that_are_exported():
    exported = {f"ray_{name}_total" for name in COUNTERS} | {f"ray_{name}" for name in GAUGES}
    text = (FOLDER / "rules.yml").read_text()
    assert set(re.findall(r"\bray_millijoule_\w+", text)) <= exported
    tested = (FOLDER / "rules_test.yml").read_text()
    assert [alert["alert"] for alert in ALERTS if f'alertname="{alert["alert"]}"' not in tested] == []


@needs_promtool
def test_promtool_takes_the_rules_and_their_tests_pass():
    assert promtool("check", "rules", FOLDER / "rules.yml") == 0
    assert promtool("test", "rules", FOLDER / "rules_test.yml") == 0


@needs_promtool
@pytest.mark.parametrize(
    "wrong",
    [("expr:", "exprs:"), ("for: 15m", "for: soon"), ("sum by (job)", "sum by job"), ("> 0.01", "> 0.9")],
)
def test_a_wrong_rule_is_noticed(tmp_path, wrong):
    rules = (FOLDER / "rules.yml").read_text()
    assert wrong[0] in rules
    (tmp_path / "rules.yml").write_text(rules.replace(*wrong, 1))
    shutil.copy(FOLDER / "rules_test.yml", tmp_path)
    assert promtool("check", "rules", tmp_path / "rules.yml") or promtool(
        "test", "rules", tmp_path / "rules_test.yml"
    )


@needs_promtool
def test_the_scrape_configuration_is_right_and_a_wrong_field_is_noticed(tmp_path):
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all(job["honor_labels"] for job in config["scrape_configs"])
    # Debian's Prometheus is built without Kubernetes: its part is held to what the documentation says
    kubernetes = config["scrape_configs"][0].pop("kubernetes_sd_configs")
    assert kubernetes == [{"role": "pod", "namespaces": {"names": ["millijoule"]}}]
    shutil.copy(FOLDER / "rules.yml", tmp_path)
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    assert promtool("check", "config", file) == 0
    for short, place in distinct_fields([config]):
        file.write_text(yaml.safe_dump(spoilt(short, place, "misspelt")))
        assert promtool("check", "config", file) != 0, place


@needs_promtool
def test_nodes_of_rays_own_list_have_the_job_that_the_alert_asks_for(tmp_path):
    alert = next(rule for rule in ALERTS if rule["alert"] == "RayNodeUnscraped")
    asked = re.search(r'job=~"(.+?)"', alert["expr"])[1]
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    nodes = config["scrape_configs"][1]
    assert all(re.fullmatch(asked, job["job_name"]) for job in config["scrape_configs"])
    # as Ray's PrometheusServiceDiscoveryWriter writes it
    listed = tmp_path / "nodes.json"
    listed.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ["10.0.0.1:8080", "10.0.0.2:8080"]}]))
    nodes["file_sd_configs"][0]["files"] = [str(listed)]
    file = tmp_path / "prometheus.yml"
    file.write_text(yaml.safe_dump({"scrape_configs": [nodes]}))
    found = subprocess.run(
        ["promtool", "check", "service-discovery", "--timeout=5s", file, nodes["job_name"]],
        capture_output=True,
        text=True,
        check=True,
    )
    labels = [target["labels"] for target in json.loads(found.stdout)]
    assert [label["__address__"] for label in labels] == ["10.0.0.1:8080", "10.0.0.2:8080"]
    assert all(re.fullmatch(asked, label["job"]) for label in labels)


@needs_promtool
def test_every_misspelt_field_of_a_rule_is_noticed(tmp_path):
    """Names of labels and annotations are the file's own; those that alerts have are held to a list."""
    file = tmp_path / "rules.yml"
    for short, place in distinct_fields([RULES]):
        if {"labels", "annotations"} & set(place[:-1]):
            continue
        file.write_text(yaml.safe_dump(spoilt(short, place, "misspelt")))
        assert promtool("check", "rules", file) != 0, place
    for alert in ALERTS:
        assert set(alert["labels"]) == {"severity"}
        assert set(alert["annotations"]) == {"summary", "runbook"}


def test_the_worked_example_of_a_jobs_cost_is_worked_rightly():
    section = RUNBOOK[RUNBOOK.index("An example, worked") : RUNBOOK.index("## What to do when")]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+)(?: h)? \| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    (work, _, _), (extra, _, _), (head, _, _), (puts, _, _) = ([float(n) for n in row[1:]] for row in rows)
    for _, amount, price, cost in rows:
        assert float(amount) * float(price) == pytest.approx(float(cost), abs=0.006)
    assert work == pytest.approx(1e6 / 2.0 / 3600, abs=0.005)
    assert extra == pytest.approx(16 * (5 * 60 + 60) / 3600, abs=0.005)
    assert head == pytest.approx(work / 16 + extra / 16, abs=0.005)
    assert puts == 5 * -(-1_000_000 // 4096)
    together = float(re.search(r"\*\*([\d.]+)\*\* \|$", section, re.MULTILINE)[1])
    assert together == pytest.approx(sum(float(cost) for *_, cost in rows), abs=0.015)
