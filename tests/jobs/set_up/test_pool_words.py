"""What `--pool` means, and what is refused before anything starts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.pool_words import (
    PoolWords,
    parse_pool,
    pool_gpus,
    pools_identity,
    read_pools,
    with_models,
)
from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import ModelIdentity
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.sources.obtain import ObtainedModel

OPTIONS = GenerateOptions(prompts=("p.txt",), output="out")
ACCELERATOR, MARKET = "ray.io/accelerator-type", "ray.io/market-type"


def test_a_pool_has_labels_bounds_and_what_its_workers_are():
    text = f"l4:{ACCELERATOR}=L4,{MARKET}=spot|on-demand:workers=0:8:batch=16:engine=compile:gpus=0.5:cpus=2:price=0.3"
    selectors = ({ACCELERATOR: "L4", MARKET: "spot"}, {ACCELERATOR: "L4", MARKET: "on-demand"})
    assert parse_pool(text) == PoolWords("l4", selectors, 0, 8, 16, "compile", gpus=0.5, cpus=2.0, price=0.3)
    assert parse_pool("cpu::workers=4") == PoolWords("cpu", (), 4, 4)
    assert parse_pool("a:x=y:price=1:workers=2:3:joules=7") == PoolWords(
        "a", ({"x": "y"},), 2, 3, price=1.0, joules=7.0
    )


def test_a_pool_that_names_an_accelerator_has_a_gpu_for_each_worker():
    assert pool_gpus(parse_pool(f"l4:{ACCELERATOR}=L4:workers=1"), OPTIONS) == 1.0
    assert pool_gpus(parse_pool(f"l4:{ACCELERATOR}=L4:workers=1:gpus=0.5"), OPTIONS) == 0.5
    assert pool_gpus(parse_pool("cpu::workers=1"), OPTIONS) == 0.0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("L4:a=b:workers=1", "'L4' is no name: at most 40 small letters"),
        ("a" * 41 + "::workers=1", "at most 40 small letters"),
        ("a-::workers=1", "the last no -"),
        ("a::workers=0:1000000000", "at most nine digits"),
        ("a::workers=1:batch=1000000000", "from 1 to 999999999"),
        ("l4", "workers=MIN:MAX is missing"),
        ("l4:a=b:workers=8:2", "workers=8:2 is empty"),
        ("l4:a=b:workers=many", "workers is a number"),
        ("l4:a:workers=1", "'a' is no label=value"),
        ("l4:a=b,a=c:workers=1", "the label a stands twice"),
        ("l4:a=!in(x):workers=1", "no label=value"),
        ("l4:a=b:workers=1:gpus=2", "one GPU or a part of one"),
        ("l4:a=b:workers=1:gpus=0.00001", "the least that Ray counts"),
        ("l4:a=b:workers=1:joules=0", "joules=0 is no amount"),
        ("l4:a=b:workers=1:images_per_s=0", "images_per_s=0 is no amount"),
        ("l4:a=b:workers=1:cpus=0.00001", "the least that Ray counts"),
        ("l4:a=b:workers=1:engine=fast", "engine=fast is none of deepspeed, compile, eager"),
        ("l4:a=b:workers=1:batch=0", "batch=0"),
        ("l4:a=b:workers=1:batch=" + "9" * 5000, "is no number of images"),
        ("l4:a=b:workers=1:" + "9" * 5000, "workers is a number"),
        ("l4:workers=0:8", "'workers=0' stands where labels do; without any it is l4::workers=0"),
        ("l4:a=b:workers=1:optimize=", "optimize= names no preset"),
        ("l4:a=b:workers=1:price=free", "price=free"),
        ("l4:a=b:workers=1:colour=red", "'colour=red' is none of its parts"),
        ("l4:a=b:workers=1:workers=2", "workers stands twice"),
    ],
)
def test_a_pool_that_means_nothing_is_refused_by_its_part(text, words):
    with pytest.raises(InputError) as raised:
        parse_pool(text)
    assert f"--pool {text}" in str(raised.value)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefer": "energy"}, "needs --pool"),
        ({"pool": ("a:x=y:workers=1", "a:x=z:workers=1")}, "two pools have this name"),
        ({"pool": ("a:x=y:workers=1",), "workers": "3"}, "--pool and --workers exclude"),
        ({"pool": ("a:x=y:workers=1",), "device": "gpu"}, "--pool and --device exclude"),
        ({"pool": ("a:x=y:workers=1",), "prefer": "cost"}, "--pool a has no price=X"),
        ({"pool": ("a:x=y:workers=1:cpus=0",)}, "needs a CPU or a GPU"),
    ],
)
def test_options_that_contradict_pools_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        read_pools(replace(OPTIONS, **changes))


PIPELINE = ObtainedModel("python:nobody:loads", ModelOptions().read(), ModelIdentity("m", "0" * 64))


def identity(*texts, **job):
    """Of pools with these words in a job whose model options are `job`."""
    options = replace(OPTIONS, model_options=ModelOptions(**job))
    source = replace(PIPELINE, options=options.model_options.read())
    return pools_identity(with_models(tuple(map(parse_pool, texts)), options, source), source.options)


def test_engines_tell_jobs_apart_only_where_a_pool_has_another_one():
    assert identity("a::workers=1", "b::workers=1:engine=deepspeed", "c::workers=1:batch=3") == {}
    assert identity("a::workers=1:engine=eager", "b::workers=1") == {"pool_engines": ["deepspeed", "eager"]}


@pytest.fixture
def presets(monkeypatch):
    """Presets without a model's files: "lossless" is half precision, and any other has fewer steps."""

    def with_rungs(obtained, model, optimize, switches, *, on_gpu):
        if optimize == "gpu-only" and not on_gpu:
            raise InputError("--quantize fp8: needs a GPU")
        rungs = {"lossless": Rungs(precision="half"), "none": Rungs()}.get(optimize, Rungs(steps=9))
        return replace(obtained, options=replace(obtained.options, rungs=replace(rungs, **switches)))

    monkeypatch.setattr("millijoule.jobs.set_up.model_rungs.with_rungs", with_rungs)


