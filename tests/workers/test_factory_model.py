"""Two versions of one factory, which state different weights, do not make one job."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support import models
from support.local_job import plan

from millijoule.pipeline.output.job import open_epoch
from millijoule.workers import actor
from millijoule.workers.errors import NodeError
from millijoule.workers.generators.registry import describe_model
from millijoule.workers.lease import WorkerConfig
from millijoule.workers.meters.meter import open_meter

MODEL = "python:support.models:plain"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(name, sha256)`: a worker of one job, on a node whose factory states `sha256`."""
    context = SimpleNamespace(get_accelerator_ids=dict, get_node_id=lambda: "node")
    monkeypatch.setattr(actor.ray, "get_runtime_context", lambda: context)
    none = {"powercap_root": tmp_path / "none", "boot_id": "b", "book_directory": tmp_path}
    monkeypatch.setattr(actor, "open_meter", lambda gpus: open_meter(gpus, **none))
    store, job = plan(tmp_path, ["a", "b"])
    config = WorkerConfig(
        store.url,
        job.fingerprint,
        job.job_seed,
        job.output_format,
        MODEL,
        describe_model(MODEL).sha256,
        open_epoch(store, exclusive=True),
    )
    workers = []

    def begin(name, sha256, **more):
        made = models.Plain("cpu")
        made.info = replace(made.info, sha256=sha256)
        monkeypatch.setattr(models, "plain", lambda device: made)
        workers.append(actor.ShardWorker(name, replace(config, **more)))
        return workers[-1].start()

    yield begin
    for worker in workers:
        worker.stop()


@pytest.mark.parametrize("exclusively", [True, False])
def test_a_factory_that_states_other_weights_than_the_job_began_with_is_refused(start, exclusively):
    start("w1", "1" * 64, commits_exclusively=exclusively)
    start("w2", "1" * 64, commits_exclusively=exclusively)
    with pytest.raises(NodeError, match=r"states SHA-256 2{16} here, .* began with 1{16}"):
        start("w3", "2" * 64, commits_exclusively=exclusively)
    start("w4", "1" * 64, commits_exclusively=exclusively)
