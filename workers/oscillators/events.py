"""How much of a trajectory an event-driven coupling would have to send: what changes from step to step, in the integers' own values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from millijoule.kernels.phase import sin_cos
from millijoule.workers.oscillators.integer_network import IntegerNetwork


@dataclass(frozen=True)
class Events:
    """Of each step, in order: share of oscillators whose sine and cosine are those of the step before, which need send nothing;
    share of icons of which that is true of all oscillators, which are at rest and could leave the batch."""

    unchanged: tuple[float, ...]
    at_rest: tuple[float, ...]


@torch.inference_mode()
def count_events(network: IntegerNetwork, noun: Tensor, variant: Tensor) -> Events:
    """Of icons; `noun` and `variant` int64 `[icons]`. A sine and a cosine are entries of the tables of 8 bits that all sums are of."""
    unchanged, at_rest = [], []
    before: Tensor | None = None
    for phases in network.trajectory(noun, variant):
        now = torch.stack(sin_cos(phases))
        if before is not None:
            same = (now == before).all(0).flatten(1)
            unchanged.append(float(same.double().mean()))
            at_rest.append(float(same.all(1).double().mean()))
        before = now
    return Events(tuple(unchanged), tuple(at_rest))
