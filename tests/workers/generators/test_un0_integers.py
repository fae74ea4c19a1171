"""Un-0 models in integers: chosen by their pixels when converted, the same bits in every form, and near those of real numbers."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.un0_checkpoints import CIFAR, publish, random_model

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE
from millijoule.kernels import native_library
from millijoule.kernels.phase import TURN
from millijoule.workers.errors import InputError
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.generators.un0 import Un0Generator
from millijoule.workers.generators.un0_checkpoint import Un0Architecture, canonical
from millijoule.workers.generators.un0_integers import (
    choose_integers,
    features_of,
)
from millijoule.workers.schemas import ImageRequest


def converted(folder, flavour="cifar10", *options, model=None, **more):
    """The file that the real command makes."""
    source, target = publish(folder / "p.pt", flavour, model=model, **more), folder / "m.safetensors"
    assert convert.main([str(source), str(target), "--force", *options]) == COMPLETE
    return target


@pytest.fixture(scope="module", params=["cifar10", "cifar10 mup absolute", "cifar10 sin", "imagenet64"])
def file(request, tmp_path_factory):
    return converted(tmp_path_factory.mktemp("un0"), request.param)


def requests(count, **more):
    prompts = [str(i % 10) if i % 5 else "" for i in range(count)]
    return [ImageRequest(f"p{i}", 0, p, seed=2**63 + 7919 * i, **more) for i, p in enumerate(prompts)]


def said_by(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_pixels_are_within_two_levels_of_floating_point(file):
    assert "integers" in said_by(file)
    integers = load_generator(str(file)).generate(requests(40)).images
    floats = Un0Generator.load(file, integers=False).generate(requests(40)).images
    difference = np.abs(integers.astype(int) - floats)
    assert (difference <= 2).mean() >= 0.999
    assert 0 < difference.max() <= 6
    assert floats.std() > 5


@pytest.mark.parametrize("form", native_library.CHOICES)
def test_every_form_draws_the_same_bits(file, form):
    if form not in ("reference", *native_library.forms_here()):
        pytest.skip(f"{form} does not run here")
    expected = load_generator(str(file)).generate(requests(5)).images
    with native_library.only(form):
        generator = load_generator(str(file))
    assert np.array_equal(generator.generate(requests(5)).images, expected)


def test_an_image_does_not_depend_on_its_batch_or_on_threads(file):
    generator = load_generator(str(file))
    whole = generator.generate(requests(29)).images
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert np.array_equal(generator.generate(requests(29)).images, whole)
    finally:
        torch.set_num_threads(before)
    parts = [generator.generate(requests(29)[i : i + 7]).images for i in range(0, 29, 7)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_engines_run_it(file):
    engine = load_generator(str(file)).engine
    assert engine.name == "deepspeed"
    assert [m.name for m in engine.report.modules] == ["dynamics", "decoder"]
    assert "dynamics contained, integers" in engine.report.words()


def test_more_steps_run_over_the_same_time(file):
    integers = load_generator(str(file)).generate(requests(8, num_inference_steps=17)).images
    floats = Un0Generator.load(file, integers=False).generate(requests(8, num_inference_steps=17)).images
    assert (np.abs(integers.astype(int) - floats) <= 2).mean() >= 0.998


@pytest.mark.parametrize(
    ("flavour", "options", "words"),
    [
        ("cifar10", ["--form", "float"], "as asked for"),
        ("cifar10 rk4", [], "Euler"),
        ("cifar10 raw", [], "phases as such"),
    ],
)
def test_a_model_that_stays_in_floating_point_says_why(tmp_path, capsys, flavour, options, words):
    file = converted(tmp_path, flavour, *options)
    assert words in capsys.readouterr().out
    assert "integers" not in said_by(file)
    drawn = load_generator(str(file)).generate(requests(3)).images
    assert np.array_equal(drawn, Un0Generator.load(file, integers=False).generate(requests(3)).images)


def test_a_machine_without_a_compiler_is_told(file, caplog, monkeypatch):
    monkeypatch.setattr("millijoule.workers.generators.un0_integers.usual_form", lambda: None)
    load_generator(str(file))
    assert "install a C++ compiler" in caplog.text


def test_a_coupling_that_integers_harm_stays_in_floating_point(tmp_path, capsys):
    model = random_model(CIFAR, 10, 3)
    model["dynamics._orig_mod.K"] *= 30  # chaos: the smallest difference grows
    file = converted(tmp_path, model=model)
    assert "99.95 % are asked for" in capsys.readouterr().out
    assert "integers" not in said_by(file)


def test_the_fine_part_is_taken_where_eight_bits_are_not_enough(tmp_path):
    model = random_model(CIFAR, 10, 3)
    model["decoder._orig_mod.to_output.weight"] *= 1.6  # more contrast shows smaller differences
    said = json.loads(said_by(converted(tmp_path, model=model))["integers"])
    assert said["fine_every"] > 0
    assert said["near"] >= 0.9995


def test_what_is_converted_again_is_another_model(tmp_path):
    """So a job of floats cannot go on in integers: its fingerprint names the file's content."""
    one, other = (converted(tmp_path, "cifar10", *options) for options in ([], ["--form", "float"]))
    assert one == other
    floats = describe_model(str(other)).sha256
    assert describe_model(str(converted(tmp_path))).sha256 != floats


