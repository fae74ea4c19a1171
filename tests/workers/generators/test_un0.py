"""Published Un-0 checkpoints: converted without running their code, and drawn as their equations say.

The checkpoints are random and small, with the names, shapes and settings of the published ones. The reference is
written here in float64 with loops, from the equations alone.
"""

import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.un0_checkpoints import CIFAR, FLAVOURS, publish, random_model

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE, ERROR
from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.isolate import FittedGenerator, batch_limits
from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_settings
from millijoule.workers.generators.registry import describe_model, load_generator
from millijoule.workers.generators.un0 import NO_CLASS, ClassIndex, start_angles
from millijoule.workers.generators.un0_checkpoint import (
    CIFAR10_CLASSES,
    Un0Architecture,
    infer_architecture,
    read_checkpoint,
)
from millijoule.workers.schemas import ImageRequest


@pytest.fixture(scope="module", params=FLAVOURS)
def converted(request, tmp_path_factory):
    """(config, state dict, generator) of each flavour, through the real command."""
    folder = tmp_path_factory.mktemp("un0")
    config, classes, blocks = FLAVOURS[request.param]
    model = random_model(config, classes, blocks)
    source = publish(folder / "published.pt", request.param, model=model)
    target = folder / "model.safetensors"
    assert convert.main([str(source), str(target), "--form", "float"]) == COMPLETE
    return config, model, load_generator(str(target))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A CIFAR-like model's file."""
    folder = tmp_path_factory.mktemp("small")
    assert convert.main([str(publish(folder / "p.pt")), str(folder / "small.safetensors")]) == COMPLETE
    return folder / "small.safetensors"


def request(prompt, seed, **more):
    return ImageRequest(f"p{seed}", 0, prompt, seed, **more)


# The reference: SplitMix64, the equations, and the decoder, in float64 and loops.


def reference_start(seed, n):
    phases = []
    for i in range(n):
        z = (seed + (i // 4 + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        phases.append((z >> 16 * (i % 4)) % 65536 / 65536 * 2 * math.pi - math.pi)
    return np.array(phases)


def reference_phases(config, model, number, seed, steps, solver):
    p = {k.replace("_orig_mod.", "").split(".", 1)[1]: v.double().numpy() for k, v in model.items()}
    n, m = p["K"].shape[0], p["K_cond"].shape[0]
    mup = config.get("parameterization", "mup") == "mup"
    k_scale, m_scale = (n**-0.5, m**-0.5) if mup else (1.0, 1.0)

    def velocity(state):
        theta, phi = state[:n], state[n:]
        out = np.zeros(n + m)
        for i in range(n):
            out[i] = p["omega"][0, i]
            for j in range(n):
                if j != i:
                    out[i] += k_scale * p["K"][i, j] * math.sin(theta[j] - theta[i])
            if number != NO_CLASS:
                for k in range(m):
                    out[i] += m_scale * p["K_drive"][number, i, k] * math.sin(phi[k] - theta[i])
        for k in range(m):
            out[n + k] = p["omega_cond"][0, k]
            for other in range(m):
                if other != k:
                    out[n + k] += m_scale * p["K_cond"][k, other] * math.sin(phi[other] - phi[k])
        return out

    state, dt = reference_start(seed, n + m), 1.0 / steps
    for _ in range(steps):
        if solver == "euler":
            state = state + dt * velocity(state)
        else:
            k1 = velocity(state)
            k2 = velocity(state + dt * k1 / 3)
            k3 = velocity(state + dt * (k2 - k1 / 3))
            k4 = velocity(state + dt * (k1 - k2 + k3))
            state = state + dt * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return state[:n]


def reference_image(config, model, theta):
    p = {k.replace("_orig_mod.", ""): v.double() for k, v in model.items()}
    relative = config.get("relativization", "ref_oscillator")
    theta = theta - {"absolute": 0.0, "mean_relative": np.mean(theta), "ref_oscillator": theta[0]}[relative]
    encoded = {
        "raw": theta,
        "sin": np.sin(theta),
        "sin_cos": np.concatenate([np.sin(theta), np.cos(theta)]),
    }[config.get("encoding", "sin_cos")]
    x = torch.from_numpy(encoded).reshape(1, -1, 4, 4)
    block = 0
    while f"decoder.cascade.{block}.net.1.weight" in p:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        for place in (1, 3):
            name = f"decoder.cascade.{block}.net.{place}"
            x = F.conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], padding=1)
            x = torch.where(x > 0, x, 0.2 * x)
        block += 1
    x = F.conv2d(x, p["decoder.to_output.weight"], p["decoder.to_output.bias"], padding=1)
    return ((torch.tanh(x[0]).permute(1, 2, 0) + 1) * 127.5).round().numpy()


