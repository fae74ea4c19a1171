"""From the network that was trained to the one in integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from millijoule.kernels.oscillator import (
    MULTIPLIER_BITS,
    UNITS,
    pull_unit,
    quantize_coupling,
    quantize_rows,
)
from millijoule.kernels.phase import AMPLITUDE
from millijoule.workers.oscillators.config import SIDES
from millijoule.workers.oscillators.integer_network import LOGIT_UNIT, IntegerNetwork, Layer

if TYPE_CHECKING:
    from millijoule.workers.oscillators.float_network import FloatNetwork


@torch.no_grad()
def quantize(network: FloatNetwork) -> IntegerNetwork:
    """The integer form of `network`, whose activations' ranges are those its training saw.

    Raises:
        ValueError: a form that has none ("mlp").
    """
    config = network.config
    if config.coupling == "mlp":
        raise ValueError("a network without oscillators has no integer form")
    units = {  # of an activation of 1.0
        name: AMPLITUDE / float(most) for name, most in network.rounding.state_dict().items()
    }
    units = {name.removesuffix(".most"): unit for name, unit in units.items()}
    codes, code_scale = _rounded(network.code.weight)
    read_code = _layer(network.read_code.weight, network.read_code.bias, 1 / code_scale, units["hidden"])
    sums = 1 / (
        code_scale * _row_scale(network.read_code.weight)
    )  # of a hidden value of 1.0, in its row's sum
    dt = config.horizon / config.steps
    pull = torch.tensor([pull_unit(dt), pull_unit(dt), dt * UNITS], dtype=torch.float64)
    pull = pull.repeat_interleave(config.channels).repeat(config.cells)
    place = torch.round(network.place.double().reshape(len(SIDES), -1) * pull).to(torch.int32)
    flat = _convolution(network.near.weight), _convolution(network.near_again.weight)
    enlarge = network.enlarge.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [y, x, out; in]
    coupling = None
    if config.coupling != "none":
        coupling = quantize_coupling(network.local, network.gather, network.spread)
    return IntegerNetwork(
        config=config,
        codes=codes,
        sizes=torch.round(network.size.weight.double() * sums).to(torch.int32),
        place=place,
        read_code=read_code,
        drive=_layer(network.drive.weight, None, units["hidden"], pull),
        near=_layer(flat[0], network.near.bias, AMPLITUDE, units["near"]),
        enlarge=_layer(
            enlarge, network.enlarge.get_parameter("bias").repeat(4), units["near"], units["near"]
        ),
        near_again=_layer(flat[1], network.near_again.bias, units["near"], units["near_again"]),
        mix=_layer(network.mix.weight.flatten(1), network.mix.bias, units["near_again"], units["mix"]),
        share=_layer(network.share.weight.flatten(1), network.share.bias, units["mix"], LOGIT_UNIT),
        coupling=coupling,
    )


def _rounded(values: Tensor) -> tuple[Tensor, float]:
    """int8 values and what one of their units is."""
    scale = float(values.double().abs().max()) / AMPLITUDE
    return torch.round(values.double() / scale).to(torch.int8), scale


def _row_scale(weights: Tensor) -> Tensor:
    return quantize_rows(weights.flatten(1))[1]


def _convolution(weights: Tensor) -> Tensor:
    """`[out, in, 3, 3]` -> `[out, 9 in]`, as neighbours stand: row by row, each with its channels."""
    return weights.permute(0, 2, 3, 1).flatten(1)


def _layer(weights: Tensor, bias: Tensor | None, unit_in: float, unit_out: float | Tensor) -> Layer:
    """`unit_in`, `unit_out`: what an input and an output of 1.0 is in integers; of each output its own, where it is a tensor."""
    rows, scale = quantize_rows(weights)
    bias = torch.zeros(len(rows)) if bias is None else bias
    multiplier = torch.round(scale / unit_in * unit_out * 2**MULTIPLIER_BITS).to(torch.int64)
    limit = 2**30  # reached only by rows whose weights are all but zero
    bias = torch.round(bias.double() / scale * unit_in).clamp(-limit, limit)
    return Layer(rows, bias.to(torch.int32), multiplier)
