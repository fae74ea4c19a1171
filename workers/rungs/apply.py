"""Rungs put on a loaded pipeline, in the order in which they have to come."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from millijoule.workers.errors import InputError
from millijoule.workers.rungs import check, hooked_caches, weights
from millijoule.workers.rungs.deep_cache import cache_deep_blocks
from millijoule.workers.rungs.families import DENOISERS
from millijoule.workers.rungs.guidance import truncate_guidance
from millijoule.workers.rungs.position import Position
from millijoule.workers.rungs.rungs import Rungs

log = logging.getLogger(__name__)


class ClimbedRungs:
    """A pipeline's rungs at work. Build with `prepare_weights`, then `skip_work`.

    Attributes:
        words: what was done, one line each.
    """

    def __init__(self, pipeline: Any, rungs: Rungs) -> None:
        self.pipeline = pipeline
        self.rungs = rungs
        self.words: list[str] = []
        self._position = Position(pipeline)
        self._hooked = False

    @property
    def denoiser(self) -> Any:
        """The network that is evaluated in every step."""
        found = (getattr(self.pipeline, name, None) for name in DENOISERS)
        return next(module for module in found if isinstance(module, torch.nn.Module))

    def prepare_weights(self) -> None:
        """Change how weights are kept and multiplied, and by which steps is sampled: before an engine takes the networks.

        Raises:
            InputError: a rung does not work here; the message names its option.
        """
        rungs, denoiser = self.rungs, self.denoiser
        if rungs.scheduler is not None:
            self.pipeline.scheduler = _scheduler(self.pipeline.scheduler, rungs.scheduler)
            self.words.append(f"scheduler {rungs.scheduler}")
        if rungs.steps is not None:
            self.words.append(f"{rungs.steps} steps where a request does not say")
        if rungs.fuse_qkv:
            weights.fuse_projections(denoiser)
            self.words.append("fused projections")
        if rungs.attention_backend is not None:
            weights.set_attention_backend(denoiser, rungs.attention_backend)
            self.words.append(f"attention by {rungs.attention_backend}")
        if rungs.channels_last:
            weights.put_channels_last(denoiser)
            if isinstance(vae := getattr(self.pipeline, "vae", None), torch.nn.Module):
                weights.put_channels_last(vae)
            self.words.append("channels last")
        if rungs.quantize is not None:
            count = weights.quantize(denoiser, rungs.quantize)
            self.words.append(f"{rungs.quantize} of {count} linear layers")
        if rungs.sparsity is not None:
            self.words.append(f"2:4 of {weights.make_sparse(denoiser)} linear layers")

    def skip_work(self) -> None:
        """Let steps leave out what they can: after an engine has taken the networks, so that it sees them whole.

        Raises:
            InputError: as `prepare_weights`.
        """
        rungs, denoiser = self.rungs, self.denoiser
        kind = type(denoiser).__name__
        if rungs.step_cache == "deep":
            cache_deep_blocks(denoiser, self._position, rungs.step_cache_interval)
        elif rungs.step_cache is not None:
            hooked_caches.hook_cache(denoiser, self._position, rungs)
            self._hooked = True
        if rungs.step_cache is not None:
            self.words.append(f"{rungs.step_cache} step cache")
        if rungs.guidance_until < 1:
            batch = "one batch" if kind in check.GUIDED_IN_ONE_BATCH else "two calls"
            truncate_guidance(denoiser, self._position, rungs.guidance_until, batch)
            self.words.append(f"guidance in the first {rungs.guidance_until:.0%} of steps")

    def begin(self, rows: int) -> None:
        """The pipeline is about to draw `rows` images."""
        if self.rungs.by_step:
            self._position.begin(rows)
            if self._hooked:
                hooked_caches.forget(self.denoiser)


def _scheduler(own: Any, name: str) -> Any:
    """A scheduler of class `name` with the settings of the pipeline's `own`."""
    import diffusers

    kind = getattr(diffusers, name, None)
    known = sorted({k.__name__ for k in own.compatibles})
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise InputError(f"--scheduler {name}: diffusers has no such scheduler; there are {', '.join(known)}")
    if name not in known:
        raise InputError(
            f"--scheduler {name}: not for a model of {type(own).__name__}; these are: {', '.join(known)}"
        )
    return kind.from_config(own.config)


def cast_inputs(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let `module`, whose weights are `dtype`, take floats of any width and give them back as wide as the first one came."""
    forward = module.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        wide = next(x.dtype for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        return _cast(forward(*_cast(args, dtype), **_cast(kwargs, dtype)), wide)

    module.forward = run  # type: ignore[method-assign]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        changed = {k: _cast(v, dtype) for k, v in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, list | tuple):
        return type(value)(_cast(v, dtype) for v in value)
    return value
