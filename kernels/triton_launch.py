"""Where Triton's kernels run, and how one is started. Importing this needs Triton; PyTorch for CUDA brings it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: What fused forms read and write; statistics are float32 whatever comes in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


#: Compute capabilities (their first numbers) whose blocks may have 227 KiB of shared memory: kernels can keep weights in it there.
RESIDENT_GENERATIONS = (9, 10)

#: Whether kernels of this process are interpreted, which is decided when they are made.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def runs_on(*tensors: Tensor | None) -> bool:
    """Whether kernels take these tensors: of a known type and on a GPU, or anywhere in Triton's interpreter."""
    here = [t for t in tensors if t is not None]
    on_device = INTERPRETED or all(t.is_cuda for t in here)
    return on_device and all(t.dtype in DTYPES for t in here) and all(t.numel() > 0 for t in here)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Start `programs` programs of `kernel` on `device`, which need not be the current one."""
    elsewhere = (
        device.type == "cuda" and not torch.compiler.is_compiling()
    )  # a compiled graph sees to that itself
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[(programs,)](*arguments, **constants)


def captured(launches: Callable[[], None], device: torch.device) -> Callable[[], Any]:
    """What does the same as `launches`, whose buffers stay where they are: on a GPU a CUDA graph of them, else they themselves."""
    if device.type != "cuda":
        return launches
    with torch.cuda.device(device):
        launches()  # compiled before it is captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
    return graph.replay


@triton.jit
def silu(x):
    """x times its logistic function, float32."""
    return x * tl.sigmoid(x)
