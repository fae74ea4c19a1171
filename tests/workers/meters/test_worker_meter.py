"""A worker from start to stop, without a cluster: its device, its power samples, its threads."""

import platform
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pynvml
import pytest
from support.counters import DRAM, GPU0, PACKAGE, SECOND, UUIDS, FakeNvml, FakePowercap
from support.local_job import plan

from millijoule.pipeline.closing.check import check_output
from millijoule.pipeline.closing.finish import finish_job
from millijoule.pipeline.energy.carbon import Rates
from millijoule.pipeline.energy.uncommitted import UncommittedWriter, read_uncommitted
from millijoule.pipeline.output.commits import read_commits
from millijoule.pipeline.output.job import open_epoch
from millijoule.pipeline.planning.retry_rounds import load_job_shards
from millijoule.pipeline.report.data import collect_report
from millijoule.pipeline.running.coordinator import Coordinator
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.pipeline.running.run import JobRun, PlannedJob
from millijoule.workers import actor
from millijoule.workers.generators.registry import describe_model
from millijoule.workers.layout import closing_key, worker_key
from millijoule.workers.lease import WorkerConfig
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.nvml import MIN_READ_SPACING_NS
from millijoule.workers.schemas import ImageRequest, PowerSample, WorkerClosing

MODEL = "python:support.models:plain"


class Working(FakeNvml):
    """A board that uses a joule whenever somebody looks."""

    def _fail(self):
        super()._fail()
        self.energy_mj[UUIDS[0]] += 1_000


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A `ShardWorker` to which Ray gave GPU 0 by index, as Ray does; and its job."""
    context = SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["0"]}, get_node_id=lambda: "node")
    nvml = Working()

    options = {"powercap_root": tmp_path / "none", "boot_id": "b", "book_directory": tmp_path}

    monkeypatch.setattr(actor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(actor, "open_meter", lambda gpus: open_meter(gpus, nvml=nvml, **options))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    store, job = plan(tmp_path, ["a", "b", "c"])
    config = WorkerConfig(
        store.url,
        job.fingerprint,
        job.job_seed,
        job.output_format,
        MODEL,
        describe_model(MODEL).sha256,
        open_epoch(store, exclusive=True),
    )
    made = actor.ShardWorker("w1", config)
    made.nvml = nvml
    return made, store, job


def run_shard(made, store, job):
    """A lease of the job's only shard, attempted."""
    shards = load_job_shards(store, job)
    coordinator = Coordinator(shards, np.zeros(1, bool), 60.0, made.config.driver_epoch)
    return made.run(coordinator.next_lease("w1", 0.0))


def close_books(made, store):
    """Stop a worker and keep its last words, as a driver does."""
    stopped = made.stop()
    writer = UncommittedWriter(store, made.config.driver_epoch)
    writer.add(stopped.worker_id, stopped.segments, stopped.power)
    writer.flush()
    closing = WorkerClosing("w1", made.config.driver_epoch, "w1", stopped.segments[-1].close)
    store.put(closing_key("w1"), closing.to_json())


def flush(driver, stopped):
    """Let a driver write down a worker's last words on its way out."""
    driver.stopped(stopped)
    with pytest.raises(StopIteration):
        driver.run(on_tick=lambda: next(iter(())))


def read_table(store, name):
    """The rows of a finished job's energy table."""
    (part,) = store.list(f"energy/{name}/")
    with store.open_input(part.key) as source:
        return pq.ParquetFile(source).read().to_pylist()


def test_a_gpu_given_by_index_is_named_by_its_uuid_in_commit_counter_and_power(worker):
    made, store, job = worker
    made.start()
    made.power.look()
    assert run_shard(made, store, job).outcome == "committed"
    segments = made.stop().segments
    (commit,) = read_commits(store, 1)
    assert commit.device == UUIDS[0]
    assert commit.energy_domains == (GPU0,)
    assert {t.device for t in commit.power} == {UUIDS[0]}
    assert [s.segment_class for s in (*commit.segments, *segments)] == [
        *("load", "warmup", "idle", "shard"),
        "idle",
    ]


