"""GEGLU and SwiGLU are value times activated gate, rounded once, for all values there are."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.interpreted import interpreted, with_constants
from support.rounding import assert_rounded_once

from millijoule.kernels.gated_activation import gated_activation, gated_activation_reference

ACTIVATIONS = ("gelu", "gelu_tanh", "silu")


def activated(gate, activation):
    """In float64, by the definition."""
    if activation == "silu":
        return gate / (1 + torch.exp(-gate))
    if activation == "gelu":
        return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    leading=st.lists(st.integers(1, 4), max_size=2),
    width=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example([2, 3], 37, torch.bfloat16, True, 0)
@settings(max_examples=12, deadline=None)
def test_it_is_the_equation(activation, leading, width, dtype, strided, seed):
    g = torch.Generator().manual_seed(seed)
    x = (4 * torch.randn(*leading, 2 * width, 2, generator=g)).to(dtype)
    x = x[..., 0] if strided else x[..., 0].contiguous()
    value, gate = x.double()[..., :width], x.double()[..., width:]
    exact = value * activated(gate, activation)
    found = interpreted(with_constants, gated_activation, {"BLOCK": 16}, x, activation)
    assert_rounded_once(found, exact, dtype, size=0.3)
    torch.testing.assert_close(gated_activation_reference(x.double(), activation), exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_are_those_of_pytorch(activation, dtype):
    """Large gates neither overflow where PyTorch's do not, nor hide what is not a number."""
    top = torch.finfo(dtype).max
    gates = torch.tensor([0.0, 1e-4, -1e-4, 30.0, -30.0, 200.0, -200.0, top, -top, math.nan, math.inf], dtype=dtype)  # fmt: skip
    x = torch.stack([torch.cat([value.expand(len(gates)), gates]) for value in torch.tensor([1.0, -2.0], dtype=dtype)])  # fmt: skip
    found = interpreted(gated_activation, x, activation)
    plain = gated_activation_reference(x, activation)
    torch.testing.assert_close(found, plain, rtol=2e-3, atol=1e-7, equal_nan=True)


def test_what_it_does_not_take_goes_the_plain_way():
    for x in (torch.randn(3, 8, dtype=torch.float64), torch.randn(0, 8)):
        found = interpreted(gated_activation, x)
        torch.testing.assert_close(found, x[:, :4] * activated(x[:, 4:], "gelu"))
