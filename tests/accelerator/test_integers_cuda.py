"""On an NVIDIA GPU: the integer kernels give the bits of a CPU, launched, replayed from a graph and with blocks that wait for each other.

Skipped where there is none. In a rehearsal, on a CPU, PyTorch's operations and the CPU's kernels stand in for the GPU's.
"""

import logging

import numpy as np
import pytest
import torch
from support.accelerator import DEVICE, MISSING, REHEARSAL
from support.decoder_cases import in_steps, made_up_convolutions, made_up_features
from support.image_cases import extreme_painter, tokens_of
from support.tiny_oscillators import NOUNS, painter_of, tiny_oscillators
from support.un0_checkpoints import publish

from millijoule.jobs import convert
from millijoule.jobs.entry import COMPLETE
from millijoule.kernels.dense_coupling import quantize_dense, relax, relax_reference
from millijoule.kernels.phase import TURN, random_phases
from millijoule.kernels.upsampling_decoder import calibrated_ranges, decode, quantize_decoder
from millijoule.workers.engines.eager import EagerEngine
from millijoule.workers.generators.registry import PACKAGED, load_generator
from millijoule.workers.oscillators.draw import Drawing
from millijoule.workers.oscillators.model_file import load_model
from millijoule.workers.schemas import ImageRequest

pytestmark = pytest.mark.skipif(MISSING, reason="no CUDA device")

on_a_board = pytest.mark.skipif(REHEARSAL, reason="a rehearsal: there is no board")


def seeds_of(count):
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def reference(painter, tokens, seeds, steps=None):
    return Drawing(painter, engine=EagerEngine()).draw(tokens, seeds, steps)


@pytest.fixture(scope="module", params=["default", "coupled"])
def shipped(request):
    painter, _ = load_model(PACKAGED[request.param])
    return painter, Drawing(painter, DEVICE)


@pytest.mark.parametrize("count", [1, 3, 17, 300])
def test_images_of_the_shipped_model_are_a_cpu_s(shipped, count):
    """Two batches of each size: the second is a replay."""
    painter, drawing = shipped
    for seed in (1, 2):
        tokens = tokens_of(count, 1040, seed=seed)
        found = drawing.draw(tokens, seeds_of(count))
        assert np.array_equal(found, reference(painter, tokens, seeds_of(count)))


@pytest.mark.parametrize("steps", [4, 23])
def test_other_steps(shipped, steps):
    painter, drawing = shipped
    tokens = tokens_of(5, 1040)
    found = drawing.draw(tokens, seeds_of(5), steps)
    assert np.array_equal(found, reference(painter, tokens, seeds_of(5), steps))


@on_a_board
def test_a_gpu_draws_by_its_kernels(shipped):
    from millijoule.kernels.gpu.image import ImageKernel

    assert isinstance(shipped[1].kernel, ImageKernel)
    assert isinstance(load_generator("default", device=DEVICE).drawing.kernel, ImageKernel)


@on_a_board
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("extreme", [True, False])
@pytest.mark.parametrize("coupled", [True, False])
def test_small_and_extreme_networks_with_weights_kept_and_read_again(resident, extreme, coupled):
    from millijoule.kernels.gpu.image import ImageKernel

    small = tiny_oscillators("trained" if coupled else "none")
    painter = extreme_painter(0, coupled) if extreme else painter_of(small)
    kernel = ImageKernel(painter.kernel_weights(), DEVICE)
    kernel.resident = resident
    tokens = tokens_of(200, 6 if extreme else NOUNS)
    for blocks in (1, 7, kernel.blocks):
        kernel.blocks = blocks
        kernel._batches.clear()
        assert np.array_equal(kernel.draw(tokens, seeds_of(200)), reference(painter, tokens, seeds_of(200)))


def made_up(n, m=8, classes=3):
    random = torch.Generator().manual_seed(n)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=random, dtype=torch.float64) * std

    return (
        normal(n, n, std=1.5 * n**-0.5),
        normal(n),
        normal(classes, n, m, std=m**-0.5),
        normal(m, m, std=m**-0.5),
        normal(m),
    )


def call_of(n, batch, steps, m=8):
    phases = random_phases(np.arange(batch, dtype=np.uint64), n + m) - TURN // 2
    return phases, torch.arange(batch) % 4 - 1, steps, 1.0


def relaxed_there(coupling, call, **options):
    if REHEARSAL:
        return relax(call[0], coupling, *call[1:])
    from millijoule.kernels.gpu.dense_coupling import DenseKernel

    kernel = DenseKernel(coupling, DEVICE, **options)
    first = kernel(*call).cpu()
    assert torch.equal(kernel(*call).cpu(), first)  # a replay
    return first


