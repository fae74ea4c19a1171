"""A job's model from the hub: settled before anything starts, kept when the job resumes, in reach of every node."""

import shutil
from dataclasses import replace

import pytest
from support.stand_in_hub import StandInHub
from support.tiny_pipelines import tiny_pipeline

from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.job import begin, open_or_plan, within_reach
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.ray_cluster import Cluster
from millijoule.jobs.set_up.request import request_of
from millijoule.workers.errors import InputError
from millijoule.workers.storage.open import open_store

pytest.importorskip("diffusers")

ID = "someone/small"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with StandInHub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        hub.add(ID, tiny_pipeline("sd15"))
        yield hub


@pytest.fixture
def options(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\n")
    return GenerateOptions(prompts=(str(tmp_path / "p.txt"),), output=str(tmp_path / "out"), model=ID)


def test_a_job_goes_on_with_the_commit_it_began_with(hub, options, tmp_path):
    store = open_store(options.output)
    first = hub.repositories[ID].commit
    job = begin(store, open_or_plan(request_of(options), store, None)).job
    assert (job.model, job.model_revision) == (ID, first)
    hub.add(ID, shutil.copytree(tiny_pipeline("lcm"), tmp_path / "newer"))
    hub.requests.clear()
    assert open_or_plan(request_of(options), store, job).job == job
    assert hub.requests == []
    moved = replace(options, model_options=ModelOptions(revision="main"))
    with pytest.raises(InputError, match="this folder holds another job"):
        open_or_plan(request_of(moved), store, job)


def test_the_same_content_from_a_folder_goes_on_with_the_job(hub, options):
    store = open_store(options.output)
    job = open_or_plan(request_of(options), store, None).job
    folder = replace(options, model=str(tiny_pipeline("sd15")))
    assert open_or_plan(request_of(folder), store, job).job == job


def test_prompts_that_are_not_there_are_said_before_the_hub_is_asked(hub, options):
    with pytest.raises(InputError, match="no prompt file matches"):
        request_of(replace(options, prompts=("nothing.txt",)))
    assert hub.requests == []


def test_only_a_cluster_that_was_joined_gets_the_files(hub, options, tmp_path):
    source, store = request_of(options).source, open_store(options.output)
    assert within_reach(source, store, Cluster("this machine", own=True)) == source
    assert list(store.list()) == []
    (copy,) = within_reach(source, store, Cluster("a cluster", own=False)).copies
    assert copy.url.startswith(f"{tmp_path}/out/_job/model/")
    assert {i.key.rpartition("/")[2] for i in store.list()} >= {"model_index.json", "config.json"}


def test_options_of_pipelines_are_refused_for_other_models(options):
    for name, value in {
        "lora": ("x",),
        "scheduler": "DDIMScheduler",
        "variant": "fp16",
        "config": "x",
    }.items():
        asked = replace(options, model="default", model_options=ModelOptions(**{name: value}))
        with pytest.raises(InputError, match=f"--{name}"):
            request_of(asked)
