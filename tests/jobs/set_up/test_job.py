"""From a request to a planned job: what is decided once, resumed, and refused before anything is written."""

import json
from dataclasses import replace

import pytest
from support.local_job import plan, work
from support.models import Plain

from millijoule.jobs.set_up import job as job_set_up
from millijoule.jobs.set_up.job import retry_failed, set_up_job
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import request_of
from millijoule.jobs.set_up.worker_device import WorkerDevice
from millijoule.pipeline.output.job import read_job
from millijoule.pipeline.planning.plan_options import compute_fingerprint
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import InputError
from millijoule.workers.layout import JOB_KEY, commit_key, part_key, worker_key
from millijoule.workers.storage.open import open_store

HERE = Cluster("this machine", own=True)
GPU = WorkerDevice(1.0, "it is there")


@pytest.fixture
def options(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"prompt {i}\n" for i in range(100)))
    model = "python:support.models:plain"
    return GenerateOptions(prompts=(str(tmp_path / "p.txt"),), output=str(tmp_path / "out"), model=model)


class Decisions(list):
    """Every device that was chosen, room that was looked at and calibration that was run."""

    def choose(self, request, cluster, *, has_work=lambda: True):
        self.append("device")
        return GPU if has_work() else None

    def pool(self, workers, device, cluster):
        self.append("room")
        return PoolOptions(0, 1, gpus_per_worker=device.gpus if device else 0.0)

    def calibrate(self, request, seconds, pool):
        self.append(("calibration", seconds, pool.gpus_per_worker))
        return 40


@pytest.fixture
def decisions(monkeypatch):
    made = Decisions()
    monkeypatch.setattr(job_set_up, "choose_device", made.choose)
    monkeypatch.setattr(job_set_up, "pool_options", made.pool)
    monkeypatch.setattr(job_set_up, "calibrated_shard_size", made.calibrate)
    return made


def set_up(options):
    return set_up_job(request_of(options), open_store(options.output), HERE)


def test_a_calibration_and_its_job_share_one_device_and_a_resumed_job_its_shard_size(options, decisions):
    planned, *_ = set_up(replace(options, shard_size="60s"))
    assert decisions == ["device", "room", ("calibration", 60.0, 1.0), "room"]
    assert planned.job.shard_size == 40
    assert len(planned.shards) == 3
    decisions.clear()
    again, *_ = set_up(replace(options, shard_size="30s"))
    assert decisions == ["device", "room"]
    assert again.job == planned.job


def test_a_finished_job_asks_for_no_device(options, decisions):
    planned, *_ = set_up(options)
    store = open_store(options.output)
    for shard in planned.shards:
        store.put(commit_key(shard.shard_id), b"{}")
    _, pool, _ = set_up(options)
    assert pool.gpus_per_worker == 0.0


def test_what_cannot_be_is_refused_before_anything_is_planned(options, decisions):
    with pytest.raises(InputError, match=r"--retry-failed: .* holds no job yet"):
        set_up(replace(options, retry_failed=True))
    store = open_store(options.output)
    assert read_job(store) is None
    assert not list(store.list("_job/plan"))
    store.put("_SUCCESS", b"somebody's")
    with pytest.raises(InputError, match="no job description; choose another --output"):
        set_up(options)
    assert decisions == []


def test_a_retry_of_what_is_not_finished_goes_on_with_it_and_says_so(options, decisions, caplog):
    caplog.set_level("INFO", "millijoule")
    planned, *_ = set_up(replace(options, shard_size="40"))
    store = open_store(options.output)
    store.put(commit_key(1), b"{}")
    again, *_ = set_up(replace(options, shard_size="40", retry_failed=True))
    assert len(again.shards) == len(planned.shards) == 3
    assert "--retry-failed: 2 of 3 shards, of the job or of an earlier retry, are not done yet" in caplog.text
    assert "retrying" not in caplog.text


def test_a_retry_says_how_many_images_it_makes_anew_or_that_there_is_none(tmp_path, caplog):
    caplog.set_level("INFO", "millijoule")
    store, job = plan(tmp_path, [f"prompt {i}" for i in range(6)], shard_size=4)
    work(store, job, Plain("cpu"))
    retry_failed(store, job)
    assert caplog.messages[-1] == "--retry-failed: no image stands quarantined, so there is nothing to retry"


def test_another_job_is_refused_and_the_option_named(options, decisions):
    set_up(options)
    with pytest.raises(InputError, match="--seed was 0, now 7"):
        set_up(replace(options, seed=7))
    with open(options.prompts[0], "a") as file:
        file.write("one more\n")
    with pytest.raises(InputError, match="prompt files"):
        set_up(options)


