"""GPU or CPU: the table of who decides, and that nobody runs on CPUs without being told."""

import logging
from dataclasses import replace

import pytest

from millijoule.jobs.set_up import ray_cluster
from millijoule.jobs.set_up.autoscaling import Prospect
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import request_of
from millijoule.jobs.set_up.worker_device import (
    AUTO_WORKERS_TO_COME,
    WorkerDevice,
    choose_device,
    pool_options,
)
from millijoule.pipeline.running.demand import PoolOptions
from millijoule.workers.errors import InputError
from millijoule.workers.generators import registry as generator
from millijoule.workers.generators.registry import PACKAGED, needs_gpu

MAY_COME = Prospect(True, "node type gpu-spot may come", 12)
NEVER = Prospect(False, "the cluster has no autoscaler that could start one")
UNKNOWN = Prospect(None, "the cluster's autoscaler gave no answer")

HEAD = Cluster("the cluster at head:6379", own=False)

OPTIONS = GenerateOptions(prompts=(__file__,), output="out")


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


@pytest.fixture(autouse=True)
def _prompts(monkeypatch):
    """Whatever file is named has prompts: nothing here reads them."""
    monkeypatch.setattr("millijoule.jobs.set_up.request.expand_inputs", lambda prompts: [])


def choose(options, says: Prospect | None = None, cluster=HEAD, **more) -> WorkerDevice | None:
    """With a cluster that answers `says`; None: it must not be asked."""

    def ask(resources):
        assert says is not None, "asked for a node"
        assert resources["GPU"] == (options.gpus_per_worker or 1.0)
        return says

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("millijoule.jobs.set_up.worker_device.prospect", ask)
        return choose_device(request_of(options), cluster, **more)


def test_a_persons_word_comes_first(cluster, heavy):
    cluster(4)
    assert choose(replace(heavy, device="cpu")) == WorkerDevice(0.0, "--device cpu")
    assert choose(replace(heavy, gpus_per_worker=0)) == WorkerDevice(0.0, "--gpus-per-worker 0")
    assert choose(replace(OPTIONS, gpus_per_worker=0.5)) == WorkerDevice(0.5, "--gpus-per-worker 0.5")
    assert choose(replace(heavy, device="gpu", gpus_per_worker=2, ranks_per_worker=1)) == WorkerDevice(
        2, "--device gpu"
    )
    cluster(0)
    assert choose(replace(heavy, device="cpu")).gpus == 0


def test_then_gpus_that_are_there(cluster):
    cluster(4)
    assert str(choose(OPTIONS)) == "gpu, because the cluster at head:6379 has 4 GPUs"
    cluster(1)
    here = Cluster("this machine", own=True)
    assert str(choose(OPTIONS, cluster=here)) == "gpu, because this machine has 1 GPU"


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
def test_contradictions_are_refused_by_name(changes, words):
    with pytest.raises(InputError) as refused:
        request_of(replace(OPTIONS, **changes))
    assert words in str(refused.value)


def test_workers_are_as_many_as_fit_unless_somebody_says(monkeypatch, caplog):
    def pool(room, device, own=False, **changes):
        monkeypatch.setattr(ray_cluster, "room", lambda resources: room)
        request = request_of(replace(OPTIONS, resources=("spot=1",), **changes))
        return pool_options(request, device, Cluster("x", own))

    cpus, to_come = WorkerDevice(0.0, "because"), WorkerDevice(1.0, "because", 12)
    assert pool(5, cpus) == PoolOptions(0, 5, 1.0, 0.0, {"spot": 1.0}, at_once=5)
    assert pool(0, cpus).max_workers == 1
    with pytest.raises(InputError, match="no room for a worker that asks for 1 CPU and 1 spot"):
        pool(0, cpus, own=True)
    with caplog.at_level(logging.INFO):
        assert (pool(0, to_come).max_workers, pool(0, to_come).gpus_per_worker) == (12, 1.0)
    assert "up to 12 on nodes to come" in caplog.text
    assert pool(7, to_come, workers="2:4") == PoolOptions(2, 4, 1.0, 1.0, {"spot": 1.0}, at_once=7)
    nothing = pool(7, None)
    assert (nothing.min_workers, nothing.gpus_per_worker) == (0, 0.0)


def test_a_worker_of_several_ranks_asks_for_a_gpu_or_a_cpu_for_each(cluster, heavy):
    cluster(4)
    asked = replace(heavy, ranks_per_worker=2)
    assert choose(asked).gpus == 2.0
    cluster(0)
    light = replace(asked, device="auto", model=str(PACKAGED["baseline"]), cpus_per_worker=1.0)
    on_cpus = WorkerDevice(0.0, "there is no GPU")
    with pytest.raises(InputError, match="--ranks-per-worker 2: on CPUs each rank needs one"):
        pool_options(request_of(light), on_cpus, HEAD)
