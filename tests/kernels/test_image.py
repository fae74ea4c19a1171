"""The compiled image kernel: in every form that runs here, the pixels of the reference."""

import copy
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators

from millijoule.kernels.image import ImageKernel
from millijoule.kernels.native_library import FORMS, native_library, only
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.model_file import load_model
from millijoule.workers.scenes.scenes import FAMILIES, complete, sample_scene, scene_tokens

library = native_library()
pytestmark = pytest.mark.skipif(library is None, reason="the compiled kernels are not built")
HERE = [] if library is None else range(library.millijoule_best_form() + 1)


def scenes(count, nouns):
    rng = np.random.default_rng(3)
    return scene_tokens([complete(sample_scene(FAMILIES[i % 6], rng, nouns=nouns), i) for i in range(count)])


@pytest.fixture(scope="module", params=["none", "trained"])
def painter(request):
    return painter_of(tiny_oscillators(request.param, seed=1))


@pytest.fixture(scope="module", params=HERE, ids=[FORMS[form] for form in HERE])
def form(request):
    return request.param


class Reference:
    """What PyTorch draws, the coupled oscillators' steps included."""

    def __init__(self, painter):
        self.drawing = Drawing(painter, engine=EagerEngine())

    def draw(self, tokens, seeds, steps=None):
        with only("reference"):
            return self.drawing.draw(tokens, seeds, steps)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), count=st.integers(1, 40), steps=st.sampled_from([None, 4, 10, 23]))
def test_pixels_are_the_reference_s(painter, form, seed, count, steps):
    tokens = scenes(count, NOUNS)
    seeds = np.arange(count, dtype=np.uint64) + np.uint64(seed)
    drawn = ImageKernel.of(painter.kernel_weights(), form).draw(tokens, seeds, steps)
    assert np.array_equal(drawn, Reference(painter).draw(tokens, seeds, steps))


@pytest.mark.parametrize("model", ["default", "coupled"])
def test_pixels_of_the_shipped_models_are_the_reference_s(model, form):
    painter, _ = load_model(PACKAGED[model])
    tokens, seeds = scenes(48, len(painter.network.codes)), np.arange(48, dtype=np.uint64) * 977
    drawn = ImageKernel.of(painter.kernel_weights(), form).draw(tokens, seeds)
    assert np.array_equal(drawn, Reference(painter).draw(tokens, seeds))


def test_threads_and_batches_change_nothing(painter, form):
    kernel, tokens, seeds = (
        ImageKernel.of(painter.kernel_weights(), form),
        scenes(30, NOUNS),
        np.arange(30, dtype=np.uint64),
    )
    together = kernel.draw(tokens, seeds)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        assert np.array_equal(kernel.draw(tokens, seeds), together)
    finally:
        torch.set_num_threads(before)
    alone = np.concatenate([kernel.draw(tokens[i : i + 1], seeds[i : i + 1]) for i in range(30)])
    assert np.array_equal(alone, together)
    assert kernel.draw(tokens[:0], seeds[:0]).shape == (0, 64, 64, 3)


@pytest.mark.parametrize("coupling", ["none", "trained"])
def test_sums_at_the_limits_of_int8_do_not_saturate(coupling, form):
    """All weights and codes at their limits: two products of an AVX2 lane come as near to 16 bits as they can."""
    painter = painter_of(tiny_oscillators(coupling, seed=1))
    network = painter.network
    for name in painter.kernel_weights().layers:
        values = getattr(network, name).weights
        values.copy_(torch.where(values < 0, -127, 127))
    network.codes.fill_(-128)
    tokens, seeds = scenes(12, NOUNS), np.arange(12, dtype=np.uint64)
    drawn = ImageKernel.of(painter.kernel_weights(), form).draw(tokens, seeds)
    assert np.array_equal(drawn, Reference(painter).draw(tokens, seeds))


def test_a_weight_that_avx2_cannot_negate_is_left_to_pytorch():
    painter = painter_of(tiny_oscillators(seed=2))
    painter.network.near.weights[0, 0] = -128
    assert ImageKernel.of(painter.kernel_weights()) is None
    assert Drawing(painter).kernel is None


@pytest.mark.parametrize(
    ("column", "value"), [(0, NOUNS + 1), (0, -1), (1, 0), (1, 99), (2, 4), (3, 10), (16, 5), (16, -1)]
)
def test_tokens_beyond_the_model_are_refused(painter, column, value):
    tokens = scenes(2, NOUNS)
    tokens[1, column] = value
    with pytest.raises(ValueError, match="no words for"):
        ImageKernel.of(painter.kernel_weights(), 0).draw(tokens, np.zeros(2, np.uint64))


def test_shapes_that_do_not_belong_together_are_refused(painter):
    weights = painter.kernel_weights()
    with pytest.raises(ValueError, match="are expected"):
        ImageKernel.of(type(weights)(**{**vars(weights), "codes": weights.codes[:, :-1]}), 0)


DRAWS = """
import hashlib, logging
logging.basicConfig(level=logging.INFO)
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest
drawn = load_generator("default").generate([ImageRequest(str(i), 0, f"{i % 4 + 1} red foxes", seed=i) for i in range(8)])
print(hashlib.sha256(drawn.images.tobytes()).hexdigest())
"""


@pytest.mark.parametrize("asked", ["", "reference", *(FORMS[form] for form in HERE)])
def test_what_the_environment_asks_for_draws_and_the_log_names_it(asked):
    done = subprocess.run(
        [sys.executable, "-c", DRAWS],
        env={**os.environ, "MILLIJOULE_KERNEL": asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(drawn_by_pytorch().tobytes()).hexdigest()
    said = {"": f"kernels: compiled, {FORMS[HERE[-1]]}", "reference": "kernels: PyTorch's, as"}
    assert said.get(asked, f"kernels: compiled, {asked}") in done.stderr


def drawn_by_pytorch():
    from millijoule.workers.oscillators.generator import OscillatorGenerator
    from millijoule.workers.schemas import ImageRequest

    generator = OscillatorGenerator.load(PACKAGED["default"], engine=EagerEngine())
    return generator.generate(
        [ImageRequest(str(i), 0, f"{i % 4 + 1} red foxes", seed=i) for i in range(8)]
    ).images


def test_a_form_that_there_is_not_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", DRAWS],
        env={**os.environ, "MILLIJOULE_KERNEL": "avx9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MILLIJOULE_KERNEL=avx9: one of reference, plain, avx2, avx512-vnni" in done.stderr


SCARCE = """
import hashlib, resource, sys
import numpy as np
import torch
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest
generator = load_generator("default")
requests = [ImageRequest(str(i), 0, f"{i % 4 + 1} red foxes", seed=i) for i in range(8)]
generator.generate(requests)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20),) * 2)  # a thread's stack alone takes 8
torch.set_num_threads(64)
try:
    print(hashlib.sha256(generator.generate(requests).images.tobytes()).hexdigest())
except MemoryError:
    print("no memory")
"""


def test_threads_that_cannot_be_had_end_no_process():
    done = subprocess.run([sys.executable, "-c", SCARCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    right = hashlib.sha256(drawn_by_pytorch().tobytes()).hexdigest()
    assert done.stdout.strip() in (right, "no memory")


def test_copies_of_a_kernel_do_not_share_what_they_free(painter, form):
    kernel = ImageKernel.of(painter.kernel_weights(), form)
    tokens, seeds = scenes(4, NOUNS), np.arange(4, dtype=np.uint64)
    other = copy.copy(kernel)
    first = other.draw(tokens, seeds)
    del other
    assert np.array_equal(kernel.draw(tokens, seeds), first)