def test_phases_and_images_follow_the_equations(converted):
    config, model, generator = converted
    requests = [request("3", 11), request("class 9", 2**64 - 5), request("", 7)]
    imagenet = "n_oscillators" not in config
    steps, solver = (10, "euler") if imagenet else (config["num_steps"], config["solver"])
    assert generator.info.num_inference_steps == steps
    phases = generator.relax([3, 9, NO_CLASS], requests)
    assert phases.dtype == torch.float32
    images = generator.generate(requests).images
    assert images.shape == (3, *((64, 64) if imagenet else (32, 32)), 3)
    for i, (number, r) in enumerate(zip([3, 9, NO_CLASS], requests, strict=True)):
        expected = reference_phases(config, model, number, r.seed, steps, solver)
        assert np.abs(phases[i].numpy() - expected).max() < 1e-4
        image = reference_image(config, model, expected)
        assert np.abs(images[i] - image).max() <= 1
        assert image.std() > 5  # the comparison is not one of flat grey


def test_more_steps_run_over_the_same_time(converted):
    config, model, generator = converted
    solver = config.get("solver", "euler")
    phases = generator.relax([4], [request("4", 3, num_inference_steps=17)])
    expected = reference_phases(config, model, 4, 3, 17, solver)
    assert np.abs(phases[0].numpy() - expected).max() < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 7])
def test_an_image_does_not_depend_on_its_batch(converted, size):
    _, _, generator = converted
    requests = [request(str(i % 10), 2**63 + i * 7919) for i in range(18)]  # more than it sees at a time
    whole = generator.generate(requests).images
    parts = [generator.generate(requests[i : i + size]).images for i in range(0, 18, size)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(generator.generate(requests[::-1]).images[::-1], whole)


def test_an_image_does_not_depend_on_the_number_of_threads(tmp_path):
    config = {**CIFAR, "n_oscillators": 1024}
    publish(tmp_path / "p.pt", model=random_model(config, 10, 3), config=config)
    assert convert.main([str(tmp_path / "p.pt"), str(tmp_path / "m.safetensors")]) == COMPLETE
    generator = load_generator(str(tmp_path / "m.safetensors"))
    requests = [request(str(i % 10), i) for i in range(18)]
    before, images = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            images.append(generator.generate(requests).images)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])


def test_seed_and_class_decide_the_image(small):
    generator = load_generator(str(small))
    a, b, c, d = generator.generate(
        [request("cat", 1), request("3", 1), request("cat", 2), request("dog", 1)]
    ).images
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a, d)


def test_start_phases_are_uniform_over_the_circle():
    angles = start_angles(range(64), 1026)
    assert angles.shape == (64, 1026)
    assert angles.dtype == torch.float32
    assert -math.pi <= angles.min() < -3.1 < 3.1 < angles.max() < math.pi
    assert np.allclose(angles[5], reference_start(5, 1026), atol=1e-6)


def parameters_of(n, m, classes, blocks):
    shapes = {k: tuple(v.shape) for k, v in random_model({"n_oscillators": 16}, 1, blocks).items()}
    architecture = infer_architecture(
        {"parameterization": "standard"},
        {
            **shapes,
            "dynamics._orig_mod.K": (n, n),
            "dynamics._orig_mod.K_drive": (classes, n, m),
        },
    )
    return architecture.parameters


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    assert parameters_of(1024, 8, 10, 3) == 1_289_387
    assert parameters_of(4096, 8, 10, 3) == 19_434_123
    assert round(parameters_of(16384, 1, 1000, 4) / 1e6, 1) == 322.4


