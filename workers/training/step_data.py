"""What training steps are fed with, made in advance by processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

#: Steps that each process is ahead of the training.
AHEAD = 4


class Draw(Protocol):
    """Makes what a step needs, CPU tensors by name, from the step alone; picklable, for other processes."""

    def __getitem__(self, step: int) -> dict[str, Tensor]: ...


class StepData:
    """What each step needs. It follows from the step alone, so neither processes nor resuming change anything."""

    def __init__(self, draw: Draw, device: str, processes: int) -> None:
        """`draw` is asked for `device`: by `processes` in the background, or with 0 in this one, when it is needed."""
        self._draw, self._device, self._processes = draw, torch.device(device), processes
        self._ahead: Iterator[dict[str, Tensor]] = iter(())
        self._next = -1

    def get(self, step: int) -> dict[str, Tensor]:
        """What `step` needs, on the device but for scalars, which the host reads. Fast where steps are asked for in turn."""
        if not self._processes:
            made = self._draw[step]
        else:
            if step != self._next:
                draw: Any = self._draw
                loader = DataLoader(
                    draw,
                    batch_size=None,
                    sampler=range(step, 2**31),
                    num_workers=self._processes,
                    prefetch_factor=AHEAD,
                    pin_memory=self._device.type == "cuda",
                )
                self._ahead = iter(loader)
            made = next(self._ahead)
            self._next = step + 1
        return {
            name: tensor.to(self._device, non_blocking=True) if tensor.ndim else tensor
            for name, tensor in made.items()
        }