@pytest.mark.parametrize("relativization", ["absolute", "mean_relative", "ref_oscillator"])
def test_the_readout_is_that_of_the_angles(relativization):
    a = Un0Architecture(64, 1, 2, 3, "standard", relativization, "sin_cos", "euler", 10)
    phases = torch.randint(-300_000, 300_000, (3, 64), dtype=torch.int32)
    angles = phases.numpy() * (2 * np.pi / TURN)
    angles -= {
        "absolute": 0,
        "mean_relative": angles.mean(1, keepdims=True),
        "ref_oscillator": angles[:, :1],
    }[relativization]
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1).reshape(3, 8, 4, 4)
    assert np.abs(features_of(phases, a).numpy() / 2047 - expected).max() < 0.002


def test_steps_that_integers_cannot_take_are_drawn_in_floating_point(tmp_path, caplog):
    model = random_model(CIFAR, 10, 3)
    model["dynamics._orig_mod.omega"].fill_(2e5)
    with torch.inference_mode():
        architecture = Un0Architecture(48, 8, 10, 3, "standard", "ref_oscillator", "sin_cos", "euler", 10)
        with pytest.raises(ValueError, match="turns"):
            choose_integers(architecture, canonical(model), lambda classes, seeds: np.zeros((64, 32, 32, 3)))
    file = converted(tmp_path)
    generator, floats = load_generator(str(file)), Un0Generator.load(file, integers=False)
    generator._integers._dynamics.forward = _too_long
    assert np.array_equal(generator.generate(requests(3)).images, floats.generate(requests(3)).images)
    assert "10 steps are drawn in floating point" in caplog.text


def _too_long(*_):
    from millijoule.kernels.dense_coupling import StepsTooLong

    raise StepsTooLong("a test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranges": [1.0]}, "1 activation ranges for 7 layers"),
        ({"ranges": [0.0] * 6}, "activation range 0.0"),
        ({"ranges": "many"}, "ranges"),
        ({"fine_every": -1}, "fine_every"),
        ({"fine_every": None}, "fine_every"),
    ],
)
def test_integers_of_a_damaged_file_are_refused(tmp_path, change, words):
    file = converted(tmp_path)
    metadata = said_by(file)
    metadata["integers"] = json.dumps(json.loads(metadata["integers"]) | change)
    save_file(load_file(file), file, metadata)
    with pytest.raises(InputError, match=words) as refused:
        load_generator(str(file))
    assert str(file) in str(refused.value)


def test_weights_that_no_longer_fit_their_integers_are_refused(tmp_path):
    file = converted(tmp_path)
    tensors, metadata = load_file(file), said_by(file)
    tensors["decoder._orig_mod.cascade.1.net.3.bias"].fill_(1e20)
    save_file(tensors, file, metadata)
    with pytest.raises(InputError, match="a bias of"):
        load_generator(str(file))
