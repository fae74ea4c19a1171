"""Every fused form compiles for an H100 as it is launched there, at sizes of models people run, within its budget.

No GPU is asked: what is compiled is what NVIDIA's own tool then counts registers, spills and shared memory of.
"""

import pytest
import torch
from support.compiled_kernels import launches_of

from millijoule.kernels import ada_layer_norm, gated_activation, group_norm_silu, rms_norm_rope

pytestmark = pytest.mark.long

BF16, HALF, FLOAT = torch.bfloat16, torch.float16, torch.float32


def tensor(*shape, dtype=BF16, last=False):
    """Of that shape, with nothing behind it."""
    found = torch.empty(*shape, dtype=dtype, device="meta")
    return found.to(memory_format=torch.channels_last) if last else found


def assert_within(module, found):
    for r in found:
        assert r.spilled_bytes == 0, r
        assert r.registers <= module.MAX_REGISTERS, r
        assert r.shared_bytes <= module.MAX_SHARED_BYTES, r


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize(
    ("n", "channels", "side", "groups", "dtype", "kernels"),
    [
        (2, 320, 128, 32, BF16, 3),  # SDXL at 1024: the first level
        (2, 1920, 32, 32, HALF, 3),  # the lowest, with what skips to it
        (1, 128, 1024, 32, FLOAT, 3),  # the last block of a decoder, which often needs float32
        (2, 2560, 8, 32, BF16, 1),  # Stable Diffusion's middle
        (256, 64, 16, 16, HALF, 1),  # the packaged baseline's
    ],
    ids=["sdxl", "sdxl low", "decoder", "sd middle", "baseline"],
)
def test_group_norm_silu(n, channels, side, groups, dtype, kernels, last):
    x = tensor(n, channels, side, side, dtype=dtype, last=last)
    row = tensor(channels, dtype=dtype)
    before, scale, shift = tensor(n, 3 * channels, dtype=dtype).chunk(3, 1)
    more = {"before": before, "scale": scale, "shift": shift}
    found = launches_of(group_norm_silu.group_norm_silu, x, groups, row, row, 1e-5, **more)
    assert len(found) == kernels
    assert_within(group_norm_silu, found)


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
@pytest.mark.parametrize(
    ("tokens", "width"), [(4608, 3072), (1024, 2240), (4096, 12288)], ids=["flux", "sana", "widest"]
)
def test_ada_layer_norm(tokens, width, dtype):
    x, rows = tensor(2, tokens, width, dtype=dtype), tensor(2, 3 * width, dtype=dtype).chunk(3, 1)
    assert_within(ada_layer_norm, launches_of(ada_layer_norm.ada_layer_norm, x, *rows[:2]))
    assert_within(ada_layer_norm, launches_of(ada_layer_norm.gated_ada_layer_norm, x, rows[0], x, *rows[1:]))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gated_activation(activation):
    for dtype in (BF16, FLOAT):
        x = tensor(2, 4096, 10240, dtype=dtype)
        assert_within(gated_activation, launches_of(gated_activation.gated_activation, x, activation))


def test_rms_norm_rope():
    for dtype in (BF16, FLOAT):
        query = tensor(1, 4096, 3 * 3072, dtype=dtype).chunk(3, -1)[0].unflatten(-1, (24, 128))
        turn = tensor(4096, 64, dtype=FLOAT)
        for more in ((), (turn, turn)):
            found = launches_of(rms_norm_rope.rms_norm_rope, query, tensor(128, dtype=dtype), 1e-6, *more)
            assert_within(rms_norm_rope, found)
