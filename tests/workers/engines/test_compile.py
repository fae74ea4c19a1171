"""torch.compile as an engine: how often it compiles, and what it does where it cannot.

Most tests run the graphs that would be compiled without making code of them (`backend="eager"`): what counts is when.
"""

import functools
import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from support.un0_checkpoints import CIFAR, publish
from torch import nn

from millijoule.jobs import convert
from millijoule.workers.engines import compile as compile_engine
from millijoule.workers.engines.compile import check_compiler
from millijoule.workers.engines.open import open_engine
from millijoule.workers.engines.protocol import EngineSettings
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

COMPILE, EAGER = GeneratorOptions(engine="compile"), GeneratorOptions(engine="eager")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = 1.0
        self.runs = 0

    def forward(self, x, scale=1.0):
        return torch.relu(self.linear(x)) * scale * self.scale


@pytest.fixture
def prepared(monkeypatch):
    """(engine, module that it runs)."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    engine = open_engine(COMPILE, "cpu")
    return engine, engine.prepare(Net().eval(), "net")


def plainly(module, *args, **kwargs):
    return module._call_impl(*args, **kwargs)


@torch.inference_mode()
def test_a_shape_is_compiled_once(prepared):
    engine, net = prepared
    for rows in (2, 4, 2, 4, 2):
        x = torch.randn(rows, 3)
        assert torch.equal(net(x), plainly(net, x))
    assert engine.report.events == {"compiled": 2}
    assert engine.fixed_shapes


@torch.inference_mode()
def test_what_meets_too_many_kinds_of_calls_runs_the_rest_plainly_and_says_so(prepared, caplog):
    engine, net = prepared
    with caplog.at_level(logging.WARNING, compile_engine.__name__):
        for rows in range(1, compile_engine.MAX_COMPILED + 4):
            x = torch.randn(rows, 3)
            assert torch.equal(net(x), plainly(net, x))
    assert engine.report.events == {"compiled": compile_engine.MAX_COMPILED}
    assert [r.getMessage() for r in caplog.records if r.name == compile_engine.__name__] == [
        "net: more than 8 kinds of calls: the others run as they are"
    ]


@torch.inference_mode()
def test_a_second_compilation_for_the_same_call_is_reported(prepared, caplog):
    engine, net = prepared
    x = torch.randn(2, 3)
    net(x)
    net.scale = 2.0  # nothing of the call, and yet it must be compiled anew
    assert torch.equal(net(x), plainly(net, x))
    assert engine.report.events == {"compiled": 1, "compiled again": 1}
    assert any("compiled again" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


@torch.inference_mode()
def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no code for this")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    engine = open_engine(COMPILE, "cpu")
    net = engine.prepare(Net().eval(), "net")
    x = torch.randn(2, 3)
    for _ in range(2):
        assert torch.equal(net(x), plainly(net, x))
    assert engine.report.events == {"not compiled": 1}
    assert "net: cannot be compiled, runs as it is" in caplog.text


@torch.inference_mode()
def test_a_fault_of_the_call_itself_is_raised(prepared):
    _, net = prepared
    with pytest.raises(Exception, match=r"mat1 and mat2|size mismatch|cannot be multiplied"):
        net(torch.randn(2, 5))


def test_modules_that_are_not_static_are_left_alone_and_it_says_so(prepared, caplog):
    engine, _ = prepared
    module = engine.prepare(nn.Linear(2, 2), "encoder", static=False)
    assert module._compiled_call_impl is None
    assert "--engine compile: encoder runs as it is" in caplog.text
    assert engine.report.modules[-1].how == "as it is"


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """A folder that is all of PATH, with no compiler named and Triton as good as there."""
    from torch._inductor.cpp_builder import cpp_compiler_search

    cpp_compiler_search.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    return tmp_path


def put_program(path):
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("device", "variable", "words"),
    [
        ("cpu", "CXX", r"on a CPU it needs a C\+\+ compiler: install g\+\+, or name another in CXX"),
        ("cuda", "CC", "on a GPU it needs a C compiler: install gcc, or name another in CC"),
    ],
)
def test_without_a_compiler_the_message_says_what_to_install(programs, monkeypatch, device, variable, words):
    with pytest.raises(InputError, match=words):
        check_compiler(EngineSettings(device))
    monkeypatch.setenv(variable, "/gone/cc")
    with pytest.raises(
        InputError, match=rf"compiler, and {variable}=/gone/cc is not the name of a program here: "
    ):
        check_compiler(EngineSettings(device))


def test_a_compiler_that_cc_names_is_enough_and_the_only_one_that_counts(programs, monkeypatch):
    """As Triton has it: what `CC` names is called whatever else there is."""
    put_program(programs / "gcc")
    check_compiler(EngineSettings("cuda"))
    monkeypatch.setenv("CC", "gone-cc")
    with pytest.raises(InputError, match="CC=gone-cc"):
        check_compiler(EngineSettings("cuda"))
    (programs / "gcc").rename(programs / "gone-cc")
    check_compiler(EngineSettings("cuda"))
    monkeypatch.setenv("CC", str(programs / "gone-cc"))
    check_compiler(EngineSettings("cuda"))
    (programs / "gone-cc").rename(programs / "clang")
    monkeypatch.delenv("CC")
    check_compiler(EngineSettings("cuda"))


def test_the_default_model_runs_as_it_is_and_says_so(caplog):
    """Integers of another shape in each batch: compiled with symbolic shapes they take longer than as they are."""
    plain, compiled = (load_generator("default", options=o) for o in (EAGER, COMPILE))
    assert "--engine compile: shapes runs as it is" in caplog.text
    requests = [ImageRequest("p", i, "two red cats above a blue car", seed=i) for i in range(20)]
    np.testing.assert_array_equal(compiled.generate(requests).images, plain.generate(requests).images)
    assert compiled.engine.report.events == {}


@pytest.mark.long
def test_a_compiled_model_has_next_to_the_same_pixels(tmp_path):
    torch._dynamo.reset()
    file = tmp_path / "model.safetensors"
    few = {**CIFAR, "num_steps": 3}  # each is code that a compiler reads
    published = publish(tmp_path / "published.pt", "cifar10", config=few)
    assert convert.main([str(published), str(file), "--form", "float"]) == 0
    plain, compiled = (load_generator(str(file), options=o) for o in (EAGER, COMPILE))

    def requests(count):
        return [ImageRequest("p", i, "3", seed=i) for i in range(count)]

    expected = plain.generate(requests(20)).images
    images = compiled.generate(requests(20)).images
    assert np.abs(images.astype(int) - expected).max() <= 1  # sums are taken in another order
    assert (images == expected).mean() > 0.99
    events = dict(compiled.engine.report.events)
    assert set(events) == {"compiled"}
    again = compiled.generate(requests(3)).images  # a last batch: padded, nothing is compiled
    np.testing.assert_array_equal(again, images[:3])
    assert compiled.engine.report.events == events
