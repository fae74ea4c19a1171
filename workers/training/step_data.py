"""What training steps are fed with, made in advance by processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

#: Steps that each process is ahead of the training.
AHEAD = 4


class StepData:
    """What each step needs. It follows from the step alone, so neither processes nor resuming change anything."""

    def __init__(self, draw: Callable[[int], dict[str, Tensor]], device: str, processes: int) -> None:
        """`draw` makes what a step needs, CPU tensors by name, for `device`: in `processes` in the background, which it must be
        picklable for, or with 0 in this one, when it is asked."""
        self._draw, self._device, self._processes = draw, torch.device(device), processes
        self._ahead: Iterator[dict[str, Tensor]] = iter(())
        self._next = -1

    def get(self, step: int) -> dict[str, Tensor]:
        """What `step` needs, on the device but for scalars, which the host reads. Fast where steps are asked for in turn."""
        if not self._processes:
            made = self._draw(step)
        else:
            if step != self._next:
                self._ahead = self._from(step)
            made = next(self._ahead)
            self._next = step + 1
        return {
            name: tensor.to(self._device, non_blocking=True) if tensor.ndim else tensor
            for name, tensor in made.items()
        }

    def _from(self, step: int) -> Iterator[dict[str, Tensor]]:
        return iter(
            DataLoader(
                _Steps(self._draw, step),
                batch_size=None,
                num_workers=self._processes,
                prefetch_factor=AHEAD,
                pin_memory=self._device.type == "cuda",
            )
        )


class _Steps(Dataset[dict[str, Tensor]]):
    def __init__(self, draw: Callable[[int], dict[str, Tensor]], first: int) -> None:
        self.draw, self.first = draw, first

    def __len__(self) -> int:
        return 2**31 - 1 - self.first

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.draw(self.first + index)
