"""The report's node meters: what C3 compared and left over, on page, terminal and in JSON; nothing where none was read."""

import io
import json

import pytest
from rich.console import Console
from support.report_outputs import measured_output

from millijoule.pipeline.closing.finish import load_records
from millijoule.pipeline.closing.node_import import import_readings, node_times
from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.output.job import require_job
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.report.data import collect_report
from millijoule.pipeline.report.page import render_page
from millijoule.pipeline.report.terminal import print_report
from millijoule.workers.node_meters.config import DeclaredRest
from millijoule.workers.node_meters.meter import NodeSeries

DEVICES_W, REST_W = 350, 30
STEP_NS = 5_000_000


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A job on host-a and host-b, of which only host-b has a meter."""
    made = measured_output(tmp_path_factory.mktemp("job"), [f"prompt {i}" for i in range(40)])
    job = require_job(made)
    shards = load_job_shards(made, job)
    begin, end = node_times(load_records(made, len(shards)))["host-b"]
    times = list(range(begin - 9 * STEP_NS, end + 9 * STEP_NS, STEP_NS))
    watts = DEVICES_W + REST_W
    power = NodeSeries("pdu-csv-power", "power", times, [watts * 1000] * len(times), 1, 4 * STEP_NS)
    rest = DeclaredRest(REST_W * 1000, 1000)
    import_readings(made, job, shards, "host-b", "<strip>", {"node": [power]}, rest)
    return made


@pytest.fixture(scope="module")
def report(store):
    return collect_report([store], Rates())


def printed(report):
    out = io.StringIO()
    print_report(report, Console(file=out, width=200))
    return out.getvalue()


def test_a_nodes_meter_stands_beside_its_devices_and_the_rest(report):
    rows = {r.scope: r for r in report.jobs[0].node_meters}
    closed = rows["host-b boot boot-host-b by <strip>"]
    assert closed.passed is True
    assert closed.node_mj == pytest.approx((DEVICES_W + REST_W) * 1000 * closed.seconds, rel=0.01)
    assert closed.devices_mj == pytest.approx(DEVICES_W * 1000 * closed.seconds, rel=0.01)
    assert closed.rest_mj == pytest.approx(REST_W * 1000 * closed.seconds, abs=1)
    assert closed.residual_mj == closed.devices_mj + closed.rest_mj - closed.node_mj
    unread = rows["host-a boot boot-host-a"]
    assert (unread.passed, unread.node_mj, unread.seconds) == (None, None, None)
    assert unread.note == "no meter of this node was read"


def test_page_terminal_and_json_say_the_same(report):
    page = render_page(report).decode()
    assert "Node meters beside devices" in page
    assert "host-b boot boot-host-b by &lt;strip&gt;" in page
    text = printed(report)
    assert "host-b boot boot-host-b by <strip>" in text
    assert "no meter of this node was read" in text
    assert "evidence class: E1 (the devices' own energy counters)" in text
    rows = json.loads(report.to_json())["jobs"][0]["node_meters"]
    assert {r["scope"] for r in rows} == {r.scope for r in report.jobs[0].node_meters}


def test_without_a_meter_there_is_no_table(tmp_path):
    bare = collect_report([measured_output(tmp_path, ["a", "b"])], Rates())
    assert bare.jobs[0].node_meters == ()
    assert "No node's own meter was read" in render_page(bare).decode()
    assert "its meter" not in printed(bare)