def test_the_file_keeps_names_values_and_config_as_published(small):
    config, classes, blocks = FLAVOURS["cifar10"]
    published = random_model(config, classes, blocks)
    kept = load_file(small)
    assert set(kept) == set(published)
    assert all(torch.equal(kept[k], published[k]) for k in kept)
    with safe_open(small, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "un0"
    assert json.loads(metadata["config"]) == config
    identity = describe_model(str(small))
    assert (identity.name, identity.sha256) == ("small", load_generator(str(small)).info.sha256)


def test_names_without_the_compiler_s_mark_work_too(tmp_path, small):
    config, classes, blocks = FLAVOURS["cifar10"]
    publish(tmp_path / "p.pt", model=random_model(config, classes, blocks, compiled=""))
    assert convert.main([str(tmp_path / "p.pt"), str(tmp_path / "m.safetensors")]) == COMPLETE
    one = [request("ship", 3)]
    assert np.array_equal(
        load_generator(str(tmp_path / "m.safetensors")).generate(one).images,
        load_generator(str(small)).generate(one).images,
    )


# Prompts


@pytest.mark.parametrize(
    ("prompt", "number"),
    [("7", 7), ("class 7", 7), (" Class  0 ", 0), ("frog", 6), ("Truck", 9), ("", NO_CLASS)],
)
def test_a_prompt_is_a_number_or_a_name(prompt, number):
    assert ClassIndex(10, CIFAR10_CLASSES).find(prompt) == number


@pytest.mark.parametrize("prompt", ["10", "class 99999", "-1", "zebra", "a red cat", "7.0", "9" * 400, "²"])
def test_anything_else_is_refused(prompt):
    with pytest.raises(InputError, match="this model"):
        ClassIndex(10, CIFAR10_CLASSES).find(prompt)


def test_names_with_commas_are_found_by_their_parts_and_shared_names_need_a_number():
    index = ClassIndex(3, ["tench, Tinca tinca", "crane", "crane, bird"])
    assert index.find("tench") == index.find("tinca_tinca") == index.find("tench, Tinca tinca") == 0
    assert index.find("crane, bird") == 2
    with pytest.raises(InputError, match="1, 2"):
        index.find("crane")


def test_only_the_row_with_an_unknown_class_is_lost(small):
    generator = load_generator(str(small))
    requests = [request("zebra" if i == 5 else "cat", i) for i in range(9)]
    lost = [
        r.seed
        for rows, outcome in FittedGenerator(generator, BatchSizer(batch_limits(generator, None))).isolate(
            requests, lambda: None
        )
        if isinstance(outcome, Exception)
        for r in rows
    ]
    assert lost == [5]


def test_what_the_model_does_not_do_is_reported(small):
    generator = load_generator(str(small))
    batch = generator.generate([request("cat", 0, guidance_scale=4.0, negative_prompt="dog"), request("", 1)])
    assert len(batch.warnings[0]) == 2
    assert "without a class" in batch.warnings[1][0]


@pytest.mark.parametrize("more", [{"width": 64}, {"num_inference_steps": 1001}])
def test_sizes_and_steps_it_cannot_make_are_refused(small, more):
    with pytest.raises(InputError, match="this model"):
        load_generator(str(small)).generate([request("cat", 0, **more)])


@pytest.mark.parametrize("form", ["json", "lines"])
def test_class_names_can_be_given(tmp_path, form):
    names = [f"kind {i}" for i in range(10)]
    (tmp_path / "names").write_text(json.dumps(names) if form == "json" else "\n".join(names) + "\n")
    source, target = publish(tmp_path / "p.pt"), tmp_path / "m.safetensors"
    options = ["--class-names", str(tmp_path / "names"), "--name", "mine"]
    assert convert.main([str(source), str(target), *options]) == COMPLETE
    generator = load_generator(str(target))
    assert generator.info.name == "mine"
    assert len(generator.generate([request("Kind 4", 0)]).images) == 1
    with pytest.raises(InputError, match="no class"):
        generator.generate([request("cat", 0)])


def test_class_names_must_be_as_many_as_the_classes(tmp_path, capsys):
    (tmp_path / "names").write_text("a\nb\n")
    source = publish(tmp_path / "p.pt")
    options = [str(source), str(tmp_path / "m"), "--class-names", str(tmp_path / "names")]
    assert convert.main(options) == ERROR
    assert "2 names" in capsys.readouterr().err


# Files that are not to be trusted


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["in the config", "beside the model", "bare pickle", "new pickle"])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, monkeypatch, how):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trace = tmp_path / "evil.pt", tmp_path / "it-ran"
    payload = Payload(f"touch {trace}")
    if how == "in the config":
        publish(path, config={**CIFAR, "callback": payload})
    elif how == "beside the model":
        publish(path, extra=payload)
    else:
        protocol = 2 if how == "bare pickle" else 5
        path.write_bytes(pickle.dumps({"model": {}, "config": payload}, protocol))
    with pytest.raises(InputError, match="besides tensors") as refused:
        read_checkpoint(path)
    assert str(path) in str(refused.value)
    assert not trace.exists()


