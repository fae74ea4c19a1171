"""Rungs put on a loaded pipeline, in the order in which they have to come."""

from __future__ import annotations

import logging
from typing import Any

import torch

from millijoule.workers.errors import InputError
from millijoule.workers.pipeline_parts.scheduler_choice import change_scheduler
from millijoule.workers.rungs import check, hooked_caches, weights
from millijoule.workers.rungs.deep_cache import cache_deep_blocks
from millijoule.workers.rungs.families import DENOISERS
from millijoule.workers.rungs.guidance import truncate_guidance
from millijoule.workers.rungs.position import Position
from millijoule.workers.rungs.precision import SettledPrecision, round_weights
from millijoule.workers.rungs.rungs import Rungs

log = logging.getLogger(__name__)


class ClimbedRungs:
    """A pipeline's rungs at work. Build with `prepare_weights`, then `skip_work`.

    Attributes:
        words: what was done, one line each.
    """

    def __init__(self, pipeline: Any, rungs: Rungs, precision: SettledPrecision) -> None:
        self.pipeline = pipeline
        self.precision = precision
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
        if self.precision.denoiser is not None:
            round_weights(denoiser, self.precision.denoiser)
        if rungs.precision is not None:
            format_ = self.precision.denoiser or self.precision.dtype
            self.words.append(f"{str(format_).removeprefix('torch.')} denoiser")
        if rungs.scheduler is not None:
            change_scheduler(self.pipeline, rungs.scheduler)
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

    def skip_work(self, *, captured: bool = False) -> None:
        """Let steps leave out what they can: after an engine has taken the networks, so that it sees them whole.

        Args:
            captured: whether the engine replays what the denoiser did once: then it cannot leave out a part of itself.

        Raises:
            InputError: as `prepare_weights`.
        """
        rungs, denoiser = self.rungs, self.denoiser
        if captured and rungs.step_cache is not None:
            raise InputError(
                f"--step-cache {rungs.step_cache}: this engine runs the denoiser as a whole; take another --engine"
            )
        if rungs.step_cache == "deep":
            cache_deep_blocks(denoiser, self._position, rungs.step_cache_interval)
        elif rungs.step_cache is not None:
            hooked_caches.hook_cache(denoiser, self._position, rungs)
            self._hooked = True
        if rungs.step_cache is not None:
            self.words.append(f"{rungs.step_cache} step cache")
        if rungs.guidance_until < 1:
            in_one_batch = type(denoiser).__name__ in check.GUIDED_IN_ONE_BATCH
            truncate_guidance(
                denoiser,
                self._position,
                rungs.guidance_until,
                in_one_batch=in_one_batch,
                captured=captured,
            )
            self.words.append(f"guidance in the first {rungs.guidance_until:.0%} of steps")

    @property
    def draws_alone(self) -> bool:
        """Whether a neighbour in the batch would change an image."""
        return self.rungs.step_cache == "first-block"

    def begin(self, rows: int) -> None:
        """The pipeline is about to draw `rows` images."""
        if self.rungs.by_step:
            self._position.begin(rows)
            if self._hooked:
                hooked_caches.forget(self.denoiser)
