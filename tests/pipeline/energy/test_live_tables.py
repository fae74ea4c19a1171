"""Energy tables of a running job: what a killed driver leaves closes, and lacks at most one flush interval."""

import io
import json
import signal
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.dies_between_flushes import SteadyMeter
from support.jobs import environment
from support.ledgers import GPU, JOB, SECOND, chain, commit, read, segment
from support.local_job import plan, work

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import load_records
from millijoule.pipeline.energy.ledger import build_ledger
from millijoule.pipeline.energy.live_tables import (
    LiveTables,
    live_parts,
    read_live_segments,
    read_live_table,
    read_live_tables,
)
from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.run import JobRun, PlannedJob
from millijoule.pipeline.sql.query import CLOSURE_QUERIES, open_tables, run_query
from millijoule.workers.errors import StoreError
from millijoule.workers.lease import WorkerStopped
from millijoule.workers.records import encode
from millijoule.workers.schemas import BOOK_EPOCHS, PowerSample, PowerTrace
from millijoule.workers.storage.open import open_store

SHARDS = 10


@pytest.fixture
def output(tmp_path):
    return open_store(str(tmp_path / "out"))


def ask(store, query):
    with open_tables([store]) as connection:
        return run_query(connection, query, {}).to_pylist()


@pytest.mark.long
def test_a_driver_killed_between_flushes_loses_one_interval_and_the_ledger_closes(tmp_path):
    store, job = plan(tmp_path, [f"prompt {i}" for i in range(2 * SHARDS)], shard_size=2)
    died = subprocess.run(
        [sys.executable, "-m", "support.dies_between_flushes", store.url, "8", "3"],
        env=environment(tmp_path),
        check=False,
        timeout=120,
    )
    assert died.returncode == -signal.SIGKILL

    commits = list(read_commits(store, SHARDS))
    assert len(commits) == 8
    flushed = read_live_table(store, "attempt")["attempt_id"].to_pylist()
    by_time = [c.attempt_id for c in sorted(commits, key=lambda c: c.t_end_wall_ns)]
    assert flushed == by_time[:6]  # what is missing came after the last flush

    live = build_ledger(read_live_segments(store), {c.shard_id: c.attempt_id for c in commits})
    true = load_records(store, SHARDS).ledger
    assert live.complete
    assert {(e.segment.shard_id, e.segment.open.t_mono_ns): e.energy_mj for e in live.entries}.items() <= {
        (e.segment.shard_id, e.segment.open.t_mono_ns): e.energy_mj for e in true.entries
    }.items()
    assert ask(store, "closure_c1") == []
    (held,) = ask(store, "SELECT sum(energy_mj)::BIGINT AS mj FROM segment")
    (grown,) = ask(store, "SELECT max(energy_mj) - min(energy_mj) AS mj FROM counter")
    assert held == grown
    assert held["mj"] > 0

    work(store, job, meter=SteadyMeter())
    assert live_parts(store) == {}
    stats = json.loads(store.get("stats.json"))
    assert stats["evidence_class"] == "E1"
    assert stats["closure"] == {"C1": True, "C2": True, "C3": None, "C4": None, "C5": True, "C6": True}
    assert list(check_output(store)) == []
    for check in CLOSURE_QUERIES:
        assert ask(store, check) == []
    (images,) = ask(store, "SELECT count(*) AS n, sum(energy_full_mj)::BIGINT AS mj FROM image")
    assert images == {"n": 2 * SHARDS, "mj": load_records(store, SHARDS).ledger.summary()["total_mj"]}


def test_workers_that_share_a_counter_are_divided_when_they_are_read(output):
    tables = LiveTables(output, JOB.fingerprint, 1)
    segments = [
        *chain([read(0, 0), read(10, 100)], ["shard"], "w1", shard=1),
        segment(read(5, 40), read(15, 161), "shard", "w2", shard=2, attempt="a2"),
    ]
    for n, s in enumerate(segments, 1):
        tables.add_commit(commit(n, s.attempt_id, 3, [s], worker=s.worker_id))
        tables.flush()
    stored = read_live_table(output, "segment")
    assert stored["quality"].to_pylist() == ["undivided"] * 2
    assert stored["energy_mj"].to_pylist() == [100, 121]  # each worker's own difference
    divided = read_live_tables(output, JOB)
    assert divided["segment"]["energy_mj"].to_pylist() == [70, 91]
    assert divided["attempt"]["energy_mj"].to_pylist() == [70, 91]
    assert divided["attempt"]["images_ok"].to_pylist() == [3, 3]
    assert (divided["image"].num_rows, divided["closure"].num_rows) == (0, 0)