def test_a_config_with_more_than_plain_values_is_refused_by_name(tmp_path):
    path = publish(tmp_path / "p.pt", config={**CIFAR, "dtype": torch.float32})
    with pytest.raises(InputError, match="'dtype' is a dtype"):
        read_checkpoint(path)


def without(key):
    return lambda model: model.pop(key)


def put(key, value):
    return lambda model: model.__setitem__(key, value)


K, BIAS = "dynamics._orig_mod.K", "decoder._orig_mod.to_output.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(K), "no tensor dynamics.K"),
        (without(BIAS), "no tensor decoder.to_output.bias"),
        (put(BIAS, torch.zeros(5)), r"decoder.to_output.bias has shape \[5\], expected \[3\]"),
        (put(K, torch.zeros(48)), r"dynamics.K has shape \[48\]"),
        (put(BIAS, torch.tensor([0.0, math.nan, 0.0])), "to_output.bias has values that are not finite"),
        (put(K, torch.full((48, 48), math.inf)), "K has values that are not finite"),
        (put(BIAS, torch.zeros(3, dtype=torch.int64)), "to_output.bias is torch.int64"),
        (put(BIAS, [0.0, 0.0, 0.0]), "to_output.bias' is a list"),
        (put("dynamics._orig_mod.x_persist", torch.zeros(3)), "not of this model: 'dynamics.x_persist'"),
        (put("dynamics.K", torch.zeros(48, 48)), "twice"),
        (put(K, torch.zeros(1).expand(48, 48)), "2304 elements repeat 1 stored numbers; save copies"),
    ],
)
def test_tensors_that_are_not_the_model_s_are_refused_by_name(tmp_path, change, words):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    change(model)
    with pytest.raises(InputError, match=words) as refused:
        read_checkpoint(publish(tmp_path / "p.pt", model=model))
    assert str(tmp_path / "p.pt") in str(refused.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"n_oscillators": 64}, "n_oscillators 64, its tensors say 48"),
        ({"n_conditional_oscillators": 1}, "its tensors say 8"),
        ({"relativization": "pairwise"}, "relativization 'pairwise'"),
        ({"solver": "dopri5"}, "solver 'dopri5'"),
        ({"num_steps": 0}, "steps 0"),
        ({"num_steps": True}, "steps True"),
        ({"dynamics": "memristive"}, "memristive"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        read_checkpoint(publish(tmp_path / "p.pt", config={**CIFAR, **more}))


def test_a_config_without_parameterization_needs_to_be_told(tmp_path):
    path = publish(tmp_path / "p.pt", config={k: v for k, v in CIFAR.items() if k != "parameterization"})
    with pytest.raises(InputError, match="--parameterization"):
        read_checkpoint(path)
    assert read_checkpoint(path, parameterization="mup").architecture.parameterization == "mup"


NARROW = "decoder._orig_mod.cascade.0.net.1.bias"
DRIVE = "dynamics._orig_mod.K_drive"


def test_a_tensor_saved_as_the_negative_of_another_keeps_its_sign(tmp_path):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    lazy = {**model, K: torch._neg_view(-model[K])}
    assert lazy[K].is_neg()
    assert torch.equal(lazy[K], model[K])
    kept = read_checkpoint(publish(tmp_path / "p.pt", model=lazy)).tensors
    assert all(torch.equal(kept[name].resolve_neg(), model[name]) for name in model)
    assert convert.main([str(tmp_path / "p.pt"), str(tmp_path / "m.safetensors")]) == COMPLETE
    assert torch.equal(load_file(tmp_path / "m.safetensors")[K], model[K])


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before torch 1.6"])
def test_views_parameters_and_other_floats_are_read_as_torch_reads_them(tmp_path, old):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    store = torch.cat([model[BIAS], model[NARROW]])
    model[BIAS], model[NARROW] = store[:3], store[3:]
    model[K] = model[K].T
    model[DRIVE] = torch.nn.Parameter(model[DRIVE].double()).requires_grad_()
    model["dynamics._orig_mod.omega"] = model["dynamics._orig_mod.omega"].bfloat16()
    model["dynamics._orig_mod.K_cond"] = model["dynamics._orig_mod.K_cond"].half()[:, ::1]
    model[NARROW].note = "an attribute"
    saved = {"model": model, "config": config}
    torch.save(saved, tmp_path / "p.pt", _use_new_zipfile_serialization=not old)
    kept = read_checkpoint(tmp_path / "p.pt").tensors
    expected = torch.load(tmp_path / "p.pt", weights_only=True)["model"]
    assert set(kept) == set(expected)
    for name in expected:
        assert kept[name].dtype == expected[name].dtype
        assert torch.equal(kept[name], expected[name])


def test_a_state_dict_of_a_module_is_read(tmp_path):
    """torch gives it attributes, of a kind of dictionary of its own."""
    config, classes, blocks = FLAVOURS["cifar10"]
    module = torch.nn.Module()
    for name, tensor in random_model(config, classes, blocks).items():
        *path, last = name.split(".")
        inner = module
        for step in path:
            if not hasattr(inner, step):
                inner.add_module(step, torch.nn.Module())
            inner = getattr(inner, step)
        inner.register_parameter(last, torch.nn.Parameter(tensor))
    state = module.state_dict()
    kept = read_checkpoint(publish(tmp_path / "p.pt", model=state)).tensors
    assert all(torch.equal(kept[name], state[name]) for name in state)


def full(key, value, dtype=torch.float32):
    return lambda model: model.__setitem__(key, torch.full_like(model[key], value, dtype=dtype))


def loud_decoder(model):
    for name in model:
        if name.startswith("decoder") and name.endswith("weight"):
            model[name] *= 1e6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            full(BIAS, 1e300, torch.float64),
            r"to_output.bias has values up to 1e\+300, which float32 cannot hold",
        ),
        (full(K, -1e39, torch.float64), r"dynamics.K has values up to 1e\+39"),
        (full(K, 3e38), "dynamics.K is too strong"),
        (lambda model: model[DRIVE][7].fill_(1e38), "dynamics.K_drive is too strong"),
        (full("dynamics._orig_mod.omega_cond", 1e38, torch.bfloat16), "dynamics.omega_cond is too strong"),
        (loud_decoder, "decoder.*weight is too strong"),
        (full(BIAS, 3e4, torch.float16), "flat colour only"),
    ],
)
def test_a_model_whose_numbers_overflow_is_refused_and_not_drawn_black(
    tmp_path, capsys, small, change, words
):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    change(model)
    source, target = publish(tmp_path / "p.pt", model=model), tmp_path / "m.safetensors"
    assert convert.main([str(source), str(target)]) == ERROR
    message = capsys.readouterr().err
    assert re.search(words, message)
    assert str(source) in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.pt"]
    if "flat" not in words:
        with pytest.raises(InputError, match=words):
            load_generator(str(rewrite(small, tmp_path / "other.safetensors", more=model)))


