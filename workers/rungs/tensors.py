"""Tensors inside of what networks take and give: tuples, lists, dictionaries, outputs of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with `change` of every tensor in it; whatever else is in it stays."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):  # outputs of diffusers are ordered dictionaries with attributes
        changed = {k: map_tensors(v, change) for k, v in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, change) for v in value)
    return value
