"""What options become, once; and what is refused before anything starts."""

import dataclasses
from dataclasses import replace

import pytest

from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.options.rates import RateOptions
from millijoule.jobs.set_up.options import GenerateOptions
from millijoule.jobs.set_up.request import request_of
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import PACKAGED


@pytest.fixture
def options(tmp_path):
    (tmp_path / "p.txt").write_text("a red cat\n")
    (tmp_path / "q.txt").write_text("a blue car\n")
    return GenerateOptions(
        prompts=(str(tmp_path / "*.txt"),), output=str(tmp_path / "out"), model="python:support.models:plain"
    )


def test_prompts_are_expanded_and_the_model_is_identified_once(options, tmp_path):
    request = request_of(options)
    assert [file.url for file in request.files] == [str(tmp_path / "p.txt"), str(tmp_path / "q.txt")]
    (tmp_path / "r.txt").write_text("too late\n")
    assert len(request.files) == 2
    assert request.identity.name == options.model
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.options = options


def test_texts_are_read_into_values(options):
    read = request_of(
        replace(options, workers="0:8", resources=("spot=1", "disk=0.5"), shard_size="60s", delimiter="tab")
    )
    assert (read.bounds, read.resources) == ((0, 8), {"spot": 1.0, "disk": 0.5})
    assert (read.shard_seconds, read.plan.shard_size) == (60.0, 256)
    assert read.plan.delimiter == "\t"
    plain = request_of(replace(options, workers="4", shard_size="12"))
    assert (plain.bounds, plain.shard_seconds, plain.plan.shard_size) == ((4, 4), None, 12)
    assert request_of(options).bounds is None
    rates = RateOptions(price_per_kwh="0.3", gco2_per_kwh="400", pue=1.2)
    caps = request_of(
        replace(options, max_cost=5, max_gco2=9, deadline="2030-01-01T00:00Z", rates=rates)
    ).caps
    assert (caps.max_kwh, caps.max_cost, caps.max_gco2, caps.pue) == (None, 5, 9, 1.2)
    assert (caps.deadline_unix, caps.price.at(0)) == (1893456000.0, 0.3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": "8:2"}, "--workers 8:2"),
        ({"workers": "0"}, "--workers 0"),
        ({"shard_size": "many"}, "--shard-size many"),
        ({"shard_size": "0"}, "--shard-size 0"),
        ({"shard_size": "0s"}, "--shard-size 0s"),
        ({"images_per_prompt": 0}, "--images-per-prompt 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
        ({"model_options": ModelOptions(batch_size=0)}, "--batch-size 0"),
        ({"lease_seconds": 0.5}, "--lease-seconds 0.5"),
        ({"lease_seconds": float("nan")}, "--lease-seconds nan"),
        ({"max_prompt_chars": 0}, "--max-prompt-chars 0"),
        ({"cpus_per_worker": float("nan")}, "--cpus-per-worker nan"),
        ({"cpus_per_worker": 0.00001}, "--cpus-per-worker 1e-05"),
        ({"gpus_per_worker": 0.00001}, "--gpus-per-worker 1e-05"),
        ({"gpus_per_worker": float("nan")}, "--gpus-per-worker nan"),
        ({"resources": ("spot=nan",)}, "--resources spot=nan"),
        ({"resources": ("memory=100",)}, "--resources memory=100"),
        ({"resources": ("spot",)}, "--resources spot"),
        ({"resources": ("spot=-1",)}, "--resources spot=-1"),
        ({"resources": ("spot=0.00001",)}, "--resources spot=0.00001"),
        ({"delimiter": "dot"}, "--delimiter dot: one character, or comma"),
        ({"prompts": ("nowhere.csv",)}, "nowhere.csv"),
        ({"node_meter": "ipmi", "telemetry": False}, "--node-meter and --no-telemetry"),
        ({"max_cost": 5.0}, "--max-cost needs --price-per-kwh"),
        ({"max_gco2": 5.0}, "--max-gco2 needs --gco2-per-kwh"),
        ({"max_kwh": -1.0}, "--max-kwh -1.0"),
        ({"rates": RateOptions(pue=0.5)}, "--pue 0.5"),
        ({"deadline": "tomorrow"}, "--deadline tomorrow"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(options, changes, words):
    with pytest.raises(InputError) as refused:
        request_of(replace(options, **changes))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x80\x04\x95pickle", "pickled checkpoint"), (b"short", "not a safetensors"), (None, "no such file")],
)
def test_a_model_file_that_is_not_safetensors_is_refused(options, tmp_path, content, words):
    model = tmp_path / "model.pt"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        request_of(replace(options, model=str(model)))
    assert str(model) in str(refused.value)


def test_the_words_of_delimiters(options):
    def delimiter(text):
        return request_of(replace(options, delimiter=text)).plan.delimiter

    found = [delimiter(t) for t in (None, ";", "semicolon", "Tab", "\\t", "pipe", "comma", "\t")]
    assert found == [None, ";", ";", "\t", "\t", "|", ",", "\t"]


BASELINE = str(PACKAGED["baseline"])


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({}, 1),
        ({"gpus_per_worker": 0.5}, 1),
        ({"gpus_per_worker": 2}, 2),
        ({"gpus_per_worker": 2, "ranks_per_worker": 1}, 1),
        ({"ranks_per_worker": 3}, 3),
        ({"ranks_per_worker": 2, "cpus_per_worker": 2, "device": "cpu"}, 2),
    ],
)
def test_a_worker_has_a_rank_per_gpu_unless_told_otherwise(options, changes, ranks):
    request = request_of(replace(options, model=BASELINE, **changes))
    assert request.model.ranks == ranks
    assert "ranks" not in request.model.identity()  # a job may go on with another number


def test_a_factory_has_its_gpus_for_itself(options):
    assert request_of(replace(options, gpus_per_worker=2)).model.ranks == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks_per_worker": 0}, "--ranks-per-worker 0: at least 1"),
        ({"ranks_per_worker": 2, "gpus_per_worker": 0.5}, "each rank has one GPU of its own"),
        ({"ranks_per_worker": 2, "gpus_per_worker": 4}, "give the same number"),
        ({"ranks_per_worker": 2, "device": "cpu"}, "on CPUs each rank needs one; give --cpus-per-worker 2"),
        ({"ranks_per_worker": 2, "model": "default"}, "default is not a diffusion pipeline"),
        ({"gpus_per_worker": 2, "model": "default"}, "default is not a diffusion pipeline"),
        ({"ranks_per_worker": 2, "model": "python:support.models:plain"}, "is not a diffusion pipeline"),
        (
            {"ranks_per_worker": 2, "model_options": ModelOptions(engine="compile")},
            "--ranks-per-worker 2: not together with --engine compile",
        ),
        (
            {"ranks_per_worker": 2, "model_options": ModelOptions(offload_weights=True)},
            "not together with --offload-weights",
        ),
        (
            {"ranks_per_worker": 2, "model_options": ModelOptions(quantize="int8")},
            "not together with --quantize",
        ),
    ],
)
def test_ranks_that_cannot_be_are_refused_by_name(options, changes, words):
    with pytest.raises(InputError, match=words):
        request_of(replace(options, **({"model": BASELINE} | changes)))