def test_strong_models_that_stay_finite_are_drawn(tmp_path):
    config, classes, blocks = FLAVOURS["cifar10 raw"]
    model = random_model(config, classes, blocks)
    model[K] *= 1e4
    model["decoder._orig_mod.cascade.0.net.1.weight"] *= 1e12
    model["decoder._orig_mod.cascade.0.net.3.weight"] *= 1e-12
    source, target = publish(tmp_path / "p.pt", "cifar10 raw", model=model), tmp_path / "m.safetensors"
    assert convert.main([str(source), str(target)]) == COMPLETE
    images = load_generator(str(target)).generate([request("3", i) for i in range(4)]).images
    assert images.std(axis=(1, 2)).min() > 0


def test_a_model_that_draws_one_image_only_is_refused(tmp_path, capsys):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    model["decoder._orig_mod.cascade.0.net.1.weight"].zero_()
    assert (
        convert.main([str(publish(tmp_path / "p.pt", model=model)), str(tmp_path / "m.safetensors")]) == ERROR
    )
    assert "the same image" in capsys.readouterr().err


def test_tensors_that_share_numbers_are_named(tmp_path):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    store = torch.arange(40.0)
    model[NARROW], model[BIAS] = store[:32], store[30:33]
    with pytest.raises(InputError, match="views of the same stored numbers; save copies") as refused:
        read_checkpoint(publish(tmp_path / "p.pt", model=model))
    assert NARROW in str(refused.value)
    assert BIAS in str(refused.value)