def test_what_a_worker_did_after_its_last_commit_is_in_the_tables(worker, monkeypatch):
    made, store, job = worker
    made.config = replace(made.config, driver_epoch=2)  # of the driver below
    made.start()
    monkeypatch.setattr(made.power.meter, "watch", dict)  # the sampler's thread sees nothing more
    shards = load_job_shards(store, job)
    planned = PlannedJob(job, shards, exclusive=True)
    driver = JobRun(store, planned, PoolOptions(0, 0), None, lease_s=60.0, speculate=False)
    made.run(driver.coordinator.next_lease("w1", 0.0))
    (commit,) = read_commits(store, 1)
    now = time.monotonic_ns()
    monkeypatch.setattr(
        made.power.meter, "watch", lambda: {UUIDS[0]: PowerSample(now, time.time_ns(), None, 123_456)}
    )
    made.power.look()
    time.sleep(MIN_READ_SPACING_NS / SECOND)  # until then the last value stands
    stopped = made.stop()
    flush(driver, stopped)

    stats = finish_job(store, job, shards)
    power = read_table(store, "power")
    assert 123_456 in [row["power_instant_mw"] for row in power]
    assert {(row["host"], row["node_id"]) for row in power} == {(commit.host, "node")}
    segments = read_table(store, "segment")
    assert segments[-1]["segment_class"] == "idle"
    assert segments[-1]["energy_mj"] > 0
    reads = [row["energy_mj"] for row in read_table(store, "counter")]
    assert sum(row["energy_mj"] for row in segments) == max(reads) - min(reads) == stats["energy"]["total_mj"]
    assert (stats["closure"]["C1"], stats["closure"]["C2"]) == (True, True)
    assert [p for p in check_output(store) if "energy" in p] == []


def test_without_telemetry_nothing_is_opened_and_energy_is_missing(worker):
    made, store, job = worker
    made.config = replace(made.config, telemetry=False, driver_epoch=2)  # of the driver below
    threads = set(threading.enumerate())
    made.start()
    stated = read_uncommitted(store).workers["w1"]
    assert (stated.energy_method, stated.device) == ("missing", "0")
    assert not [t for t in threading.enumerate() if t.name == "power-sampler"]
    assert all(t.name.startswith("device") for t in set(threading.enumerate()) - threads)
    shards = load_job_shards(store, job)
    driver = JobRun(
        *(store, PlannedJob(job, shards, exclusive=True), PoolOptions(0, 0), None),
        lease_s=60.0,
        speculate=False,
        telemetry=False,
    )
    made.run(driver.coordinator.next_lease("w1", 0.0))
    stopped = made.stop()
    assert stopped.power == ()
    flush(driver, stopped)
    assert list(store.list("energy/")) == []
    assert made.nvml.reads == made.nvml.power_reads == 0
    stats = finish_job(store, job, shards)
    assert stats["energy"]["total_mj"] is None
    assert stats["closure"]["C5"] is True
    assert read_table(store, "counter") == read_table(store, "power") == []
    assert [p for p in check_output(store) if "energy" in p] == []


def test_a_worker_states_its_environment_once(worker):
    made, store, job = worker
    made.start()
    stated = read_uncommitted(store).workers["w1"]
    assert (stated.device, stated.gpus, stated.device_name) == (UUIDS[0], (UUIDS[0],), "NVIDIA H200")
    assert (stated.driver_version, stated.node_id, stated.host) == ("570.1", "node", socket.gethostname())
    assert stated.python_version == platform.python_version()
    run_shard(made, store, job)
    made.stop()
    finish_job(store, job, load_job_shards(store, job))
    (row,) = read_table(store, "env")
    assert row["device_name"] == "NVIDIA H200"
    assert row["gpus"] == UUIDS[0]
    assert row["driver_version"] == "570.1"
    assert row["energy_method"] == "nvml-counter"
    assert row["driver_epoch"] == made.config.driver_epoch


