"""A GPU's kernels are taken only after they drew what PyTorch's operations draw; the log says what draws."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_oscillators import painter_of, tiny_oscillators

from millijoule.kernels.gpu import image as gpu_image
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.generator import OscillatorGenerator
from millijoule.workers.oscillators.gpu_kernel import gpu_kernel, trial_scenes


@pytest.fixture(scope="module")
def drawing():
    return Drawing(painter_of(tiny_oscillators()), engine=EagerEngine())


def kernel_that(change):
    """In the kernels' place: PyTorch's images, changed."""

    class Kernel:
        def __init__(self, weights, device):
            assert device == "cuda:1"

        def draw(self, tokens, seeds, steps=None):
            return change(self.plain(tokens, seeds, steps))

    return Kernel


@pytest.fixture
def opened(monkeypatch, drawing, caplog):
    """What `gpu_kernel` gives if the kernels draw `change` of the right images, and what it logs."""

    def open_with(change, weights=None):
        kernel = kernel_that(change)
        kernel.plain = staticmethod(drawing.draw)
        monkeypatch.setattr(gpu_image, "ImageKernel", kernel)
        with caplog.at_level(logging.INFO):
            found = gpu_kernel(weights or drawing.painter.kernel_weights(), "cuda:1", drawing.draw)
        return found, caplog.text

    return open_with


def test_kernels_that_draw_the_same_are_taken(opened):
    kernel, told = opened(lambda images: images)
    assert kernel is not None
    assert "the GPU's, in one CUDA graph" in told


def test_one_other_pixel_is_enough_to_go_without(opened):
    def off_by_one(images):
        images = images.copy()
        images[-1, 63, 63, 2] ^= 1
        return images

    kernel, told = opened(off_by_one)
    assert kernel is None
    assert "drew other pixels" in told


def test_kernels_that_fail_are_left_with_a_word(opened):
    def fail(images):
        raise RuntimeError("no C compiler")

    kernel, told = opened(fail)
    assert kernel is None
    assert "no C compiler" in told


def test_a_model_that_does_not_fit_is_not_taken(opened, drawing):
    weights = drawing.painter.kernel_weights()
    large = replace(weights, codes=torch.zeros(7, 129, dtype=torch.int8))
    kernel, told = opened(lambda images: images, large)
    assert kernel is None
    assert "code 129 is more than 128" in told


def test_the_reference_may_be_forced(opened, monkeypatch):
    monkeypatch.setenv("MILLIJOULE_KERNEL", "reference")
    kernel, told = opened(lambda images: images)
    assert kernel is None
    assert "as MILLIJOULE_KERNEL says" in told


@pytest.mark.parametrize(
    ("options", "drawn_by"),
    [
        (GeneratorOptions(), "kernel"),
        (GeneratorOptions(engine="eager"), "engine"),
        (GeneratorOptions(cuda_graphs=True), "engine"),
    ],
)
@pytest.mark.parametrize("taken", [True, False])
def test_an_engine_runs_where_the_kernels_do_not(monkeypatch, options, drawn_by, taken):
    """As usual the kernels are tried first; who asks for something of an engine gets it."""

    def load(path, *, device, engine=None):
        kernel = "kernel" if engine is None and taken else None
        return SimpleNamespace(drawing=SimpleNamespace(kernel=kernel), engine=engine)

    monkeypatch.setattr(OscillatorGenerator, "load", staticmethod(load))
    monkeypatch.setattr("millijoule.workers.engines.open.open_engine", lambda options, device: "engine")
    generator = load_generator("default", device="cuda:0", options=options)
    assert generator.engine == (None if drawn_by == "kernel" and taken else "engine")


def test_the_trial_has_all_sizes_in_both_kinds_of_window(drawing):
    tokens, seeds = trial_scenes(7)
    icons = tokens[:, :-1].reshape(-1, 4)
    icons = icons[icons[:, 0] > 0]
    assert len({(size, window == 1) for _, _, size, window in icons.tolist()}) == 6
    assert set(tokens[:, -1]) == {0, 1, 2, 3, 4}
    assert len(np.unique(drawing.draw(tokens, seeds).reshape(len(tokens), -1), axis=0)) == len(tokens)
