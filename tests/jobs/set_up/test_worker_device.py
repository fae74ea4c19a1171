"""GPU or CPU: the table of who decides, and that nobody runs on CPUs without being told."""

import logging
from dataclasses import replace

import pytest

from millijoule.jobs.generate import GenerateOptions
from millijoule.jobs.set_up import job as job_set_up
from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.autoscaling import Prospect
from millijoule.jobs.set_up.job import WorkerRequest, validate
from millijoule.jobs.set_up.worker_device import AUTO_WORKERS_TO_COME, WorkerDevice, choose_device
from millijoule.workers.errors import InputError
from millijoule.workers.generators import registry as generator
from millijoule.workers.generators.registry import PACKAGED, needs_gpu

MAY_COME = Prospect(True, "node type gpu-spot may come", 12)
NEVER = Prospect(False, "the cluster has no autoscaler that could start one")
UNKNOWN = Prospect(None, "the cluster's autoscaler gave no answer")

OPTIONS = GenerateOptions(prompts=("p.txt",), output="out", ray_address="head:6379")


@pytest.fixture
def cluster(monkeypatch):
    """`cluster(gpus)` has that many now."""

    def has(gpus: float) -> None:
        monkeypatch.setattr(ray_cluster, "gpus", lambda: gpus)

    has(0)
    return has


@pytest.fixture
def heavy(monkeypatch):
    """The packaged diffusers directory, as if it were too heavy for CPUs."""
    monkeypatch.setattr(generator, "CPU_WEIGHTS_BYTES", 1000)
    return replace(OPTIONS, model=str(PACKAGED["baseline"]))


def choose(options, says: Prospect | None = None, **more) -> WorkerDevice | None:
    """With a cluster that answers `says`; None: it must not be asked."""

    def ask(resources):
        assert says is not None, "asked for a node"
        assert resources["GPU"] == (options.gpus_per_worker or 1.0)
        return says

    return choose_device(options, {"CPU": 1.0}, ask=ask, **more)


def test_a_persons_word_comes_first(cluster, heavy):
    cluster(4)
    assert choose(replace(heavy, device="cpu")) == WorkerDevice(0.0, "--device cpu")
    assert choose(replace(heavy, gpus_per_worker=0)) == WorkerDevice(0.0, "--gpus-per-worker 0")
    assert choose(replace(OPTIONS, gpus_per_worker=0.5)) == WorkerDevice(0.5, "--gpus-per-worker 0.5")
    assert choose(replace(OPTIONS, device="gpu", gpus_per_worker=2)) == WorkerDevice(2, "--device gpu")
    cluster(0)
    assert choose(replace(heavy, device="cpu")).gpus == 0


def test_then_gpus_that_are_there(cluster):
    cluster(4)
    assert str(choose(OPTIONS)) == "gpu, because the cluster at head:6379 has 4 GPUs"
    cluster(1)
    assert str(choose(replace(OPTIONS, ray_address=None))) == "gpu, because this machine has 1 GPU"


def test_then_gpus_that_may_come(cluster, heavy):
    for options in (OPTIONS, heavy):
        assert choose(options, MAY_COME) == WorkerDevice(1.0, "node type gpu-spot may come", 12)
    assert choose(OPTIONS, replace(MAY_COME, most=None)).to_come == AUTO_WORKERS_TO_COME
    assert choose(replace(OPTIONS, gpus_per_worker=0.25), MAY_COME).gpus == 0.25


def test_else_cpus_with_the_reason(cluster, caplog):
    assert str(choose(OPTIONS, NEVER)) == (
        "cpu, because the cluster at head:6379 has no GPU, and the cluster has no autoscaler that could start one"
    )
    with caplog.at_level(logging.WARNING):
        assert choose(OPTIONS, UNKNOWN).gpus == 0
    assert "--device gpu" in caplog.text


@pytest.mark.parametrize("says", [NEVER, UNKNOWN])
def test_a_model_that_needs_a_gpu_stops_with_two_ways_out(cluster, heavy, says):
    with pytest.raises(InputError) as stopped:
        choose(heavy, says)
    for words in (heavy.model, "--device cpu", "--ray-address", says.why):
        assert words in str(stopped.value)


def test_asking_for_gpus_that_cannot_come_is_an_error_and_for_those_that_might_a_wait(cluster, caplog):
    for options, words in (
        (replace(OPTIONS, device="gpu"), "--device gpu"),
        (replace(OPTIONS, gpus_per_worker=0.5), "--gpus-per-worker 0.5"),
    ):
        with pytest.raises(InputError, match=f"{words}: the cluster at head:6379 has no GPU"):
            choose(options, NEVER)
        assert choose(options, UNKNOWN).gpus == (options.gpus_per_worker or 1)
        assert "waiting" in caplog.text
        assert choose(options, MAY_COME).to_come == 12


def test_no_node_is_started_to_answer_a_question_that_a_finished_job_asks(cluster, heavy):
    for options in (OPTIONS, heavy, replace(OPTIONS, device="gpu")):
        assert choose(options, has_work=lambda: False) is None


def test_packaged_models_and_small_pipelines_do_without_a_gpu(monkeypatch):
    assert not any(needs_gpu(m) for m in ("default", "baseline", "python:a:b"))
    monkeypatch.setattr(generator, "CPU_WEIGHTS_BYTES", 10 * 2**20)
    assert needs_gpu("baseline")
    assert not needs_gpu("default")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"device": "cpu", "gpus_per_worker": 1.0},
            "--device cpu and --gpus-per-worker 1 exclude each other",
        ),
        (
            {"device": "gpu", "gpus_per_worker": 0.0},
            "--device gpu and --gpus-per-worker 0 exclude each other",
        ),
        ({"gpus_per_worker": -1.0}, "--gpus-per-worker -1"),
        ({"gpus_per_worker": 1.5}, "--gpus-per-worker 1.5"),
        ({"resources": ("GPU=1",)}, "--resources GPU=1: give --gpus-per-worker"),
        ({"cpus_per_worker": 0.0, "device": "cpu"}, "--cpus-per-worker 0"),
        ({"cpus_per_worker": 0.0}, "--cpus-per-worker 0"),
        ({"cpus_per_worker": -1.0, "device": "gpu"}, "--cpus-per-worker -1"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, changes, words):
    (tmp_path / "p.txt").write_text("a red cat\n")
    options = replace(OPTIONS, prompts=(str(tmp_path / "p.txt"),), **changes)
    with pytest.raises(InputError) as refused:
        validate(options)
    assert words in str(refused.value)


def test_a_request_is_decided_once_and_said_once(cluster, monkeypatch, caplog):
    asked = []

    def choose_once(options, resources, *, has_work):
        asked.append(resources)
        return WorkerDevice(1.0, "node type gpu-spot may come", 12) if has_work() else None

    rooms = iter((0, 5))
    monkeypatch.setattr(job_set_up, "choose_device", choose_once)
    monkeypatch.setattr(ray_cluster, "room", lambda resources: next(rooms))
    request = WorkerRequest(replace(OPTIONS, resources=("spot=1",)))
    with caplog.at_level(logging.INFO):
        nothing = request.decide(lambda: False)
        assert (nothing.min_workers, nothing.gpus_per_worker) == (0, 0)
        assert "device" not in caplog.text
        first, second = request.decide(), request.decide()
    assert len(asked) == 2
    assert asked[1] == {"CPU": 1.0, "spot": 1.0}
    assert caplog.text.count("device: gpu, because node type gpu-spot may come") == 1
    assert (first.max_workers, first.gpus_per_worker, first.at_once) == (12, 1.0, 0)
    assert second.at_once == 5
