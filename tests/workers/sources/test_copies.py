"""A worker comes to the driver's files: where they lie, else from the job's output or the bucket, and never to others."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.tiny_pipelines import tiny_pipeline

from millijoule.workers.errors import NodeError
from millijoule.workers.generators.options import GeneratorOptions, LoraChoice, ModelPart
from millijoule.workers.generators.registry import describe_model
from millijoule.workers.sources.copies import at_hand, copy_key, put_copy
from millijoule.workers.sources.obtain import obtain_model
from millijoule.workers.storage.open import open_store

pytest.importorskip("diffusers")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from support.stand_in_hub import StandInHub

    with StandInHub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        hub.add("someone/small", tiny_pipeline("sd15"))
        yield hub


@pytest.fixture
def obtained(hub):
    return obtain_model("someone/small")


def on_another_node(tmp_path):
    """The driver's disk is not there."""
    shutil.move(tmp_path / "home", tmp_path / "elsewhere")


def test_what_the_node_sees_is_used_where_it_lies(obtained, hub):
    hub.requests.clear()
    model, options = at_hand(obtained.model, obtained.options, obtained.copies)
    assert (model, options) == (obtained.model, obtained.options)
    assert hub.requests == []


def test_what_it_does_not_see_comes_from_the_jobs_output_and_not_from_the_hub(obtained, hub, tmp_path):
    store = open_store(str(tmp_path / "out"))
    copies = tuple(replace(put_copy(store, c), cache=str(tmp_path / "cache")) for c in obtained.copies)
    hub.requests.clear()
    on_another_node(tmp_path)
    copies = pickle.loads(pickle.dumps(copies))  # as Ray sends them
    model, options = at_hand(obtained.model, obtained.options, copies)
    assert Path(model).is_relative_to(tmp_path / "cache")
    assert describe_model(model, options) == obtained.identity
    assert hub.requests == []


def test_the_output_has_the_files_once_however_often_the_job_resumes(obtained, tmp_path):
    store = open_store(str(tmp_path / "out"))
    (copy,) = obtained.copies
    put_copy(store, copy)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert put_copy(store, copy).url == f"{tmp_path}/out/{copy_key(copy.files)}"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert len(before) == len(copy.files)


def test_a_node_that_can_neither_see_nor_fetch_is_at_fault(obtained, tmp_path):
    on_another_node(tmp_path)
    with pytest.raises(NodeError, match="does not have the files that the job was planned with"):
        at_hand(obtained.model, obtained.options, obtained.copies)


def test_parts_follow_their_files(tmp_path):
    folder = shutil.copytree(tiny_pipeline("sd15"), tmp_path / "home" / "sd15")
    options = GeneratorOptions(vae=ModelPart(str(folder / "vae")))
    got = obtain_model(str(tiny_pipeline("sd15")), options)
    store = open_store(str(tmp_path / "out"))
    copies = tuple(replace(put_copy(store, c), cache=str(tmp_path / "cache")) for c in got.copies)
    on_another_node(tmp_path)
    model, there = at_hand(got.model, got.options, copies)
    assert model == got.model  # a folder that the user named is every node's own affair
    assert Path(there.vae.path).is_relative_to(tmp_path / "cache")
    assert there.identity() == got.options.identity()


def test_other_content_under_the_same_path_is_not_taken(tmp_path):
    folder = shutil.copytree(tiny_pipeline("sd15") / "vae", tmp_path / "vae")
    got = obtain_model(str(tiny_pipeline("sd15")), GeneratorOptions(vae=ModelPart(str(folder))))
    weights = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(NodeError, match="does not have the files"):
        at_hand(got.model, got.options, got.copies)


def test_a_path_that_only_begins_alike_is_left_alone(obtained):
    options = replace(obtained.options, loras=(LoraChoice(f"{obtained.copies[0].path}-other/x.safetensors"),))
    assert at_hand("m", options, obtained.copies)[1].loras == options.loras
