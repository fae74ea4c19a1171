"""Guidance truncation: after a part of the schedule images are drawn without guidance, in half the work.

Classifier-free guidance evaluates the denoiser with the prompt and without it, and goes beyond the difference:
u + s (c - u) (Ho and Salimans 2022). Late steps, which settle detail, hardly need it (Kynkaanniemi et al. 2024, arXiv
2404.07724). From then on the denoiser sees the rows with the prompt only, and what it says of them is given for both: the
pipeline's sum is then c itself, whatever the scale, and no pipeline has to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from millijoule.workers.rungs.position import Position
from millijoule.workers.rungs.tensors import map_tensors


def truncate_guidance(
    denoiser: torch.nn.Module,
    position: Position,
    until: float,
    *,
    in_one_batch: bool,
    captured: bool = False,
) -> None:
    """Change `denoiser` (its `forward`) so that guidance ends after `until` of the schedule.

    Args:
        denoiser: of the pipeline that `position` follows.
        position: where the call stands.
        until: part of the steps with guidance, 0 to 1.
        in_one_batch: whether rows without the prompt and rows with it come together, in this order; else they come in two
            calls, the one with the prompt first.
        captured: whether an engine replays the denoiser's calls: what is left out is then left out before it sees them.
    """
    forward: Callable[..., Any] = denoiser._compiled_call_impl if captured else denoiser.forward  # type: ignore[assignment]

    def rows_with_prompt(*args: Any, **kwargs: Any) -> Any:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        rows = position.rows
        if not position.is_past(until) or sample is None or len(sample) != 2 * rows:
            return forward(*args, **kwargs)
        args, kwargs = second_half((args, kwargs), 2 * rows)
        return twice(forward(*args, **kwargs))

    def call_with_prompt(*args: Any, **kwargs: Any) -> Any:
        position.calls += 1
        if position.calls == 2 and position.is_past(until):
            return position.kept[call_with_prompt]
        position.kept[call_with_prompt] = forward(*args, **kwargs)
        return position.kept[call_with_prompt]

    less = rows_with_prompt if in_one_batch else call_with_prompt
    if captured:
        denoiser._compiled_call_impl = less
    else:
        denoiser.forward = less  # type: ignore[method-assign]


def second_half(value: Any, rows: int) -> Any:
    """`value` with the second half of every tensor in it that has `rows` rows; other things as they are."""
    return map_tensors(value, lambda x: x[rows // 2 :] if x.ndim and len(x) == rows else x)


def twice(value: Any) -> Any:
    """`value` with every tensor in it beside itself, row after row."""
    return map_tensors(value, lambda x: torch.cat([x, x]))