@pytest.mark.usefixtures("presets")
def test_presets_of_pools_tell_jobs_apart_and_switches_of_the_job_hold_in_all():
    half, fewer = {"precision": "half"}, {"steps": 9}
    two = ("a::workers=1:optimize=lossless", "b::workers=1:optimize=balanced")
    assert identity(*two) == {"pool_rungs": [half, fewer]}
    assert identity(*two[::-1]) == identity(*two)
    assert identity("a::workers=1", two[0]) == {"pool_rungs": [half, {}]}
    switched = identity("a::workers=1:optimize=none", two[1], channels_last=True)
    assert switched["pool_rungs"] == [{"channels_last": True, **fewer}, {"channels_last": True}]
    with pytest.raises(InputError, match="--pool a: optimize=gpu-only: --quantize fp8: needs a GPU"):
        identity("a::workers=1:optimize=gpu-only")
    assert identity(f"a:{ACCELERATOR}=L4:workers=1:optimize=gpu-only") == {"pool_rungs": [fewer]}


@pytest.mark.usefixtures("presets")
def test_a_pool_without_a_preset_runs_as_the_job_does():
    options = replace(OPTIONS, model_options=ModelOptions(optimize="lossless"))
    source = replace(PIPELINE, options=replace(options.model_options.read(), rungs=Rungs(precision="half")))
    pools = map(parse_pool, ("a::workers=1", "b::workers=1:optimize=none", "c::workers=1:batch=2"))
    models = [pool.model for pool in with_models(tuple(pools), options, source)]
    assert models[0] is None
    assert models[1].rungs == Rungs()
    assert (models[2].rungs, models[2].batch_size) == (Rungs(precision="half"), 2)
