"""A training step as one CUDA graph: launched as a whole, so that a fast GPU does not wait for Python."""

from __future__ import annotations

from collections.abc import Callable

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
        self._calls += 1
        if self._calls <= WARM_UP:
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
