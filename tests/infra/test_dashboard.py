"""Grafana's dashboard: Grafana's own model knows every field, Prometheus' parser takes every query, and all it asks for is exported."""

from __future__ import annotations

import json

import pytest
from support.manifests.documents import ROOT, changed, places, spoilt
from support.tools import missing, needs

from millijoule.pipeline.running.live_metrics import COUNTERS, GAUGES

dashboards = pytest.importorskip(
    "support.manifests.dashboards", reason="grafana-foundation-sdk is not installed (pip install .[test])"
)

DASHBOARD = json.loads((ROOT / "infra/grafana/millijoule.json").read_text())
#: Labels of each metric, as Ray exports it.
EXPORTED = {f"ray_{name}_total": {"job", *labels} for name, (labels, _) in COUNTERS.items()}
EXPORTED |= {f"ray_{name}": {"job", *labels} for name, (labels, _) in GAUGES.items()}


def test_every_misspelt_field_and_every_wrong_type_is_noticed():
    assert dashboards.field_faults(DASHBOARD) == []
    seen, missed = set(), []
    for place, _ in places(DASHBOARD):
        kind = DASHBOARD["panels"][place[1]]["type"] if place[0] == "panels" and len(place) > 1 else ""
        alike = (kind, *("*" if isinstance(key, int) else key for key in place))
        if isinstance(place[-1], str) and alike not in seen:
            seen.add(alike)
            missed += [
                (alike, how)
                for how in ("misspelt", "of another type")
                if not dashboards.field_faults(spoilt(DASHBOARD, place, how))
            ]
    assert missed == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("panels.0.type", "stats"),
        ("refresh", 5),
        ("panels.0.gridPos.x", "0"),
        ("templating.list.1.multi", "yes"),
    ],
)
def test_a_value_that_grafana_does_not_know_is_noticed(place, value):
    assert dashboards.field_faults(changed(DASHBOARD, place, value)) != []


@needs(missing("promtool"))
def test_prometheus_takes_every_query_and_no_wrong_one(tmp_path):
    right = dashboards.queries(DASHBOARD)
    assert len(right) > 5
    assert dashboards.parses(right, tmp_path)
    for old, new in (
        ("sum(", "summ("),
        ("increase", "increas"),
        ("[5m]", ""),
        (") / sum", ") % % sum"),
        (" by ", " bye "),
    ):
        wrong = next(query for query in right if old in query)
        assert not dashboards.parses([wrong.replace(old, new, 1)], tmp_path), new


def test_queries_ask_for_metrics_and_labels_that_are_exported():
    right = dashboards.queries(DASHBOARD)
    assert {query: found for query in right if (found := dashboards.unknown(query, EXPORTED))} == {}
    for query in right:
        for old, new in (
            ("ray_millijoule_", "ray_millijoules_"),
            ("{job=", "{jobs="),
            (" by (", " by (hosts, "),
        ):
            assert old not in query or dashboards.unknown(query.replace(old, new, 1), EXPORTED), new
