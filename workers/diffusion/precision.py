"""Numbers that a narrow precision cannot hold: which rows have them, and drawing once more in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch


@contextmanager
def in_float32(pipeline: Any) -> Iterator[None]:
    """While it lasts, the networks of `pipeline` compute in float32; afterwards they are what they were, bit by bit.

    The weights are widened in place, one tensor after another, and narrowed again, which loses nothing: this needs twice
    their memory and no second copy of the model. Quantised weights stay as they are.
    """
    narrow = [(tensor, tensor.dtype) for tensor in _weights(pipeline) if _is_narrow(tensor)]
    try:
        for tensor, _ in narrow:
            tensor.data = tensor.data.to(torch.float32)
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def is_narrow(pipeline: Any) -> bool:
    """Whether any of its weights are of less than float32."""
    return any(_is_narrow(tensor) for tensor in _weights(pipeline))


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4


def _weights(pipeline: Any) -> Iterator[torch.Tensor]:
    seen: set[int] = set()
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in chain(part.parameters(), part.buffers()):
                if type(tensor) in (torch.Tensor, torch.nn.Parameter) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


@contextmanager
def watch_decoded(pipeline: Any, finite: list[torch.Tensor]) -> Iterator[None]:
    """While it lasts, each batch of decoded images adds to `finite` which of its rows are finite numbers.

    Pipelines clamp what their decoder makes to the range of pixels, and an infinity is white from then on.
    """
    processor: Any = getattr(pipeline, "image_processor", None)
    original = getattr(processor, "postprocess", None)
    if original is None:
        yield
        return

    def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(image, torch.Tensor):
            finite.append(torch.isfinite(image).flatten(1).all(1))
        return original(image, *args, **kwargs)

    processor.postprocess = postprocess
    try:
        yield
    finally:
        del processor.postprocess


def quantised(images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels as uint8 `[rows, height, width, 3]`, and `[rows]` whether all of a row's are finite numbers.

    Args:
        images: from 0 to 1, a tensor `[rows, 3, height, width]`, which is quantised where it lies, so that a byte per
            value leaves the device; or an array `[rows, height, width, 3]`.
    """
    if isinstance(images, torch.Tensor):
        rows = images.detach().permute(0, 2, 3, 1)
        finite = torch.isfinite(rows).flatten(1).all(1)
        pixels = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        for row, into in zip(
            rows, pixels, strict=True
        ):  # one after another: float64 has eight times their size
            scaled = (row.to(torch.float64) * 255).round()
            into.copy_(torch.nan_to_num(scaled, 0.0, 0.0, 0.0).clamp(0, 255))
        return pixels.cpu().numpy(), finite.cpu().numpy()
    array = np.asarray(images, dtype=np.float64)
    finite_rows = np.array([np.isfinite(row).all() for row in array])
    return np.round(np.nan_to_num(array) * 255).clip(0, 255).astype(np.uint8), finite_rows
