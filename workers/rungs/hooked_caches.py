"""Step caches that diffusers has, set up so that an image does not depend on its batch, or drawn alone where it would.

* `pyramid` (Pyramid Attention Broadcast, Zhao et al. 2024): attention is computed every n-th step and broadcast between.
* `taylorseer` (Liu et al. 2025): what attention gives is extrapolated from the last computed steps.
* `first-block`: the rest of the blocks is skipped while the first one's output changes little. diffusers compares means over
  the whole batch: neighbours would decide, so the batch is one image.

FasterCache is left out: it skips guidance by a rule of its own, as `guidance_until` does by a simpler one. MagCache wants ratios
measured per model, SeaCache compares over the batch.
"""

from __future__ import annotations

from typing import Any

from millijoule.workers.errors import InputError
from millijoule.workers.rungs.position import Position
from millijoule.workers.rungs.rungs import Rungs

#: The first steps are computed in full: layout is decided there.
WARM_UP_STEPS = 3
#: Time steps, of 1000, between which attention is broadcast: the middle of the schedule, as in the paper.
BROADCAST_RANGE = (100, 800)


def hook_cache(denoiser: Any, position: Position, rungs: Rungs) -> None:
    """Put the step cache of `rungs` on `denoiser`.

    Raises:
        InputError: there is nothing in it that this cache knows.
    """
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig, hooks

    interval = rungs.step_cache_interval
    apply: Any
    config: Any
    match rungs.step_cache:
        case "pyramid":
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=interval,
                cross_attention_block_skip_range=interval,
                spatial_attention_timestep_skip_range=BROADCAST_RANGE,
                cross_attention_timestep_skip_range=BROADCAST_RANGE,
                current_timestep_callback=lambda: position.timestep,
            )
            apply = hooks.apply_pyramid_attention_broadcast
        case "taylorseer":
            config = TaylorSeerCacheConfig(
                cache_interval=interval, disable_cache_before_step=WARM_UP_STEPS, taylor_factors_dtype=None
            )
            apply = hooks.apply_taylorseer_cache
        case "first-block":
            config = FirstBlockCacheConfig(threshold=rungs.step_cache_threshold)
            apply = hooks.apply_first_block_cache
    try:
        apply(denoiser, config)
    except ValueError as error:  # a block that diffusers has not registered
        raise _unknown(denoiser, rungs) from error
    if not any(_hooks(module) for module in denoiser.modules()):
        raise _unknown(denoiser, rungs)


def forget(denoiser: Any) -> None:
    """Drop what caches keep of an earlier call: one that failed did not clean up.

    Pipelines that evaluate twice a step tell caches which of the two is meant; for all others there is only one.
    """
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    for module in denoiser.modules():
        if registry := getattr(module, "_diffusers_hook", None):
            registry.reset_stateful_hooks(recurse=False)
    _set_cache_context(denoiser, CacheContext("every call"))


def _hooks(module: Any) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


def _unknown(denoiser: Any, rungs: Rungs) -> InputError:
    return InputError(
        f"--step-cache {rungs.step_cache}: diffusers knows no blocks of {type(denoiser).__name__} for it"
    )
