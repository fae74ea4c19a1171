"""Un-0's sampling as it publishes it, written anew from its equations: what our forms are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

#: Of the published CIFAR-10 models.
DRIVERS, CLASSES, BLOCKS, STEPS = 8, 10, 3, 10


def random_checkpoint(n: int, gain: float) -> tuple[Any, dict[str, Any]]:
    """An architecture and tensors as Un-0's CIFAR-10 training starts from, the drawn image a little stronger: it has contrast."""
    import torch

    from millijoule.workers.generators.un0_checkpoint import Un0Architecture

    architecture = Un0Architecture(
        n, DRIVERS, CLASSES, BLOCKS, "standard", "mean_relative", "sin_cos", "euler", STEPS
    )
    random = torch.Generator().manual_seed(n)
    strengths = {
        "dynamics.omega": 1.0,
        "dynamics.omega_cond": 1.0,
        "dynamics.K": gain * n**-0.5,
        "dynamics.K_cond": DRIVERS**-0.5,
        "dynamics.K_drive": DRIVERS**-0.5,
    }
    tensors = {}
    for name, shape in architecture.shapes().items():
        if name.endswith("weight"):
            strength = math.sqrt(2 / (1.04 * 9 * shape[1])) if "cascade" in name else 0.05
        else:
            strength = strengths.get(name, 0.1)
        tensors[name] = torch.randn(shape, generator=random) * strength
    return architecture, tensors


def own_loops(
    n: int, tensors: dict[str, Any], batches: Sequence[int], compiled: bool
) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Un-0's loop in its ways of running, by name: images per call, and the call."""
    import torch
    from torch import nn

    class Dynamics(nn.Module):
        K: torch.Tensor
        K_cond: torch.Tensor
        omega: torch.Tensor
        omega_cond: torch.Tensor

        def __init__(self, prepared: bool) -> None:
            super().__init__()
            for name in ("K", "K_cond", "omega", "omega_cond"):
                self.register_buffer(name, tensors[f"dynamics.{name}"].clone())
            self.prepared = prepared
            if prepared:
                self.K.fill_diagonal_(0)
                self.K_cond.fill_diagonal_(0)

        def between_others(self, coupling: torch.Tensor) -> torch.Tensor:
            return coupling if self.prepared else coupling - torch.diag_embed(coupling.diagonal())

        def forward(self, state: torch.Tensor, drive: torch.Tensor) -> torch.Tensor:
            theta, phi = state[:, :n], state[:, n:]
            sin, cos, driver_sin, driver_cos = theta.sin(), theta.cos(), phi.sin(), phi.cos()
            coupling, driver_coupling = self.between_others(self.K), self.between_others(self.K_cond)
            main = self.omega + cos * (sin @ coupling.T) - sin * (cos @ coupling.T)
            driven = (
                torch.bmm(drive, driver_sin[..., None])[..., 0],
                torch.bmm(drive, driver_cos[..., None])[..., 0],
            )
            own = driver_cos * (driver_sin @ driver_coupling.T) - driver_sin * (
                driver_cos @ driver_coupling.T
            )
            return torch.cat([main + cos * driven[0] - sin * driven[1], self.omega_cond + own], 1)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for block in range(BLOCKS):
                layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
                for place in (1, 3):
                    layers += [_convolution(f"cascade.{block}.net.{place}"), nn.LeakyReLU(0.2, inplace=True)]
            self.layers = nn.Sequential(*layers, _convolution("to_output"))

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layers(features.view(len(features), -1, 4, 4)))

    def _convolution(name: str) -> nn.Module:
        weight, bias = tensors[f"decoder.{name}.weight"], tensors[f"decoder.{name}.bias"]
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        layer.load_state_dict({"weight": weight, "bias": bias})
        return layer

    drive = tensors["dynamics.K_drive"]

    def draw(dynamics: Callable[..., Any], decoder: Callable[..., Any], images: int) -> torch.Tensor:
        state = torch.rand(images, n + DRIVERS) * (2 * math.pi) - math.pi
        own = drive[torch.arange(images) % CLASSES]
        for _ in range(STEPS):
            state = state + dynamics(state, own) / STEPS
        phases = state[:, :n]
        phases = phases - phases.mean(1, keepdim=True)
        pixels = decoder(torch.cat([phases.sin(), phases.cos()], 1))
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    ways: dict[str, tuple[Any, Any]] = {
        "own loop": (Dynamics(False).eval(), Decoder().eval()),
        "own loop, diagonal once": (Dynamics(True).eval(), Decoder().eval()),
    }
    if compiled:
        import torch._dynamo

        # each way and batch is a compilation of the same code: beyond eight, the rest would run as it is, unsaid
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 4 * len(ways) * len(batches)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        ways |= {
            f"{name}, compiled": (
                torch.compile(dynamics, dynamic=False),
                torch.compile(decoder, dynamic=False),
            )
            for name, (dynamics, decoder) in ways.items()
        }
    return {
        f"{name}, batch {batch}": (batch, partial(draw, dynamics, decoder, batch))
        for name, (dynamics, decoder) in ways.items()
        for batch in batches
    }