def test_a_board_without_a_counter_is_not_made_up_for_by_the_processor(worker, tmp_path):
    """MIG mode: the package can be read, the board cannot; the books close, and there is no total."""
    made, store, job = worker
    powercap = FakePowercap(tmp_path / "none")
    made.nvml.mig[UUIDS[0]] = [1, 1]
    made.start()
    stated = read_uncommitted(store).workers["w1"]
    assert (stated.gpus, stated.energy_method) == ((UUIDS[0],), "rapl")
    run_shard(made, store, job)
    assert made.calibrate([ImageRequest("a", 0, "a", 1)]).energy_mj is None
    with powercap.counting("intel-rapl:0", "intel-rapl:0:1"):
        close_books(made, store)
    (commit,) = read_commits(store, 1)
    assert (commit.energy_mj, commit.energy_domains) == (None, (PACKAGE, DRAM))
    stats = finish_job(store, job, load_job_shards(store, job))
    assert (stats["energy"]["total_mj"], stats["energy"]["domains"]) == (None, [PACKAGE, DRAM])
    assert stats["energy"]["measured_mj"].keys() >= {"load", "shard"}
    assert (stats["closure"]["C1"], stats["closure"]["C2"], stats["evidence_class"]) == (True, True, "E0")
    assert {r["energy_mj"] for r in read_table(store, "attempt")} == {None}
    (row,) = read_table(store, "env")
    assert (row["gpus"], row["energy_domains"]) == (UUIDS[0], f"{PACKAGE},{DRAM}")
    assert [p for p in check_output(store) if "energy" in p] == []
    (flag,) = [f for f in collect_report([store], Rates()).jobs[0].flags if f.name == "devices not read"]
    assert flag.level == "problem"
    assert f"{UUIDS[0]} on {socket.gethostname()}" in flag.text


def test_an_output_without_stated_environments_answers_for_the_device_its_commits_name(worker, tmp_path):
    """As an older version wrote it."""
    made, store, job = worker
    FakePowercap(tmp_path / "none")
    made.nvml.mig[UUIDS[0]] = [1, 1]
    made.start()
    run_shard(made, store, job)
    made.stop()
    store.delete([worker_key("w1")])
    stats = finish_job(store, job, load_job_shards(store, job))
    assert (stats["energy"]["total_mj"], stats["evidence_class"]) == (None, "E0")


def test_a_worker_with_two_boards_of_which_one_is_partitioned_names_both(worker, monkeypatch):
    made, store, job = worker
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0,MIG-7")
    made.nvml.mig[UUIDS[1]] = [1, 1]
    made.start()
    stated = read_uncommitted(store).workers["w1"]
    assert (stated.device, stated.gpus) == (UUIDS[0], (UUIDS[0], UUIDS[1], "MIG-7"))
    time.sleep(MIN_READ_SPACING_NS / SECOND)
    run_shard(made, store, job)
    close_books(made, store)
    stats = finish_job(store, job, load_job_shards(store, job))
    assert (stats["energy"]["domains"], stats["energy"]["total_mj"]) == ([GPU0], None)
    assert stats["evidence_class"] == "E0"
    row = next(r for r in read_table(store, "closure") if r["check"] == "C1")
    assert (row["passed"], row["found_mj"] > 0) == (True, True)


def test_a_worker_that_stops_leaves_no_thread_behind(worker):
    made, _, _ = worker
    made.start()
    assert "power-sampler" in {t.name for t in threading.enumerate()}
    made.stop()
    assert "power-sampler" not in {t.name for t in threading.enumerate()}


def test_a_driver_that_fails_costs_numbers_and_no_image(worker):
    made, store, job = worker
    made.start()
    made.nvml.error = made.nvml.power_error = pynvml.NVML_ERROR_GPU_IS_LOST
    time.sleep(MIN_READ_SPACING_NS / SECOND)  # until then the last value stands
    assert run_shard(made, store, job).outcome == "committed"
    made.stop()
    (commit,) = read_commits(store, 1)
    assert (commit.images_ok, commit.energy_mj) == (3, None)
