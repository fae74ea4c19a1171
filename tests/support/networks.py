"""The networks of tiny pipelines, and one call of each denoiser: what fused modules are tried in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from support.tiny_pipelines import CALL, SIZES, tiny_pipeline
from torch import Tensor, nn


def load(family: str) -> Any:
    """The pipeline, silent."""
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline(family))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(family: str, pipeline: Any, steps: int = 2, **more: Any) -> np.ndarray:
    """Two images, as levels `[2, height, width, 3]` of 0 to 255, not rounded; `more` for the pipeline."""
    size = {"width": SIZES[family], "height": SIZES[family]}
    prompts = ["a red dog", "an old house on the moon"]
    done = pipeline(
        prompt=prompts,
        generator=[torch.Generator().manual_seed(seed) for seed, _ in enumerate(prompts)],
        num_inference_steps=steps,
        output_type="np",
        **size | CALL.get(family, {}) | more,
    )
    return done.images * 255.0


def networks(pipeline: Any) -> dict[str, nn.Module]:
    """Its modules by name."""
    return {name: m for name, m in pipeline.components.items() if isinstance(m, nn.Module)}


def first_call(family: str, **more: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The denoiser of a pipeline, and its first call in a drawing, to be repeated; `more` for the pipeline."""
    pipeline = load(family)
    denoiser = next(m for name, m in networks(pipeline).items() if name in ("unet", "transformer"))
    seen: dict[str, Any] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault("call", (args, kwargs))

    with denoiser.register_forward_pre_hook(note, with_kwargs=True):
        draw(family, pipeline, **more)

    def call() -> Tensor:
        args, kwargs = seen["call"]
        with torch.no_grad():
            out = denoiser(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out.sample

    return denoiser, call


def interpreted_call(family: str, last: bool, **more: Any) -> dict[str, Any]:
    """The first call of a denoiser, plainly and with fused modules; for `support.interpreted`, whose process runs their kernels."""
    from millijoule.kernels import triton_launch
    from millijoule.workers.engines.injection.policy import inject

    launched: list[str] = []
    plain_launch = triton_launch.launch
    denoiser, call = first_call(family, **more)
    if last:
        denoiser.to(memory_format=torch.channels_last)
    plain = call()
    injection = inject(denoiser, "cpu")
    from millijoule.kernels import ada_layer_norm, gated_activation, group_norm_silu, rms_norm_rope

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(kernel.fn.__name__)
        plain_launch(kernel, *args, **kwargs)

    modules = (ada_layer_norm, gated_activation, group_norm_silu, rms_norm_rope)
    for module in modules:
        module.launch = launch  # type: ignore[attr-defined]
    try:
        fused = call()
    finally:
        for module in modules:
            module.launch = plain_launch  # type: ignore[attr-defined]
    return {"plain": plain, "fused": fused, "launched": launched, "replaced": dict(injection.replaced)}
