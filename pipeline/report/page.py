"""The report as one HTML file that needs no network: charts, tables, filters and the first images with their prompts.

Prompts, model names, hosts and messages are untrusted text. They reach the page only through `html.escape` or as
JSON in which no markup can end the block, and the page's content security policy runs exactly the two scripts whose
hashes it names: whatever slipped through would not run, and nothing can be sent anywhere. Characters that would turn or hide
the words around them are made visible.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.resources import Resources

from millijoule.pipeline.report.charts import Chart, job_charts
from millijoule.pipeline.report.data import Report
from millijoule.pipeline.report.sections import comparison_section, job_section
from millijoule.workers.visible_text import visible, visible_lines


def render_page(report: Report) -> bytes:
    """The whole page, UTF-8."""
    charts = [job_charts(job) for job in report.jobs]
    sections = [job_section(number, job, charts[number]) for number, job in enumerate(report.jobs)]
    if len(report.jobs) > 1:
        sections.insert(0, comparison_section(report.jobs))
    library = _inline(Resources(mode="inline", components=["bokeh"], minified=True).js_raw[0])
    script = _inline(_resource("js"))
    names = dict.fromkeys(job.model for job in report.jobs)
    page = Template(_resource("html")).substitute(
        policy=escape(_policy(library, script)),
        title=visible(escape("Energy report: " + ", ".join(names))),
        style=_resource("css"),
        body=visible_lines("\n".join(sections)),
        footer="Made by <code>millijoule report</code> from the output's own files. Nothing is loaded from elsewhere.",
        charts=_json_block(_chart_specs(charts)),
        library=library,
        script=script,
    )
    return page.encode("utf-8", "replace")


def _resource(kind: str) -> str:
    return files("millijoule.pipeline.report").joinpath(f"page.{kind}").read_text("utf-8")


def _inline(script: str) -> str:
    """`script` so that it can stand inside a script element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json_block(value: Any) -> str:
    """JSON that no HTML parser can leave: every < > & is an escape inside a string."""
    text = json.dumps(_with_visible_texts(value), separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _with_visible_texts(value: Any) -> Any:
    """A JSON value with every text as the page shows it, so that the filters find the charts' names, too."""
    if isinstance(value, str):
        return visible_lines(value)
    if isinstance(value, dict):
        return {_with_visible_texts(k): _with_visible_texts(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_with_visible_texts(v) for v in value]
    return value


def _chart_specs(charts: Sequence[Sequence[Chart]]) -> list[dict[str, Any]]:
    return [
        {
            "job": f"job-{number}",
            "key": chart.key,
            "target": f"chart-{number}-{chart.key}",
            "item": json_item(chart.figure, ID(f"chart-{number}-{chart.key}")),
            "lanes": [asdict(lane) for lane in chart.lanes],
        }
        for number, of_job in enumerate(charts)
        for chart in of_job
    ]
