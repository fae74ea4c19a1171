"""A training step as one CUDA graph: launched as a whole, so that a fast GPU does not wait for Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

#: Steps that run as usual before the capture; compilation and lazily made buffers belong in them.
WARM_UP = 3

StepFunction = Callable[..., dict[str, Tensor]]


class GraphedStep:
    """Calls `step(**inputs)`: the first `WARM_UP` times as it is, from then on as replays of a captured graph.

    Every call is one real step. `step` must do the same work whatever its inputs hold, read nothing back to the host,
    and keep what lasts (weights, moments, learning rate) in the same tensors.
    """

    def __init__(self, step: StepFunction) -> None:
        self._step = step
        self._calls = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        if self._graph is None and self._calls < WARM_UP:
            self._calls += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                outputs = self._step(**inputs)
            torch.cuda.current_stream().wait_stream(self._stream)
            return outputs
        if self._graph is None:
            self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            # a loader's pinning thread may use CUDA while this one captures
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._outputs = self._step(**self._inputs)
            self._graph = graph
        else:
            for name, tensor in inputs.items():
                self._inputs[name].copy_(tensor)
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}


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
    on_gpu = device.startswith("cuda")
    for group in optimizer.param_groups:
        group["capturable"] = on_gpu
    for moments in optimizer.state.values():
        moments["step"] = moments["step"].to(device)
    _keep_rates_on(optimizer, device)


def _keep_rates_on(optimizer: torch.optim.Optimizer, device: str) -> None:
    """As tensors on a GPU, where a captured step reads them anew; as plain numbers on a CPU."""
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if device.startswith("cuda") else rate