def test_live_segments_come_back_as_they_were(output):
    reads = [read(0, 5, estimate=1), read(1, estimate=4), read(2, 30, **{"cpu:0": 7}), read(3, 1, epoch=1)]
    segments = chain(reads, ["load", "idle", "shard"])
    tables = LiveTables(output, JOB.fingerprint, 1)
    tables.add_segments(segments)
    tables.flush()
    found = read_live_segments(output)
    before, after = build_ledger(segments), build_ledger(found)
    assert [(e.segment_class, e.energy_mj, e.lost) for e in after.entries] == [
        (e.segment_class, e.energy_mj, e.lost) for e in before.entries
    ]
    assert after.gaps == before.gaps
    assert after.runs == before.runs
    assert read_live_table(output, "segment")["energy_estimate_mj"].to_pylist() == [3, *[None] * 4]


def test_live_attempts_say_what_was_filtered_and_those_of_an_earlier_version_are_read(output):
    output.put("_job/job.json", encode(JOB))
    live = LiveTables(output, JOB.fingerprint, 1)
    segments = chain([read(0, 0), read(9, 1003)], ["shard"])
    kinds = {"images_filtered": 2, "images_quarantined": 3, "images_drawn": 6}
    live.add_commit(commit(1, "a1", 3, segments, energy_mj=1003, **kinds))
    live.flush()
    # as a driver of the version before wrote it
    (key,) = live_parts(output)["attempt"]
    with output.open_input(key) as source:
        row = pq.ParquetFile(source).read()
    old = row.drop_columns(["images_filtered", "images_drawn", "energy_filtered_mj", "energy_quarantined_mj"])
    old = old.set_column(0, old.schema.field(0), pa.array([2], pa.int64()))
    sink = io.BytesIO()
    pq.write_table(old, sink)
    output.put(key.replace("000001-", "000000-"), sink.getvalue())

    columns = ["shard_id", "images_ok", "images_filtered", "energy_filtered_mj", "energy_quarantined_mj"]
    found = read_live_tables(output, JOB)["attempt"].select(columns).to_pylist()
    rows = {r.pop("shard_id"): tuple(r.values()) for r in found}
    assert rows[1] == (3, 2, 334, 167)  # of 1003: 168 mJ for one accepted image, 167 for every other image
    assert rows[2][:2] == (3, 0)


def test_live_segments_keep_the_book_of_counters_that_wrap(output):
    book = 5 * BOOK_EPOCHS
    reads = [
        replace(read(0, 5, **{"cpu:0": 1}), wrap_epoch=book),
        replace(read(1, **{"cpu:0": 2}), wrap_epoch=book),
        replace(read(2), wrap_epoch=book),
        replace(read(3, 9, epoch=1, **{"cpu:0": 7}), wrap_epoch=book + 1),
        replace(read(4, 11, epoch=1, **{"cpu:0": 9}), wrap_epoch=book + 1),
    ]
    segments = chain(reads, ["load", "idle", "shard", "idle"])
    tables = LiveTables(output, JOB.fingerprint, 1)
    tables.add_segments(segments)
    tables.flush()
    before, after = build_ledger(segments), build_ledger(read_live_segments(output))
    assert after.runs == before.runs
    assert {(r.domain, r.epoch) for r in after.runs} == {
        (GPU, 0),
        (GPU, 1),
        ("cpu:0", book),
        ("cpu:0", book + 1),
    }
    assert [e.energy_mj for e in after.entries] == [e.energy_mj for e in before.entries]


