"""Readings of node meters are in storage at every flush, beside the live tables, and come back as they were."""

import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from support.local_job import plan

from millijoule.pipeline.energy.live_tables import read_live_table
from millijoule.pipeline.energy.node_readings import (
    MeteredNode,
    node_reading_files,
    read_node_readings,
    store_import,
)
from millijoule.pipeline.energy.schemas import ENERGY_SCHEMAS, table_of
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running import run
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import StoreError
from millijoule.workers.node_meters.config import DeclaredRest
from millijoule.workers.node_meters.meter import NodeFailure, NodeReading, NodeSeries
from millijoule.workers.storage.open import open_store

NODE = MeteredNode("h", "bmc", 30, 0.01, DeclaredRest(5, 1), "n", "boot", domains=("cpu:0", "gpu:1"))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "out"))


def row(t, node=NODE):
    return node.row(NodeReading("bmc-power", "power", t, 700, 10, 3))


def times(table):
    return table["t_wall_ns"].to_pylist()


def test_a_reading_and_a_failure_are_rows_of_the_table():
    energy = NodeReading("bmc-energy", "energy", 5, 900, 100, 3)
    (read, power, failed) = table_of(
        "node_reading", [NODE.row(energy), row(6), NODE.row(NodeFailure(7, "HTTP 500"))]
    ).to_pylist()
    common = {"host": "h", "node_id": "n", "boot_id": "boot", "meter": "bmc", "feed": "node"}
    common |= {"max_gap_ns": 30, "accuracy_share": 0.01, "rest_mw": 5, "rest_tolerance_mw": 1}
    common |= {"domains": "cpu:0,gpu:1"}
    assert common.items() <= read.items()
    assert (read["energy_mj"], read["quantum_mj"], read["power_mw"], read["quantum_mw"]) == (
        900,
        100,
        None,
        None,
    )
    assert (power["energy_mj"], power["power_mw"], power["quantum_mw"], power["t_error_ns"]) == (
        None,
        700,
        10,
        3,
    )
    assert common.items() <= failed.items()
    assert (failed["source"], failed["note"], failed["power_mw"]) == (None, "HTTP 500", None)


def test_rows_of_a_series_are_its_readings():
    series = NodeSeries("pdu-csv-power", "power", [1, 2], [700, 701], 10, 30, 3, 0.01)
    assert NODE.rows_of(series) == [
        NODE.row(NodeReading("pdu-csv-power", "power", t, v, 10, 3)) for t, v in ((1, 700), (2, 701))
    ]


def test_a_driver_writes_one_object_that_grows_and_then_the_next(store, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.energy.node_readings.PART_FLUSHES", 2)
    writer = node_reading_files(store, 3)
    for t in range(5):
        writer.add("node_reading", [row(t)])
        writer.flush()
        writer.flush()  # nothing new: nothing written
    assert sorted(i.key for i in store.list("_job/node_meters/")) == [
        f"_job/node_meters/000003-00000{n}.parquet" for n in range(3)
    ]
    assert times(read_node_readings(store)) == [0, 1, 2, 3, 4]


def test_a_flush_that_failed_is_repeated(store, monkeypatch):
    writer = node_reading_files(store, 1)
    writer.add("node_reading", [row(1)])
    with monkeypatch.context() as patch:
        patch.setattr(store, "put", lambda key, data: (_ for _ in ()).throw(StoreError("disk full")))
        with pytest.raises(StoreError):
            writer.flush()
    writer.flush()
    assert times(read_node_readings(store)) == [1]


def test_two_drivers_and_an_import_stand_beside_each_other_and_an_import_replaces_itself(store):
    for epoch in (1, 2):
        writer = node_reading_files(store, epoch)
        writer.add("node_reading", [row(epoch)])
        writer.flush()
    strip = replace(NODE, meter="pdu", node_id=None, boot_id=None)
    first = store_import(store, "h", "pdu", [row(7, strip), row(8, strip)])
    assert store_import(store, "h", "pdu", [row(9, strip)]) == first
    assert store_import(store, "h2", "pdu", [row(9, replace(strip, host="h2"))]) != first
    found = read_node_readings(store)
    assert sorted(zip(found["meter"].to_pylist(), times(found), strict=True)) == [
        *(("bmc", 1), ("bmc", 2), ("pdu", 9), ("pdu", 9))
    ]
    assert found.schema.equals(ENERGY_SCHEMAS["node_reading"])


def test_an_object_that_is_none_is_named(store):
    store.put("_job/node_meters/000001-000000.parquet", b"PAR1 is not enough")
    with pytest.raises(StoreError, match=r"_job/node_meters/000001-000000\.parquet: not readings"):
        read_node_readings(store)


def flush(driver):
    """Flush, and wait until the driver's writer has written."""
    driver.flush()
    deadline = time.monotonic() + 60
    while not driver.writer.idle:
        assert time.monotonic() < deadline
        driver.writer.settle()
        time.sleep(0.01)


def test_a_driver_flushes_readings_and_live_rows_together(tmp_path):
    """What is there when a driver is killed: everything up to its last flush, twice the same."""
    store, job = plan(tmp_path, ["a", "b"])
    planned = run.PlannedJob(job, load_job_shards(store, job), exclusive=True)
    driver = run.JobRun(store, planned, PoolOptions(1, 1, 1.0, 0.0, {}), None, lease_s=60.0, speculate=False)
    driver.node_was_read(r for r in [row(1), row(2)])
    flush(driver)
    driver.node_was_read([row(3)])
    kept, live = read_node_readings(store), read_live_table(store, "node_reading")
    assert times(kept) == times(live) == [1, 2]
    assert kept.to_pylist() == live.to_pylist()
    flush(driver)
    assert times(read_node_readings(store)) == times(read_live_table(store, "node_reading")) == [1, 2, 3]
    (part,) = (tmp_path / "out/energy/_live/node_reading").rglob("*.parquet")
    assert pq.ParquetFile(part).schema_arrow.metadata[b"millijoule.table"] == b"node_reading"