@pytest.mark.parametrize("fine_every", [0, 3])
@pytest.mark.parametrize(("n", "batch"), [(128, 1), (512, 67)])
def test_phases_of_a_dense_coupling_are_a_cpu_s(n, batch, fine_every):
    coupling = quantize_dense(*made_up(n), fine_every=fine_every)
    call = call_of(n, batch, 5)
    assert torch.equal(relaxed_there(coupling, call), relax_reference(call[0], coupling, *call[1:]))


@on_a_board
@pytest.mark.parametrize("n", [1024, 2048])
def test_k_on_the_chip_gives_the_same_phases(n):
    """Of batches that all blocks of which run at once, and of a larger one."""
    coupling = quantize_dense(*made_up(n))
    for batch in (3, 256, 600):
        call = call_of(n, batch, 20)
        step_by_step = relaxed_there(coupling, call)
        assert torch.equal(relaxed_there(coupling, call, resident=True), step_by_step)
        assert torch.equal(step_by_step[:2], relax(call[0][:2], coupling, call[1][:2], *call[2:]))


def block_sparse(n, blocks):
    """Couplings with so many blocks in each row of blocks, other ones in each."""
    weights = made_up(n)
    for row in range(n // 64):
        kept = torch.zeros(n // 128, dtype=torch.bool)
        kept[(torch.arange(blocks) + row) % len(kept)] = True
        weights[0][64 * row : 64 * (row + 1)] *= kept.repeat_interleave(128)
    return weights


@pytest.mark.parametrize("fine_every", [0, 3])
def test_phases_of_a_block_sparse_coupling_are_a_cpu_s(fine_every):
    coupling = quantize_dense(*block_sparse(512, 2), fine_every=fine_every)
    call = call_of(512, 67, 5)
    assert torch.equal(relaxed_there(coupling, call), relax_reference(call[0], coupling, *call[1:]))


@on_a_board
@pytest.mark.parametrize("n", [4096, 8192])
def test_block_sparse_k_on_the_chip_gives_the_same_phases(n):
    coupling = quantize_dense(*block_sparse(n, 16))
    for batch in (3, 256):
        call = call_of(n, batch, 20)
        dense = relaxed_there(coupling, call, sparse=False)
        assert torch.equal(relaxed_there(coupling, call, sparse=True), dense)
        assert torch.equal(relaxed_there(coupling, call, resident=True), dense)


@pytest.mark.parametrize(("channels", "blocks", "images"), [(6, 1, 1), (128, 3, 7), (512, 2, 33)])
def test_images_of_a_decoder_are_a_cpu_s(channels, blocks, images):
    convolutions, x = made_up_convolutions(channels, blocks), in_steps(made_up_features(images, channels))
    decoder = quantize_decoder(convolutions, calibrated_ranges(convolutions, x[:4]))
    expected = decode(x, decoder)
    if REHEARSAL:
        found = expected
    else:
        from millijoule.kernels.gpu.upsampling_decoder import DecoderKernel

        found = DecoderKernel(decoder, DEVICE)(x.to(DEVICE)).cpu()
        assert torch.equal(decode(x.to(DEVICE), decoder.to(DEVICE)).cpu(), expected)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flavour", ["cifar10", "cifar10 sin", "imagenet64"])
def test_an_un0_checkpoint_in_integers_draws_a_cpu_s_pixels(tmp_path, flavour, caplog):
    file = tmp_path / "m.safetensors"
    assert convert.main([str(publish(tmp_path / "p.pt", flavour)), str(file)]) == COMPLETE
    with caplog.at_level(logging.INFO):
        there = load_generator(str(file), device=DEVICE)
    if not REHEARSAL:
        assert there.kernels == "triton", caplog.text
    requests = [ImageRequest(f"p{i}", 0, str(i % 10) if i % 5 else "", seed=2**63 + i) for i in range(70)]
    assert np.array_equal(
        there.generate(requests).images, load_generator(str(file)).generate(requests).images
    )


@on_a_board
def test_pytorch_computes_the_integers_of_an_un0_checkpoint_if_forced(tmp_path, monkeypatch):
    file = tmp_path / "m.safetensors"
    assert convert.main([str(publish(tmp_path / "p.pt", "cifar10")), str(file)]) == COMPLETE
    requests = [ImageRequest(f"p{i}", 0, str(i), seed=i) for i in range(9)]
    expected = load_generator(str(file)).generate(requests).images
    monkeypatch.setenv("MILLIJOULE_KERNEL", "reference")
    there = load_generator(str(file), device=DEVICE)
    assert there.kernels == "pytorch"
    assert np.array_equal(there.generate(requests).images, expected)
