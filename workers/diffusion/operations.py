"""How many operations an image costs: one step of the real pipeline is counted, and multiplied by the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from millijoule.workers.diffusion.loading import DECODERS, DENOISERS

#: torch's counter knows the attention kernels of GPUs only. Its functions take the shapes of query, key and value first.
_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION = {_CPU_KERNEL: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}


def count_operations(
    pipeline: Any, draw: Callable[[], Any], steps: int, counted_steps: int = 1
) -> dict[str, int]:
    """Operations per image in `steps` steps, two per multiply-accumulate, of text, denoiser and decoder.

    A few steps of the real pipeline are counted and their denoiser multiplied by the schedule's number of evaluations.
    What guidance doubles is doubled in these already. Only convolutions, matrix products and attention
    count, as `torch.utils.flop_counter` has it.

    Args:
        pipeline: of diffusers.
        draw: calls it for one image in `counted_steps` steps.
        steps: of the schedule that is asked about.
        counted_steps: all `steps` where they do not need the same work.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        draw()
    by_class = {kind: sum(counts.values()) for kind, counts in counter.get_flop_counts().items()}
    components = {
        type(model).__name__: name
        for name, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module) and name not in DECODERS
    }
    counts = {name: by_class.get(kind, 0) for kind, name in components.items()}
    decoder = by_class["Global"] - sum(counts.values())  # no module's call, and so not counted by class
    text = sum(n for name, n in counts.items() if name.startswith("text_encoder"))
    counted = sum(n for name, n in counts.items() if name in DENOISERS)
    denoiser = counted * _evaluations(pipeline, steps) // _evaluations(pipeline, counted_steps)
    return {"text": text, "denoiser": denoiser, "decoder": decoder}


def _evaluations(pipeline: Any, steps: int) -> int:
    """How often the scheduler has the denoiser evaluated in `steps` steps; second-order ones do so more often."""
    scheduler = pipeline.scheduler
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError):  # it asks for the image's size; all such are first-order
        return steps
    return len(scheduler.timesteps)