@pytest.mark.parametrize("refuses", ["choose_device", "check_device", "pool_options", "within_reach"])
def test_what_is_refused_once_it_is_planned_leaves_the_output_to_the_corrected_command(
    options, decisions, monkeypatch, refuses
):
    with open(options.prompts[0], "ab") as file:
        file.write(b"bad \xff row\n")
    store = open_store(options.output)

    def refuse(*_, **__):
        raise InputError(f"no, says {refuses}")

    with monkeypatch.context() as patch:
        patch.setattr(job_set_up, refuses, refuse)
        with pytest.raises(InputError, match=f"no, says {refuses}"):
            set_up(replace(options, seed=7))
    assert {item.key.split("/")[1][:5] for item in store.list()} == {"plan-"}
    assert set_up(options)[0].job == read_job(store)
    assert read_job(store).job_seed == 0


def test_rejected_rows_that_a_killed_driver_did_not_show_are_shown_by_the_next(options, decisions):
    with open(options.prompts[0], "ab") as file:
        file.write(b"bad \xff row\n")
    set_up(options)
    store = open_store(options.output)
    shown = store.get("bad_rows.parquet")
    store.delete(["bad_rows.parquet"])
    set_up(options)
    assert store.get("bad_rows.parquet") == shown


@pytest.mark.parametrize(
    "model", ["python:no_such_module_here:make", "python:no_such_module_here.inner:make"]
)
def test_a_factory_of_a_module_that_is_nowhere_here_is_refused_before_a_worker_starts(
    options, decisions, model
):
    with pytest.raises(InputError, match=rf"--model {model}: no module named 'no_such_module_here'"):
        set_up(replace(options, model=model))
    assert read_job(open_store(options.output)) is None
    assert decisions == []
    # on nodes of a cluster that was joined it may be there
    joined = Cluster("a cluster", own=False)
    set_up_job(request_of(replace(options, model=model)), open_store(options.output), joined)


def test_a_factory_in_the_folder_of_the_command_is_found_there_as_workers_do(
    options, decisions, tmp_path, monkeypatch
):
    (tmp_path / "only_in_this_folder.py").write_text("raise RuntimeError('imported')")
    monkeypatch.chdir(tmp_path)
    assert set_up(replace(options, model="python:only_in_this_folder:make"))[0].job.shards == 1


def test_a_refusal_says_what_to_delete_where_nothing_was_made_and_that_is_enough(options, decisions):
    set_up(options)
    store, other = open_store(options.output), replace(options, seed=7)
    store.put(worker_key("w0001-0001"), b"{}")
    store.put("energy/_live/segment/run_id=x/000001-000000.parquet", b"")
    with pytest.raises(InputError) as refused:
        set_up(other)
    said = str(refused.value)
    assert said.endswith(
        "or another --output. Nothing of it is committed: where no run is at work on it, deleting _job/ and energy/ there makes room "
        "for this one, and loses the record of the energy that 1 worker used"
    )
    for key in (commit_key(0), part_key(0, "e0001-ab.p1")):
        store.put(key, b"{}")
        with pytest.raises(InputError, match=r"or another --output$"):
            set_up(other)
        store.delete([key])
    store.delete([item.key for item in store.list() if item.key.startswith(("_job/", "energy/"))])
    assert set_up(other)[0].job.job_seed == 7


def test_another_image_format_or_quality_is_another_job(options, decisions):
    jpeg = replace(options, image_format="jpeg")
    job = set_up(jpeg)[0].job
    assert (job.image_format, job.image_quality) == ("jpeg", 95)
    assert set_up(replace(jpeg, quality=95))[0].job == job  # what it is by default
    with pytest.raises(InputError, match=r"\(--quality was 95, now 80\)"):
        set_up(replace(jpeg, quality=80))
    with pytest.raises(
        InputError, match=r"\(--image-format was 'jpeg', now 'png'; --quality was 95, now None\)"
    ):
        set_up(options)


def test_a_job_of_png_has_the_fingerprint_that_it_had_before_there_was_a_choice(options, decisions):
    planned, *_ = set_up(options)
    request = request_of(options)
    before = {"model_sha256": request.identity.sha256, "job_seed": 0, "output_format": "parquet"}
    assert planned.job.fingerprint == compute_fingerprint(request.files, request.plan, before)
    raw = json.loads(open_store(options.output).get(JOB_KEY))
    del raw["image_format"], raw["image_quality"]
    open_store(options.output).put(JOB_KEY, json.dumps(raw).encode())
    assert set_up(options)[0].job == planned.job
