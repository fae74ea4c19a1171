"""Integers of an Un-0 model on a GPU: the CPU's pixels, taken only after some of them were compared; the log says what draws."""

import logging

import numpy as np
import pytest
from support.dense_cases import un0_drawn_on_gpu
from support.interpreted import interpreted
from support.un0_checkpoints import parts_of, publish

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE
from millijoule.kernels.dense_coupling import StepsTooLong, relax
from millijoule.kernels.gpu import dense_coupling as gpu_dense
from millijoule.kernels.gpu import upsampling_decoder as gpu_decoder
from millijoule.kernels.upsampling_decoder import decode
from millijoule.workers.engines import open as engines
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators import un0
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import NamesKernels
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.generators.un0 import Un0Generator
from millijoule.workers.generators.un0_gpu import gpu_form
from millijoule.workers.schemas import ImageRequest


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("un0")
    source, target = publish(folder / "p.pt", "cifar10"), folder / "m.safetensors"
    assert convert.main([str(source), str(target)]) == COMPLETE
    return target


def requests(count, **more):
    prompts = [str(i % 10) if i % 5 else "" for i in range(count)]
    return [ImageRequest(f"p{i}", 0, p, seed=2**63 + 7919 * i, **more) for i, p in enumerate(prompts)]


def test_interpreted_kernels_draw_the_cpu_s_pixels(file):
    """As wired: checked against the CPU when opened, then images with and without a class, and of other steps."""
    calls = [([-1, 9, 3], [5, 2**64 - 1, 7], 10), ([4], [1], 7)]
    kernels, found = interpreted(un0_drawn_on_gpu, file, calls)
    assert kernels == "triton"
    generator = load_generator(str(file))
    for call, images in zip(calls, found, strict=True):
        assert np.array_equal(images, generator._integers.draw(*call))
        assert images.std() > 5


class Stand:
    """In the kernels' place: PyTorch's phases."""

    change = staticmethod(lambda phases: phases)

    def __init__(self, coupling, device):
        self.coupling = coupling

    def __call__(self, phases, classes, steps, horizon):
        return self.change(relax(phases, self.coupling, classes, steps, horizon))


class DecoderStand:
    def __init__(self, decoder, device):
        self.decoder = decoder

    def __call__(self, features):
        return decode(features, self.decoder)


@pytest.fixture
def opened(monkeypatch, file, caplog):
    """What `gpu_form` gives if the kernels' phases are changed, and what it logs; the CPU stands in for the GPU."""

    def open_with(change=None):
        stand = type("Changed", (Stand,), {"change": staticmethod(change)} if change else {})
        monkeypatch.setattr(gpu_dense, "DenseKernel", stand)
        monkeypatch.setattr(gpu_decoder, "DecoderKernel", DecoderStand)
        with caplog.at_level(logging.INFO):
            form = gpu_form(*parts_of(file), "cpu")
        return form, caplog.text

    return open_with


def test_kernels_that_draw_the_same_are_taken(opened, file):
    form, told = opened()
    assert form.kernels == "triton"
    assert "by the GPU's kernels" in told
    assert np.array_equal(
        form.draw([1, -1], [3, 4], 10), load_generator(str(file))._integers.draw([1, -1], [3, 4], 10)
    )


def test_one_other_phase_is_enough_for_floating_point(opened):
    def turned(phases):
        phases = phases.clone()
        phases[-1, 0] += 2**14
        return phases

    form, told = opened(turned)
    assert form is None
    assert "floating point, as the GPU's kernels drew other pixels" in told


def test_kernels_that_fail_are_left_with_a_word(opened):
    def fail(phases):
        raise RuntimeError("no C compiler")

    form, told = opened(fail)
    assert form is None
    assert "no C compiler" in told


def test_a_decoder_that_its_kernel_does_not_take_is_pytorch_s(opened, monkeypatch):
    monkeypatch.setattr(gpu_decoder, "misfit", lambda decoder: "a row of both signs")
    form, told = opened()
    assert form.kernels == "triton, its decoder pytorch"
    assert "a row of both signs" in told


def test_the_reference_may_be_forced(opened, file, monkeypatch):
    expected = load_generator(str(file))._integers.draw([1, -1], [3, 4], 10)
    monkeypatch.setenv("MILLIJOULE_KERNEL", "reference")
    form, told = opened(lambda phases: 1 / 0)
    assert form.kernels == "pytorch"
    assert "as MILLIJOULE_KERNEL says" in told
    assert np.array_equal(form.draw([1, -1], [3, 4], 10), expected)


@pytest.fixture
def loaded(monkeypatch, file):
    """A generator for a GPU that is not there, whose integers `form` draws; floats are not loaded."""

    def load_with(form, options=GeneratorOptions()):  # noqa: B008 (frozen)
        monkeypatch.setattr(un0, "gpu_form", lambda *given: form)
        monkeypatch.setattr(un0, "Un0GpuForm", type(form))
        monkeypatch.setattr(Un0Generator, "_networks", property(lambda self: "floats"))
        monkeypatch.setattr(engines, "open_engine", lambda options, device: EagerEngine())
        return load_generator(str(file), device="cuda", options=options)

    return load_with


class Form:
    kernels = "triton"

    def draw(self, classes, seeds, steps):
        if steps == 99:
            raise StepsTooLong("a test")
        return np.full((len(classes), 32, 32, 3), 7, np.uint8)


def test_a_generator_draws_by_them_and_says_so(loaded, caplog):
    with caplog.at_level(logging.INFO):
        generator = loaded(Form())
    assert isinstance(generator, NamesKernels)
    assert generator.kernels == "triton"
    assert "drawn in integers (triton)" in caplog.text
    assert generator.info.batch_size == 256
    assert (generator.generate(requests(2)).images == 7).all()


@pytest.mark.parametrize(
    "options", [GeneratorOptions(engine="eager"), GeneratorOptions(cuda_graphs=True)], ids=["eager", "graphs"]
)
def test_who_asks_for_something_of_an_engine_gets_it(loaded, options, caplog):
    with caplog.at_level(logging.INFO):
        generator = loaded(Form(), options)
    assert generator.kernels == "pytorch, floating point"
    assert generator.info.batch_size == 64
    assert "an engine runs floating point" in caplog.text


def test_without_them_floats_draw(loaded, caplog):
    with caplog.at_level(logging.INFO):
        generator = loaded(None)
    assert generator.kernels == "pytorch, floating point"
    assert "drawn in floating point" in caplog.text


def test_a_file_without_integers_asks_no_kernel(monkeypatch, tmp_path):
    source = publish(tmp_path / "p.pt", "cifar10 raw")
    assert convert.main([str(source), str(tmp_path / "m.safetensors")]) == COMPLETE
    asked = []
    monkeypatch.setattr(un0, "gpu_form", lambda *given: asked.append(given))
    monkeypatch.setattr(Un0Generator, "_networks", property(lambda self: "floats"))
    monkeypatch.setattr(engines, "open_engine", lambda options, device: EagerEngine())
    load_generator(str(tmp_path / "m.safetensors"), device="cuda")
    assert asked == []
