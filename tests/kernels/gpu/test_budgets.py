"""The integer kernels compile for three generations of GPUs as they are launched there, within committed budgets and without spills.

`budgets.json` has, by target and kernel, the most registers of a thread and shared bytes of a block. Registers times threads decide how
many blocks run beside each other; shared bytes decide whether weights stay on the chip.
"""

import json
from pathlib import Path

import pytest
import torch
from support.compiled_kernels import A100, B200, H100, launches_of

from millijoule.kernels.gpu import dense_coupling as gpu_dense_coupling
from millijoule.kernels.gpu import image as gpu_image
from millijoule.kernels.gpu import image_coupling, image_model
from millijoule.kernels.gpu.dense_coupling import DenseWork, PackedCoupling, StepNumbers
from millijoule.kernels.gpu.dense_weights import PackedWeights
from millijoule.kernels.gpu.upsampling_decoder import PackedConvolution, decode_packed
from millijoule.workers.generators.registry import PACKAGED
from millijoule.workers.oscillators.model_file import load_model

pytestmark = pytest.mark.long

BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text())
TARGETS = {"sm_80": A100, "sm_90": H100, "sm_100": B200}
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
#: Shared bytes that a block may have (CUDA C++ Programming Guide, table of compute capabilities).
MOST_SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
REGISTERS_OF_A_MULTIPROCESSOR = 65536
STEPS = 2


def meta(*shape, dtype=torch.int32):
    """With nothing behind it."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def assert_within(found, target, name):
    """Of kernels that are launched often, what the largest launch needs."""
    needed = {}
    for r in found:
        assert r.spilled_bytes == 0, r
        assert r.registers * 32 * r.warps <= REGISTERS_OF_A_MULTIPROCESSOR, r
        assert r.shared_bytes <= MOST_SHARED_BYTES[target], r
        before = needed.get(r.kernel, (0, 0))
        needed[r.kernel] = max(before[0], r.registers), max(before[1], r.shared_bytes)
    budget = BUDGETS[target][name]
    assert set(needed) == set(budget)
    over = {
        kernel: (found, budget[kernel])
        for kernel, found in needed.items()
        if any(a > b for a, b in zip(found, budget[kernel], strict=True))
    }
    assert over == {}, "registers and shared bytes: found, allowed"


@pytest.mark.parametrize("model", ["default", "coupled"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_image_kernels(target, model):
    painter, _ = load_model(PACKAGED[model])
    packed = image_model.pack(painter.kernel_weights(), "meta")
    images, most = 4096, MULTIPROCESSORS[target]
    work = image_model.Work.empty(packed, images, "meta")
    coupled = packed.coupling and image_coupling.pack_steps(packed.coupling, 10, 2 * most, "meta")
    found = launches_of(
        gpu_image.draw_images,
        *(packed, work, meta(images, 17, dtype=torch.int64), meta(images, dtype=torch.int64)),
        *(meta(images, 64, 64, 3, dtype=torch.uint8), 10, most, target != "sm_80", coupled),
        target=TARGETS[target],
    )
    assert_within(found, target, "image" if model == "default" else "image, coupled")


def dense(n, fine_every, blocks=0):
    """Un-0's sizes, as strong as it starts from; block-sparse with so many blocks in each row of them."""
    if blocks:
        stored = n // 64 * blocks
        values = meta(stored, 64, 128, dtype=torch.int8)
        square = PackedWeights(n, values, meta(stored), meta(n // 64 + 1), blocks)
    else:
        square = PackedWeights(n, meta(n, n, dtype=torch.int8), meta(1), meta(1))
    packed = PackedCoupling(
        n=n,
        m=8,
        coarse=square,
        fine=square if fine_every else None,
        fine_every=fine_every,
        drive=meta(10, 8, n, dtype=torch.int16),
        driver_coupling=meta(8, 8, dtype=torch.int16),
        waves=meta(1024),
        fine_waves=meta(4096),
    )
    return (
        packed,
        StepNumbers(meta(3, n), meta(8), 123456, 12345, 11),
        DenseWork.empty(packed, 256, STEPS, "meta"),
    )


@pytest.mark.parametrize("fine_every", [0, 1], ids=["coarse", "fine"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_of_dense_coupling(target, fine_every):
    found = launches_of(gpu_dense_coupling.run_steps, *dense(4096, fine_every), STEPS, target=TARGETS[target])
    assert_within(found, target, "dense_coupling" + (", fine" if fine_every else ""))


@pytest.mark.parametrize("n", gpu_dense_coupling.RESIDENT)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_dense_coupling_with_k_on_the_chip(target, n):
    """All blocks of a batch of 256 run at once: they wait for each other."""
    most = MULTIPROCESSORS[target]
    found = launches_of(gpu_dense_coupling.run_resident, *dense(n, 0), STEPS, most, target=TARGETS[target])
    assert len(found) == 3  # one launch for all steps of 256 images
    assert_within(found, target, f"dense_coupling, {n} on the chip")
    assert found[-1].programs <= most
    assert found[-1].shared_bytes >= 128 * 1024  # K is there


@pytest.mark.parametrize("fine_every", [0, 1], ids=["coarse", "fine"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_of_block_sparse_coupling(target, fine_every):
    found = launches_of(
        gpu_dense_coupling.run_steps, *dense(4096, fine_every, 16), STEPS, target=TARGETS[target]
    )
    assert_within(found, target, "dense_coupling, block-sparse" + (", fine" if fine_every else ""))


@pytest.mark.parametrize("n", gpu_dense_coupling.RESIDENT_SPARSE)
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_block_sparse_coupling_with_k_on_the_chip(target, n):
    """Half of K of 4,096 oscillators, a quarter of that of 8,192: as many blocks as may stay."""
    most, blocks = MULTIPROCESSORS[target], gpu_dense_coupling.RESIDENT_BLOCKS
    found = launches_of(
        gpu_dense_coupling.run_resident, *dense(n, 0, blocks), STEPS, most, target=TARGETS[target]
    )
    assert_within(found, target, "dense_coupling, block-sparse on the chip")
    assert all(launch.programs <= most for launch in found if launch.kernel == "step_resident")
    assert found[-1].shared_bytes >= 128 * 1024  # K is there


@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_a_decoder(target):
    """Of Un-0's 4,096 oscillators, 64 by 64 pixels."""
    layers, channels = [], 512
    for taken, given, parities, side in (
        *((512, 256, 4, 2), (256, 256, 1, 3), (256, 128, 4, 2), (128, 128, 1, 3)),
        (128, 16, 1, 3),
    ):
        numbers = (meta(parities, given), meta(parities, given), meta(parities, given, dtype=torch.float32))
        weights = meta(2, parities, side * side, given, taken, dtype=torch.int8)
        layers.append(PackedConvolution(weights, *numbers, side))
    features = meta(2, 256, 4, 4, channels, dtype=torch.int8)
    found = launches_of(
        decode_packed, layers, meta(8193, dtype=torch.uint8), features, target=TARGETS[target]
    )
    assert_within(found, target, "upsampling_decoder")
