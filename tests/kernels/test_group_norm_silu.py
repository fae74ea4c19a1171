"""GroupNorm with SiLU is what the equation says, in float64, rounded once: whatever the shape, the layout and the type."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from support.interpreted import interpreted, with_constants
from support.rounding import assert_rounded_once

from millijoule.kernels.group_norm_silu import group_norm_silu, group_norm_silu_reference, tile

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
#: With these, tensors of some hundred values go the way of large ones.
SMALL = {"WHOLE_GROUP": 16, "TILE": 64, "TILE_CHANNELS": 8, "TILES_PER_PROGRAM": 2}


def equation(x, groups, weight, bias, eps, before, scale, shift, activate):
    """By the definition, in float64; `[n, channels, positions]`."""
    n, channels = x.shape[:2]
    h = x.double().flatten(2)
    if before is not None:
        h = h + before.double()[:, :, None]
    grouped = h.reshape(n, groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
    y = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(n, channels, -1)
    if weight is not None:
        y = y * weight.double()[:, None] + bias.double()[:, None]
    if scale is not None:
        y = y * (1 + scale.double()[:, :, None]) + shift.double()[:, :, None]
    return (y / (1 + torch.exp(-y)) if activate else y).reshape(x.shape)


@given(
    n=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
    height=st.integers(1, 6),
    width=st.integers(1, 7),
    dtype=DTYPES,
    last=st.booleans(),
    parts=st.sampled_from(["", "affine", "before", "modulated", "all"]),
    activate=st.booleans(),
    large=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(3, 2, 5, 9, 9, torch.float16, True, "all", True, True, 1)
@example(1, 1, 2, 1, 1, torch.float32, False, "all", True, False, 1)
@example(2, 3, 5, 1, 3, torch.bfloat16, True, "affine", True, True, 1)
@settings(max_examples=18, deadline=None)
def test_it_is_the_equation(n, groups, per_group, height, width, dtype, last, parts, activate, large, seed):
    assume(n * per_group * height * width > 1)  # PyTorch's own refuses a single value
    channels, g = groups * per_group, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    x = 3 * normal(n, channels, height, width) + 2
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = (normal(channels), normal(channels)) if parts in ("affine", "all") else (None, None)
    before = normal(n, channels) if parts in ("before", "all") else None
    scale, shift = (None, None)
    if parts in ("modulated", "all"):
        scale, shift = normal(n, 2 * channels).chunk(2, 1)  # not contiguous, as a projection's halves are not
    more = {"before": before, "scale": scale, "shift": shift, "activate": activate}
    found = interpreted(
        with_constants, group_norm_silu, SMALL if large else {}, x, groups, weight, bias, 1e-3, **more
    )
    exact = equation(x, groups, weight, bias, 1e-3, *more.values())
    size = 1 + 30 * float(max((t.abs().max() for t in (weight, scale) if t is not None), default=0)) ** 2
    assert_rounded_once(found, exact, dtype, size)
    assert found.stride() == x.stride()
    plain = group_norm_silu_reference(
        x.double(), groups, *(None if t is None else t.double() for t in (weight, bias)), 1e-3,
        **{name: t.double() if isinstance(t, torch.Tensor) else t for name, t in more.items()},
    )  # fmt: skip
    torch.testing.assert_close(plain, exact)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("constants", [{}, SMALL], ids=["whole", "tiles"])
def test_an_image_has_the_same_bits_alone_and_in_any_batch(last, constants):
    x = torch.randn(5, 6, 7, 4)
    x = x.to(memory_format=torch.channels_last) if last else x
    emb = torch.randn(5, 6)

    def draw(rows):
        return interpreted(with_constants, group_norm_silu, constants, x[rows], 3, before=emb[rows])

    together = draw([0, 1, 2, 3, 4])
    assert torch.equal(draw([3]), together[3:4])
    assert torch.equal(draw([4, 1]), together[[4, 1]])


@pytest.mark.parametrize("constants", [{}, SMALL], ids=["whole", "tiles"])
def test_a_large_mean_and_huge_values_lose_nothing(constants):
    """Sums of squares without the mean taken off would leave nothing of a variance of 1 beside a mean of 10,000."""
    x = 1e4 + torch.randn(2, 4, 6, 6)
    found = interpreted(with_constants, group_norm_silu, constants, x, 2, activate=False)
    assert_rounded_once(found, equation(x, 2, None, None, 1e-5, None, None, None, False), torch.float32, 500)
    half = torch.full((1, 2, 8, 8), 65504.0, dtype=torch.float16)
    half[:, :, ::2] = -65504.0
    found = interpreted(with_constants, group_norm_silu, constants, half, 1, activate=False)
    assert torch.equal(found.float(), half.sign().float())


@pytest.mark.parametrize("constants", [{}, SMALL], ids=["whole", "tiles"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(constants, bad):
    x = torch.randn(2, 6, 5, 5)
    x[1, 2, 3, 3] = bad
    found = interpreted(with_constants, group_norm_silu, constants, x, 3)
    assert found[1, 2:4].isnan().all()
    assert found[0].isfinite().all()
    assert found[1, [0, 1, 4, 5]].isfinite().all()


def test_layouts_that_are_neither_and_types_it_does_not_know_go_the_plain_way():
    x = torch.randn(2, 4, 6, 10)[:, :, :, ::2]
    found = interpreted(group_norm_silu, x, 2)
    assert_rounded_once(found, equation(x, 2, None, None, 1e-5, None, None, None, True), torch.float32)
    assert interpreted(group_norm_silu, x.double(), 2).dtype == torch.float64
    flat = torch.randn(2, 4, 9)  # as in attention over an image
    found = interpreted(group_norm_silu, flat, 2, activate=False)
    assert_rounded_once(found, equation(flat, 2, None, None, 1e-5, None, None, None, False), torch.float32)
    assert group_norm_silu(x, 2).device.type == "cpu"  # no interpreter in this process, and no GPU
    assert interpreted(group_norm_silu, x[:0], 2).shape == (0, 4, 6, 5)


@given(st.integers(1, 4000), st.integers(1, 2**22), st.booleans())
def test_a_tile_holds_what_a_program_can(channels, positions, last):
    block_c, block_p = tile(channels, positions, last)
    assert 1 <= block_c * block_p <= 4096
    assert block_c == 1 << (block_c.bit_length() - 1)
    assert block_p == 1 << (block_p.bit_length() - 1)
