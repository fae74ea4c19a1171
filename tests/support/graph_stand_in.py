"""CUDA graphs without a GPU: what ran while one was captured runs again, on the same tensors, when it is replayed."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    """Notes every operation with the tensors it read and wrote; `replay` does them again, in place.

    As with a graph of CUDA's, Python that ran between the operations does not run again.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old is not new and not old._is_view():
                    old.copy_(new)


class StandInGpu:
    """Of DeepSpeed's accelerator what its inference engine asks, for tensors that lie on the CPU."""

    def __init__(self, fails=False):
        self.graphs = []
        self.fails = fails

    def device_name(self):
        return "cuda"

    def current_device_name(self):
        return "cpu"

    def supported_dtypes(self):
        return [torch.float32, torch.float16, torch.bfloat16]

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()

    def create_graph(self):
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextmanager
    def capture_to_graph(self, graph):
        with graph:
            yield
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    def replay_graph(self, graph):
        graph.replay()