def test_a_tensor_that_its_array_does_not_hold_is_named(tmp_path):
    config, classes, blocks = FLAVOURS["cifar10"]
    model = random_model(config, classes, blocks)
    path = publish(tmp_path / "p.pt", model=model)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "cut.pt", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data[:100] if entry.filename.endswith("data/1") else data)
    with pytest.raises(InputError, match=r"dynamics._orig_mod.K: it needs 9216 bytes.* has 100"):
        read_checkpoint(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"note": "x" * 17 * 2**20}, "'note' is larger than the 4194304 characters"),
        ({"notes": ["\N{SNOWMAN}" * 1000] * 5000}, "'notes' is larger"),
        ({f"note {i}": "x" * 2**20 for i in range(5)}, "'note 3' is larger"),
    ],
)
def test_a_config_that_the_output_cannot_carry_is_refused(tmp_path, config, words):
    with pytest.raises(InputError, match=words):
        read_checkpoint(publish(tmp_path / "p.pt", config={**CIFAR, **config}))


@pytest.mark.long
def test_a_large_config_is_carried(tmp_path):
    config = {
        **CIFAR,
        "log": ["\N{SNOWMAN}", 1.5, None, {"a": [1, 2]}] * 40_000,
        "words": "\N{SNOWMAN}" * 10**6,
    }
    assert (
        convert.main([str(publish(tmp_path / "p.pt", config=config)), str(tmp_path / "m.safetensors")])
        == COMPLETE
    )
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == config
    assert load_generator(str(tmp_path / "m.safetensors")).info.width == 32


def test_no_name_of_a_class_or_model_makes_a_file_that_is_not_read(tmp_path, capsys):
    source, target = publish(tmp_path / "p.pt"), tmp_path / "m.safetensors"
    (tmp_path / "names").write_text(json.dumps([f"{i}" + "x" * 2**21 for i in range(10)]))
    assert convert.main([str(source), str(target), "--class-names", str(tmp_path / "names")]) == ERROR
    assert "header has" in capsys.readouterr().err
    assert convert.main([str(source), str(target), "--name", "a\udcffb"]) == ERROR
    assert "surrogates" in capsys.readouterr().err
    (tmp_path / "names").write_text("[" * 100_000)
    assert convert.main([str(source), str(target), "--class-names", str(tmp_path / "names")]) == ERROR
    assert not target.exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 132735\n"


def test_a_git_lfs_pointer_is_called_by_its_name(tmp_path):
    for name in ("p.pt", "m.safetensors"):
        (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match=r"p\.pt: a Git LFS pointer.*git lfs pull"):
        read_checkpoint(tmp_path / "p.pt")
    for read in (load_generator, describe_model):
        with pytest.raises(InputError, match=r"m\.safetensors: a Git LFS pointer.*git lfs pull"):
            read(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "p.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.pt"):
        read_checkpoint(tmp_path / "p.pt")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "missing.pt")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = publish(tmp_path / "p.pt")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(InputError, match=r"p\.pt"):
        read_checkpoint(path)


