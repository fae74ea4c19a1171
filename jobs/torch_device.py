"""`--device` of the commands that run a model in their own process: the words of `generate`, as PyTorch's names."""

from __future__ import annotations

import logging

from millijoule.workers.errors import InputError, UsageError

log = logging.getLogger(__name__)


def torch_device(asked: str) -> str:
    """PyTorch's name for `auto` (CUDA where there is one), `gpu` or `cpu`; `cuda`, `cuda:1` stay as they are.

    Raises:
        InputError: the word is another, or there is no such GPU.
    """
    if asked == "cpu":
        return asked
    if asked not in ("auto", "gpu", "cuda") and not (asked.startswith("cuda:") and asked[5:].isdecimal()):
        raise UsageError(f"--device {asked}: auto, gpu, cpu, or one GPU of several such as cuda:1")
    import torch

    found = torch.cuda.device_count()
    if asked == "auto":
        log.info("device: %s", "gpu" if found else "cpu, because PyTorch finds no GPU on this machine")
        return "cuda" if found else "cpu"
    if found <= int(asked[5:] or 0 if asked.startswith("cuda:") else 0):
        raise InputError(
            f"--device {asked}: PyTorch finds {found} GPUs on this machine; --device cpu runs without"
        )
    return "cuda" if asked == "gpu" else asked
