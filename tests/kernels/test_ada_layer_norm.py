"""A modulated LayerNorm, with and without a gated residual before it, is what the equations say, rounded once."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.interpreted import interpreted
from support.rounding import assert_rounded_once

from millijoule.kernels.ada_layer_norm import (
    ada_layer_norm,
    ada_layer_norm_reference,
    gated_ada_layer_norm,
    gated_ada_layer_norm_reference,
)

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def modulated(h, scale, shift, eps, weight=None, bias=None):
    """In float64, by the definition."""
    h = h.double()
    mean = h.mean(-1, keepdim=True)
    y = (h - mean) / torch.sqrt(((h - mean) ** 2).mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    return y * (1 + scale.double()[:, None]) + shift.double()[:, None]


@given(
    n=st.integers(1, 3),
    tokens=st.integers(1, 6),
    width=st.integers(2, 70),
    dtype=DTYPES,
    modulation=DTYPES,
    affine=st.sampled_from(["", "weight", "both"]),
    strided=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(2, 3, 64, torch.bfloat16, torch.bfloat16, "", False, 0)
@example(1, 1, 2, torch.float16, torch.float32, "both", True, 0)
@settings(max_examples=20, deadline=None)
def test_it_is_the_equation(n, tokens, width, dtype, modulation, affine, strided, seed):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=g).to(dtype)

    x, update = normal(n, 2 * tokens, width), normal(n, 2 * tokens, width)
    x, update = (x[:, ::2], update[:, ::2]) if strided else (x[:, :tokens], update[:, :tokens])
    scale, shift, gate = normal(n, 3 * width, dtype=modulation).chunk(3, 1)
    weight = normal(width) if affine else None
    bias = normal(width) if affine == "both" else None
    found = interpreted(ada_layer_norm, x, scale, shift, 1e-3, weight=weight, bias=bias)
    exact = modulated(x, scale, shift, 1e-3, weight, bias)
    assert_rounded_once(found, exact, torch.promote_types(dtype, modulation), 20)
    plain = ada_layer_norm_reference(
        x.double(), scale.double(), shift.double(), 1e-3,
        weight=None if weight is None else weight.double(), bias=None if bias is None else bias.double(),
    )  # fmt: skip
    torch.testing.assert_close(plain, exact)

    h, out = interpreted(gated_ada_layer_norm, x, gate, update, scale, shift, 1e-3)
    summed = x.double() + gate.double()[:, None] * update.double()
    assert_rounded_once(h, summed, torch.promote_types(dtype, modulation))
    assert_rounded_once(out, modulated(h, scale, shift, 1e-3), h.dtype, 20)
    plain = gated_ada_layer_norm_reference(*(t.double() for t in (x, gate, update, scale, shift)), eps=1e-3)
    torch.testing.assert_close(plain, (summed, modulated(summed, scale, shift, 1e-3)))


def test_a_token_has_the_same_bits_in_any_batch_and_a_bad_one_is_alone():
    x, scale, shift = torch.randn(4, 5, 30), torch.randn(4, 30), torch.randn(4, 30)
    together = interpreted(ada_layer_norm, x, scale, shift)
    assert torch.equal(interpreted(ada_layer_norm, x[2:3], scale[2:3], shift[2:3]), together[2:3])
    x[1, 2, 3] = float("nan")
    found = interpreted(ada_layer_norm, x, scale, shift)
    assert found[1, 2].isnan().all()
    found[1, 2] = together[1, 2]
    assert torch.equal(found, together)


def test_a_large_mean_costs_nothing():
    x = 1e4 + torch.randn(1, 3, 50)
    none = torch.zeros(1, 50)
    assert_rounded_once(
        interpreted(ada_layer_norm, x, none, none), modulated(x, none, none, 1e-6), torch.float32, 100
    )


@pytest.mark.parametrize(
    ("x", "row"),
    [
        (torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)),
        (torch.randn(2, 3, 8), torch.randn(1, 8)),  # one row for all samples
        (torch.randn(1, 2, 20000), torch.randn(1, 20000)),  # wider than a program holds
        (torch.randn(0, 3, 8), torch.randn(0, 8)),
    ],
    ids=["float64", "one row", "wide", "empty"],
)
def test_what_it_does_not_take_goes_the_plain_way(x, row):
    found = interpreted(ada_layer_norm, x, row, row)
    torch.testing.assert_close(found.double(), modulated(x, row, row, 1e-6), rtol=1e-4, atol=1e-4)
    h, out = interpreted(gated_ada_layer_norm, x, row.expand(len(x), -1), x, row.expand(len(x), -1), row)
    assert h.shape == out.shape == x.shape