def test_a_compressed_archive_is_refused(tmp_path):
    path = publish(tmp_path / "p.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(InputError, match="compressed"):
        read_checkpoint(tmp_path / "z.pt")


def test_a_checkpoint_that_was_not_converted_says_how_to(tmp_path):
    with pytest.raises(InputError, match="millijoule convert"):
        load_generator(str(publish(tmp_path / "p.pt")))


def test_files_of_older_torch_versions_are_read(tmp_path):
    config, classes, blocks = FLAVOURS["cifar10"]
    saved = {"model": random_model(config, classes, blocks), "config": config}
    torch.save(saved, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_checkpoint(tmp_path / "old.pt").architecture.oscillators == 48


# The output


def test_an_existing_output_is_kept_unless_forced(tmp_path, capsys):
    source, target = publish(tmp_path / "p.pt"), tmp_path / "m.safetensors"
    target.write_text("mine")
    assert convert.main([str(source), str(target)]) == ERROR
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert convert.main([str(source), str(target), "--force"]) == COMPLETE
    assert load_generator(str(target)).info.width == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "p.pt"]
    assert target.stat().st_mode == source.stat().st_mode  # other users of the machine may read it as well


def test_the_checkpoint_is_never_its_own_output(tmp_path, capsys):
    source = publish(tmp_path / "p.pt")
    before = source.read_bytes()
    assert convert.main([str(source), str(source), "--force"]) == ERROR
    assert source.read_bytes() == before


def test_a_folder_that_does_not_exist_is_named(tmp_path, capsys):
    source = publish(tmp_path / "p.pt")
    assert convert.main([str(source), str(tmp_path / "no" / "m.safetensors")]) == ERROR
    assert "cannot be written" in capsys.readouterr().err


def rewrite(source, path, metadata=None, drop=(), more=None):
    with safe_open(source, "pt") as file:
        old = file.metadata()
    tensors = {k: v for k, v in load_file(source).items() if k not in drop}
    save_file({**tensors, **(more or {})}, path, {**old, **(metadata or {})})
    return path


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"metadata": {"version": "2"}}, "format 2"),
        ({"metadata": {"architecture": "{}"}}, "expected"),
        ({"metadata": {"architecture": "["}}, "damaged"),
        ({"metadata": {"class_names": '["one"]'}}, "1 class names for 10"),
        ({"drop": (K,)}, "no tensor dynamics.K"),
        ({"more": {BIAS: torch.zeros(4)}}, r"to_output.bias has shape \[4\]"),
        ({"more": {BIAS: torch.full((3,), math.nan)}}, "not finite"),
        ({"more": {BIAS: torch.zeros(3, dtype=torch.bool)}}, "to_output.bias is torch.bool"),
    ],
)
def test_converted_files_are_checked_again_when_loaded(tmp_path, small, how, words):
    path = rewrite(small, tmp_path / "m.safetensors", **how)
    with pytest.raises(InputError, match=words) as refused:
        load_generator(str(path))
    assert str(path) in str(refused.value)


def header_of(path):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[BIAS].update(data_offsets=[0, 12]), "invalid offset for tensor"),  # another's bytes
        (lambda h: h[BIAS].update(data_offsets=[0, 2**40]), "invalid offset for tensor `decoder"),
        (lambda h: h[BIAS].update(shape="three"), "expected a sequence"),
        (lambda h: h[BIAS].pop("shape"), "missing field `shape`"),
        (lambda h: h[BIAS].pop("dtype"), "missing field `dtype`"),
        (lambda h: h.update({BIAS: 3}), "invalid type: integer `3`"),
        (lambda h: h.update(__metadata__=[1]), "expected a map"),
        (lambda h: h["__metadata__"].update(name=7), "expected a string"),
        (lambda h: h["__metadata__"].update(architecture="[" * 100_000), "recursion"),
        (lambda h: h["__metadata__"].update(class_names="7"), "damaged"),
    ],
)
def test_a_damaged_header_is_refused_in_words(tmp_path, small, change, words):
    header, data = header_of(small)
    change(header)
    path = with_header(tmp_path / "m.safetensors", header, data)
    with pytest.raises(InputError, match=words) as refused:
        load_generator(str(path))
    assert str(path) in str(refused.value)


def test_a_header_of_brackets_is_refused(tmp_path):
    path = with_header(tmp_path / "m.safetensors", b'{"a":' + b"[" * 200_000, b"")
    for read in (load_generator, describe_model):
        with pytest.raises(InputError, match="not a safetensors file"):
            read(str(path))


def test_an_architecture_survives_json_and_sizes_out_of_range_do_not():
    good = Un0Architecture(48, 8, 10, 3, "standard", "mean_relative", "sin_cos", "euler", 10)
    assert read_settings(Un0Architecture, json.dumps(asdict(good))) == good
    for name, value in (("oscillators", 10**9), ("drivers", 0), ("horizon", -1.0), ("oscillators", 49)):
        raw = {**asdict(good), name: value}
        with pytest.raises(ValueError, match=rf"\$\.{name}|do not fill"):
            read_settings(Un0Architecture, json.dumps(raw))
