"""RMSNorm and rotation of a query's heads are what the equations say, rounded once, written where they are wanted."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.interpreted import interpreted
from support.rounding import assert_rounded_once

from millijoule.kernels.rms_norm_rope import rms_norm_rope, rms_norm_rope_reference


def rotated(x, weight, eps, cos, sin):
    """In float64, by complex numbers: a rotation is a product with cos + i sin."""
    y = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.double()
    if cos is None:
        return y
    turn = torch.complex(cos.double(), sin.double())[None, :, None]
    return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


def into_a_part(x, weight, eps, cos, sin):
    """Written behind two tokens of a longer sequence; the whole of it."""
    joint = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), 7.0, dtype=x.dtype)
    rms_norm_rope(x, weight, eps, cos, sin, out=joint[:, 2:-1])
    return joint


@given(
    n=st.integers(1, 2),
    tokens=st.integers(1, 5),
    heads=st.integers(1, 5),
    half=st.integers(1, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    parts=st.sampled_from(["", "weight", "rotation", "all"]),
    repeated=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(2, 3, 5, 12, torch.bfloat16, "all", True, 0)
@settings(max_examples=20, deadline=None)
def test_it_is_the_equation(n, tokens, heads, half, dtype, parts, repeated, seed):
    g = torch.Generator().manual_seed(seed)
    joint = torch.randn(n, tokens, 3 * heads * 2 * half, generator=g).to(dtype)
    x = joint.chunk(3, -1)[1].unflatten(
        -1, (heads, 2 * half)
    )  # as projections of query, key and value in one lie
    weight = torch.randn(2 * half, generator=g).to(dtype) if parts in ("weight", "all") else None
    angle = torch.rand(tokens, half, generator=g) * 6
    cos, sin = (angle.cos(), angle.sin()) if parts in ("rotation", "all") else (None, None)
    if cos is not None and repeated:  # as FLUX keeps them: every value twice
        cos, sin = (t.repeat_interleave(2, 1)[:, ::2] for t in (cos, sin))
    exact = rotated(x, weight, 1e-5, cos, sin)
    found = interpreted(rms_norm_rope, x, weight, 1e-5, cos, sin)
    assert_rounded_once(found, exact, dtype, size=10)
    whole = interpreted(into_a_part, x, weight, 1e-5, cos, sin)
    assert torch.equal(whole[:, 2:-1], found)
    assert bool((whole[:, :2] == 7).all())
    assert bool((whole[:, -1] == 7).all())
    widened = (None if t is None else t.double() for t in (cos, sin))
    plain = rms_norm_rope_reference(x.double(), None if weight is None else weight.double(), 1e-5, *widened)
    torch.testing.assert_close(plain, exact, rtol=1e-6, atol=1e-6)  # the rotation is in float32 there


def test_a_token_has_the_same_bits_in_any_batch_and_a_bad_head_is_alone():
    x = torch.randn(3, 4, 5, 16)
    angle = torch.rand(4, 8)
    together = interpreted(rms_norm_rope, x, None, 1e-6, angle.cos(), angle.sin())
    assert torch.equal(
        interpreted(rms_norm_rope, x[1:2], None, 1e-6, angle.cos(), angle.sin()), together[1:2]
    )
    x[0, 1, 2, 3] = float("nan")
    found = interpreted(rms_norm_rope, x, None, 1e-6, angle.cos(), angle.sin())
    assert found[0, 1, 2].isnan().all()
    found[0, 1, 2] = together[0, 1, 2]
    assert torch.equal(found, together)


def test_what_it_does_not_take_goes_the_plain_way():
    for x in (
        torch.randn(1, 2, 2, 8, dtype=torch.float64),
        torch.randn(1, 2, 2, 1026),
        torch.randn(0, 2, 2, 8),
    ):
        found = interpreted(rms_norm_rope, x, None, 1e-6)
        torch.testing.assert_close(found.double(), rotated(x, None, 1e-6, None, None), rtol=1e-5, atol=1e-5)