def test_files_grow_and_then_the_next_begins(output, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.energy.live_tables.LIVE_PART_FLUSHES", 3)
    tables = LiveTables(output, JOB.fingerprint, 7)
    reads = [read(t, 10 * t) for t in range(9)]
    for s in chain(reads, ["idle"] * 8):
        tables.add_segments([s])
        tables.flush()
        tables.flush()  # nothing new: nothing written
    assert {table: len(keys) for table, keys in live_parts(output).items()} == {"counter": 3, "segment": 3}
    with output.open_input("energy/_live/segment/run_id=0123456789ab/000007-000000.parquet") as source:
        assert pq.ParquetFile(source).metadata.num_rows == 3
    assert sum(read_live_table(output, "segment")["energy_mj"].to_pylist()) == 80
    assert {r.domain for r in build_ledger(read_live_segments(output)).runs} == {GPU}


def trace(*seconds, device="GPU-1"):
    """A device's power, one watt per second of its time."""
    made = tuple(PowerSample(t * SECOND, t * SECOND, None, 1000 * t) for t in seconds)
    return PowerTrace(device, "boot", "nvml-fields-185-186", made)


def test_power_samples_of_commits_and_of_the_rest_are_live(output):
    tables = LiveTables(output, JOB.fingerprint, 1)
    tables.add_power("w1", [trace(1)])  # before anything says where w1 is
    parts = chain([read(0, 0), read(9, 100)], ["shard"])
    tables.add_commit(commit(1, "a1", 3, parts, power=(trace(2, 3), trace(2, device="GPU-2"))))
    tables.add_power("w1", [trace(4)])
    tables.flush()
    columns = ["host", "node_id", "device", "t_mono_ns", "power_average_mw", "power_instant_mw", "source"]
    rows = read_live_tables(output, JOB)["power"].select(columns).to_pylist()
    assert [(*r.values(),) for r in rows] == [
        (None, None, "GPU-1", 1 * SECOND, None, 1000, "nvml-fields-185-186"),
        ("h1", "n1", "GPU-1", 2 * SECOND, None, 2000, "nvml-fields-185-186"),
        ("h1", "n1", "GPU-1", 3 * SECOND, None, 3000, "nvml-fields-185-186"),
        ("h1", "n1", "GPU-2", 2 * SECOND, None, 2000, "nvml-fields-185-186"),
        ("h1", "n1", "GPU-1", 4 * SECOND, None, 4000, "nvml-fields-185-186"),
    ]
    output.put("_job/job.json", encode(JOB))
    assert ask(output, "SELECT max(power_instant_mw) AS mw FROM power WHERE device = 'GPU-2'") == [
        {"mw": 2000}
    ]


def test_power_costs_one_write_per_flush_and_cuts_no_other_file_short(output, monkeypatch):
    monkeypatch.setattr("millijoule.pipeline.energy.live_tables.LIVE_PART_ROWS", 8)
    tables, written = LiveTables(output, JOB.fingerprint, 1), []
    put = output.put
    monkeypatch.setattr(output, "put", lambda key, data: (written.append(key), put(key, data)))
    for n in range(4):
        tables.add_segments(chain([read(n, n), read(n + 0.5, n)], ["idle"]))
        tables.add_power("w1", [trace(*range(10 * n, 10 * n + 5), device=f"GPU-{i}") for i in range(2)])
        written.clear()
        tables.flush()
        assert sorted(key.split("/")[2] for key in written) == ["counter", "power", "segment"]
    assert {t: len(keys) for t, keys in live_parts(output).items()} == {
        "counter": 1,
        "segment": 1,
        "power": 4,
    }
    assert read_live_table(output, "power").num_rows == 40
    written.clear()
    tables.add_power("w1", [trace()])  # no sample: nothing to write
    tables.flush()
    assert written == []


def test_a_driver_writes_power_that_no_commit_carries(tmp_path):
    store, job = plan(tmp_path, ["a cat"])
    planned = PlannedJob(job, load_job_shards(store, job), exclusive=True)
    driver = JobRun(store, planned, PoolOptions(1, 1, 1.0, 0.0, {}), None, lease_s=60.0, speculate=False)
    driver.stopped(WorkerStopped("w1", tuple(chain([read(0, 0), read(5, 9)], ["idle"])), (trace(1, 2),)))
    driver.flush()
    driver.writer.close()
    assert read_live_table(store, "power")["power_instant_mw"].to_pylist() == [1000, 2000]


def test_a_flush_that_failed_is_repeated(output, monkeypatch):
    tables = LiveTables(output, JOB.fingerprint, 1)
    tables.add_segments(chain([read(0, 0), read(1, 5)], ["load"]))
    with monkeypatch.context() as patch:
        patch.setattr(output, "put", lambda key, data: (_ for _ in ()).throw(StoreError("disk full")))
        with pytest.raises(StoreError):
            tables.flush()
    assert live_parts(output) == {}
    tables.flush()
    assert read_live_table(output, "segment")["energy_mj"].to_pylist() == [5]


def test_two_drivers_write_beside_each_other(output):
    for epoch in (1, 2):
        tables = LiveTables(output, JOB.fingerprint, epoch)
        tables.add_segments(
            [replace(s, worker_id=f"w{epoch}") for s in chain([read(epoch, epoch), read(9, 9)], ["load"])]
        )
        tables.flush()
    assert sorted(s.worker_id for s in read_live_segments(output)) == ["w1", "w2"]
