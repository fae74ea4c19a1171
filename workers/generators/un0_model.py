"""The networks of an Un-0 model: how fast its phases turn, and what its decoder makes of them. `un0` has the equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from millijoule.workers.generators.un0_checkpoint import Un0Architecture

#: What the coupling's sums are made in. On a CPU, float32 sums depend on the number of threads; float64 sums do too, but
#: so little that hardly any phase, being float32, is rounded differently.
FIELD_TYPE = {"cpu": torch.float64, "cuda": torch.float32}

#: Slope of the decoder's activation below zero.
LEAK = 0.2


class Un0Dynamics(nn.Module):
    """Time derivative of the state `[batch, n + m]` under drive `[batch, n, m]`.

    Args:
        tensors: float32, by their published names, on the device.
        kind: "cpu" or "cuda".
    """

    frequency: Tensor
    coupling: Tensor
    driver_coupling: Tensor

    def __init__(self, architecture: Un0Architecture, tensors: Mapping[str, Tensor], kind: str) -> None:
        super().__init__()
        self.oscillators = architecture.oscillators
        frequency = torch.cat([tensors["dynamics.omega"], tensors["dynamics.omega_cond"]], dim=1)
        coupling = between_others(tensors["dynamics.K"], architecture.coupling_scale)
        driver_coupling = between_others(tensors["dynamics.K_cond"], architecture.driver_scale)
        self.register_buffer("frequency", frequency)  # [1, n + m]
        self.register_buffer("coupling", coupling.to(FIELD_TYPE[kind]))  # [n, n]
        self.register_buffer("driver_coupling", driver_coupling)  # [m, m]

    def forward(self, state: Tensor, drive: Tensor) -> Tensor:
        n, batch = self.oscillators, len(state)
        sin, cos = torch.sin(state), torch.cos(state)
        sources = torch.cat([sin, cos])  # [2 batch, n + m]
        main, drivers = sources[:, :n], sources[:, n:]
        waves = drivers.view(2, batch, -1).permute(1, 2, 0)  # [batch, m, 2]
        driven = torch.bmm(drive, waves).permute(2, 0, 1).reshape(2 * batch, n)
        coupled = (main.to(self.coupling.dtype) @ self.coupling.T).float()
        field = torch.cat([coupled + driven, drivers @ self.driver_coupling.T], dim=1)
        return self.frequency + cos * field[:batch] - sin * field[batch:]


class Un0Decoder(nn.Module):
    """Features `[batch, channels, 4, 4]` to images `[batch, 3, size, size]` before their tanh."""

    def __init__(self, architecture: Un0Architecture, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        places = [f"cascade.{b}.net.{p}" for b in range(architecture.blocks) for p in (1, 3)]
        self.cascade = nn.ModuleList(_Convolution(tensors, f"decoder.{place}") for place in places)
        self.to_output = _Convolution(tensors, "decoder.to_output")

    def forward(self, x: Tensor) -> Tensor:
        for number, convolve in enumerate(self.cascade):
            if number % 2 == 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.leaky_relu(convolve(x), LEAK)
        return self.to_output(x)


class _Convolution(nn.Module):
    """3 x 3, with the tensors that are there: `nn.Conv2d` would draw random ones first."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(tensors[f"{name}.weight"], requires_grad=False)
        self.bias = nn.Parameter(tensors[f"{name}.bias"], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=1)


def between_others(coupling: Tensor, scale: float) -> Tensor:
    """The effective coupling: scaled, and no oscillator coupled to itself."""
    return (coupling * scale).fill_diagonal_(0)
