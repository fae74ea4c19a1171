"""What is wrong with a Grafana dashboard: its fields, by the model of Grafana's own SDK, and its queries, by Prometheus' parser."""

from __future__ import annotations

import enum
import json
import re
import subprocess
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.cog.runtime import Runtime
from grafana_foundation_sdk.models.dashboard import Dashboard
from support.manifests.documents import Place, places

register_default_plugins()
#: What Grafana puts in, as something a parser of PromQL knows.
_VARIABLES = {"$__rate_interval": "5m", "$__range": "1h", "$job": ".*"}
_ALSO = {"le", "instance"}


def field_faults(dashboard: dict[str, Any]) -> list[str]:
    """Fields that the model does not know or holds otherwise: it drops the first, so they are not there any more when it is written."""
    try:
        model = Dashboard.from_json(dashboard)
        written = json.loads(JSONEncoder().encode(model))
    except Exception as error:  # what a wrong type meets depends on where it is
        return [f"not read: {error!r}"]
    found = [
        "/".join(map(str, place)) for place, value in places(dashboard) if not _there(written, place, value)
    ]
    found += _mistyped(model, Dashboard, "")
    if not {"panels", "templating", "title", "uid"} <= set(dashboard):
        found.append("a dashboard of panels and variables")
    return found or list(_open_fields(dashboard)) or list(_unknown_kinds(dashboard))


def _unknown_kinds(dashboard: dict[str, Any]) -> Iterator[str]:
    """What the model has no kind for; it would keep that as it is."""
    for panel in dashboard["panels"]:
        if panel["type"] not in Runtime().panelcfg_variants:
            yield f"panel {panel['title']}: no type {panel['type']}"
        for target in panel["targets"]:
            if target["datasource"]["type"] not in Runtime().dataquery_variants:
                yield f"panel {panel['title']}: no data source {target['datasource']}"


def _open_fields(dashboard: dict[str, Any]) -> Iterator[str]:
    """What the model leaves open: a panel's queries go where the panel says, variables are asked for by text."""
    for panel in dashboard["panels"]:
        if any(target["datasource"] != panel["datasource"] for target in panel["targets"]):
            yield f"panel {panel['title']}: two data sources"
    for variable in dashboard["templating"]["list"]:
        query = variable["query"]
        texts = [query] if variable["type"] == "datasource" else [None]
        if isinstance(query, dict):
            texts = [query.get("query"), query.get("refId")]
        if not all(isinstance(text, str) for text in texts):
            yield f"variable {variable['name']}: query"


def _there(written: Any, place: Place, value: Any) -> bool:
    for key in place:
        try:
            written = written[key]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(value, dict | list) or written == value


def _mistyped(value: Any, wanted: Any, where: str) -> Iterator[str]:
    """Places at which a model holds what its annotations do not allow."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        if all(list(_mistyped(value, one, where)) for one in arguments):
            yield where
    elif wanted in (Any, object):
        if value.__class__.__module__.startswith("grafana_foundation_sdk"):
            yield from _mistyped(value, value.__class__, where)
    elif wanted in (None, type(None)):
        if value is not None:
            yield where
    elif origin is typing.Literal:
        if value not in arguments:
            yield where
    elif origin in (list, dict):
        if not isinstance(value, origin):
            yield where
        else:
            inner = arguments[-1]
            for key, held in value.items() if isinstance(value, dict) else enumerate(value):
                yield from _mistyped(held, inner, f"{where}/{key}")
    elif isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        if value not in [member.value for member in wanted] and not isinstance(value, wanted):
            yield where
    elif wanted is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield where
    elif isinstance(wanted, type):
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            yield where
        elif value.__class__.__module__.startswith("grafana_foundation_sdk"):
            for name, kind in typing.get_type_hints(value.__class__).items():
                yield from _mistyped(getattr(value, name), kind, f"{where}/{name}")


def queries(dashboard: dict[str, Any]) -> list[str]:
    """PromQL of all panels, with something for Grafana's variables."""
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    for variable, value in _VARIABLES.items():
        found = [query.replace(variable, value) for query in found]
    return found


def parses(queries: list[str], folder: Path) -> bool:
    """Whether Prometheus' parser takes them all."""
    rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(queries)]
    file = folder / "queries.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    return (
        subprocess.run(["promtool", "check", "rules", file], capture_output=True, check=False).returncode == 0
    )


def unknown(query: str, exported: Mapping[str, Collection[str]]) -> list[str]:
    """Metrics and labels of a query that nobody exports; `exported` has the labels of each metric."""
    bare = re.sub(r'"[^"]*"', '""', query)
    metrics = set(re.findall(r"\bray_\w+", bare))
    found = [metric for metric in metrics if metric not in exported]
    for metric, selector in re.findall(r"\b(ray_\w+)\{([^}]*)\}", bare):
        found += [
            name for name in re.findall(r"(\w+)\s*[=!]", selector) if name not in exported.get(metric, ())
        ]
    known = {label for metric in metrics for label in exported.get(metric, ())} | _ALSO
    for names in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", bare):
        found += [name for name in re.split(r"\s*,\s*", names.strip()) if name not in known]
    return found
