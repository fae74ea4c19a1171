"""The optimisers of every training here: fused AdamW and Muon, whose steps can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from millijoule.kernels.processor import multiplies_bfloat16


def adamw(parameters: Any, device: str, **settings: Any) -> torch.optim.AdamW:
    """A fused AdamW whose step can be captured where `device` is a GPU."""
    optimizer = torch.optim.AdamW(parameters, fused=True, capturable=device.startswith("cuda"), **settings)
    _keep_rates_on(optimizer, device)
    return optimizer


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal, for weights that are matrices (Jordan et al. 2024).

    A weight of more dimensions counts as a matrix of its first by all others. Five Newton-Schulz iterations in the paper's
    coefficients, in bfloat16 where the device multiplies it: PyTorch's own Muon always does, which is slow on other
    processors, and takes matrices only. Decay is decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        device: str,
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._narrow = multiplies_bfloat16(device)
        _keep_rates_on(self, device)

    def step(self) -> None:  # type: ignore[override]
        self.step_unless(torch.zeros(()))

    @torch.no_grad()
    def step_unless(self, skipped: Tensor) -> None:
        """A step, or where `skipped`, a scalar on the device, is 1, none: its gradient is not finite (`clip_and_step`)."""
        taken = 1 - skipped
        for group in self.param_groups:
            for weights in group["params"]:
                state = self.state[weights]
                if not state:
                    state["momentum"] = torch.zeros_like(weights)
                gradient = torch.where(taken > 0, weights.grad, 0.0)
                state["momentum"].lerp_(gradient, (1 - group["momentum"]) * taken)
                direction = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
                rows, columns = direction.shape
                change = self._orthogonal(direction).view_as(weights) * max(1, rows / columns) ** 0.5
                weights.sub_((change + group["weight_decay"] * weights) * (group["lr"] * taken))

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.t() if tall else matrix).to(torch.bfloat16 if self._narrow else torch.float32)
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.t()
            x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
        return (x.t() if tall else x).to(matrix.dtype)


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
        if "capturable" in group:
            group["capturable"] = device.startswith("cuda")
    for moments in optimizer.state.values():
        if "step" in moments:
            moments["step"] = moments["step"].to(device)
    _keep_rates_on(optimizer, device)


def _keep_rates_on(optimizer: torch.optim.Optimizer, device: str) -> None:
    """As tensors on a GPU, where a captured step reads them anew; as plain numbers on a CPU."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if device.startswith("cuda") else rate
