"""The optimiser of every training here: fused AdamW whose step can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def adamw(parameters: Any, device: str, **settings: Any) -> torch.optim.AdamW:
    """A fused AdamW whose step can be captured where `device` is a GPU."""
    optimizer = torch.optim.AdamW(parameters, fused=True, capturable=device.startswith("cuda"), **settings)
    _keep_rates_on(optimizer, device)
    return optimizer


def clip_and_step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], limit: float
) -> dict[str, Tensor]:
    """Clip the gradient to the norm `limit` and take a step with it, none where it is not finite.

    Returns:
        "gradient", the norm before clipping (0 where it is not finite), and "skipped", 1 where no step was taken.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    skipped = (~torch.isfinite(norm)).float()
    optimizer.found_inf = skipped  # type: ignore[attr-defined]  # what a gradient scaler tells the fused step
    optimizer.step()
    return {"gradient": norm.nan_to_num(0.0, 0.0, 0.0), "skipped": skipped}


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], device: str) -> None:
    """Continue from a state that may have been saved on another kind of device."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["capturable"] = device.startswith("cuda")
    for moments in optimizer.state.values():
        moments["step"] = moments["step"].to(device)
    _keep_rates_on(optimizer, device)


def _keep_rates_on(optimizer: torch.optim.Optimizer, device: str) -> None:
    """As tensors on a GPU, where a captured step reads them anew; as plain numbers on a CPU."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if device.startswith("cuda") else rate
