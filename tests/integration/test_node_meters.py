"""`generate --node-meter` on a real Ray: stand-in controllers and tools, processor counters that count, meters that die."""

import os
import re

import pyarrow.parquet as pq
import pytest
from support.jobs import assert_exactly_once, generate, start, wait_for_commits, wait_for_log, write_prompts
from support.nodes import DRAM_W, PACKAGE_W, REST_W, SteadyNode

from millijoule.pipeline.sql.query import open_tables, run_query
from millijoule.workers.storage.open import open_store

SLOW = ("--model", "python:support.models:slow", "--shard-size", 8)


@pytest.fixture
def node(tmp_path):
    with SteadyNode(tmp_path) as steady:
        yield steady


def config(folder, node, **more):
    """A file with this node's meter, read every second."""
    keys = {
        "rest_watts": REST_W,
        "rest_tolerance_watts": 1,
        "period_s": 1,
        "url": node.controller.url,
        **more,
    }
    lines = ["[[node]]", 'nodes = ["*"]', 'meter = "redfish"']
    lines += [f"{k} = {v!r}".replace("'", '"') for k, v in keys.items()]
    path = folder / "meters.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def table(output, name):
    return pq.read_table(output / "energy" / name).to_pylist()


def c3(output):
    return [r for r in table(output, "closure") if r["check"] == "C3"]


def test_a_job_is_closed_against_its_nodes_controller(tmp_path, ray_address, node):
    prompts, out = write_prompts(tmp_path / "p.txt", 400), tmp_path / "out"
    done = generate(
        *(tmp_path, "--prompts", prompts, "--output", out, *SLOW, "--node-meter", config(tmp_path, node)),
        ray=ray_address,
        **node.env,
    )
    assert done.returncode == 0, done.stderr
    assert "is missing" not in done.stderr
    assert_exactly_once(out, 400)

    readings = table(out, "node_reading")
    assert {r["source"] for r in readings} == {"redfish-energy", "redfish-power"}
    assert {(r["rest_mw"], r["rest_tolerance_mw"]) for r in readings} == {(REST_W * 1000, 1000)}
    assert {r["domains"] for r in readings} == {"cpu:package-0,dram:package-0"}
    assert len({(r["host"], r["boot_id"], r["node_id"]) for r in readings}) == 1
    attempt = table(out, "attempt")[0]
    assert {(r["host"], r["node_id"]) for r in readings} == {(attempt["host"], attempt["node_id"])}

    parts = table(out, "node_energy")
    assert {(p["part"], p["name"]) for p in parts} == {
        *(("node", "node"), ("rest", "declared"), ("device", "cpu:package-0"), ("device", "dram:package-0"))
    }
    (row,) = c3(out)
    by_part = {p: sum(r["energy_mj"] for r in parts if r["part"] == p) for p in ("node", "device", "rest")}
    assert row["expected_mj"] == by_part["node"]
    assert row["residual_mj"] == by_part["device"] + by_part["rest"] - by_part["node"]
    assert row["tolerance_mj"] == sum(p["tolerance_mj"] for p in parts)
    seconds = sum((p["t_close_mono_ns"] - p["t_open_mono_ns"]) / 1e9 for p in parts if p["part"] == "node")
    assert by_part["node"] == pytest.approx((PACKAGE_W + DRAM_W + REST_W) * 1000 * seconds, rel=0.05)
    assert abs(row["residual_share"]) < 0.05
    # a machine too busy to answer in time has wider bounds, or misses the job's beginning: then the check stays open
    known = float(re.search(r"known for ([\d.]+)%", row["note"])[1])
    assert row["passed"] is (True if row["tolerance_share"] <= 0.1 and known >= 90 else None), row
    with open_tables([open_store(str(out))]) as connection:
        assert run_query(connection, "closure_c3", {}).num_rows == 0


def test_a_meter_that_dies_costs_its_readings_and_nothing_else(tmp_path, ray_address, node):
    """A stand-in for ipmitool answers until it is told to stop."""
    answer, tool = tmp_path / "answer", tmp_path / "bin" / "ipmitool"
    answer.write_text(f"    Instantaneous power reading:    {node.node_watts} Watts\n")
    tool.parent.mkdir()
    tool.write_text(
        f"#!/bin/sh\ncat {answer} 2>/dev/null || {{ echo 'Could not open device' >&2; exit 1; }}\n"
    )
    tool.chmod(0o755)
    meters = tmp_path / "meters.toml"
    meters.write_text('[[node]]\nnodes = ["*"]\nmeter = "ipmi"\nperiod_s = 1\n')
    prompts, out = write_prompts(tmp_path / "p.txt", 240), tmp_path / "out"
    path = f"{tool.parent}{os.pathsep}{os.environ['PATH']}"
    arguments = ("--prompts", prompts, "--output", out, *SLOW, "--node-meter", meters)
    driver = start(tmp_path, *arguments, ray=ray_address, **node.env, PATH=path)
    wait_for_commits(out, 6)
    answer.unlink()
    assert driver.wait(120) == 0
    log = (tmp_path / "driver.log").read_text()
    assert log.count("Could not open device; its energy is missing") == 1
    assert_exactly_once(out, 240)
    readings = table(out, "node_reading")
    assert {r["power_mw"] for r in readings} == {node.node_watts * 1000, None}
    assert len([r for r in readings if r["note"]]) == 1
    (row,) = c3(out)
    assert row["passed"] is None


def test_a_dry_run_reads_each_meter_once(tmp_path, ray_address, node):
    prompts = write_prompts(tmp_path / "p.txt", 8)
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", *SLOW, "--dry-run")
    meter = f"redfish:{node.controller.url}"
    done = generate(tmp_path, *arguments, "--node-meter", meter, ray=ray_address, **node.env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"node meter  \S+ \(redfish http://\S+\): [\d.]+ kWh so far, 75 W", done.stdout)
    assert "rest of the node not declared" in done.stdout


def test_a_meter_that_cannot_work_is_refused_before_anything_starts(tmp_path):
    prompts = write_prompts(tmp_path / "p.txt", 2)
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", *SLOW)
    done = generate(tmp_path, *arguments, "--node-meter", "redfish:https://a:b@bmc/redfish/v1/Chassis/1")
    assert done.returncode == 1
    assert "--node-meter: a Redfish URL holds a user or password" in done.stderr
    assert not (tmp_path / "out").exists()


def test_nodes_that_join_later_get_a_recorder(tmp_path, ray_cluster, node):
    """The job asks for what no node has; then a node joins that has it."""
    prompts, out = write_prompts(tmp_path / "p.txt", 120), tmp_path / "out"
    arguments = ("--prompts", prompts, "--output", out, *SLOW, "--workers", "0:1", "--resources", "late=1")
    meters = ("--node-meter", config(tmp_path, node))
    driver = start(tmp_path, *arguments, *meters, ray=ray_cluster.address, **node.env)
    wait_for_log(tmp_path, "node meters: redfish")
    late = ray_cluster.add_node(cpus=1, late=1)
    try:
        assert driver.wait(120) == 0, (tmp_path / "driver.log").read_text()
    finally:
        late.stop()
    readings = table(out, "node_reading")
    assert {r["node_id"] for r in readings} == {table(out, "attempt")[0]["node_id"]}
    assert len(readings) > 2
    assert_exactly_once(out, 120)
