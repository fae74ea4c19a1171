"""The noise of an image: all of it from a generator of its own, so that neither its batch nor its neighbours change it.

Pipelines take a generator per row for the first latents. What a scheduler adds later is the difficulty: some pipelines do
not hand their generators on, some schedulers ask for a seed instead, and some libraries draw from torch's global generator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seeded(seed: int) -> torch.Generator:
    """A torch generator on the CPU that depends on all 64 bits of `seed`.

    torch's `manual_seed` drops the upper 32, which would give two of some 65,000 images the same noise. Seeds below
    2**32 mean what they mean everywhere else; the upper half of larger ones is mixed into the generator's state.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if seed >= 2**32:
        state = generator.get_state()
        words = state.numpy()[24 : 24 + 8 * 624].view(np.uint64)  # of the Mersenne twister, 32 bits in each
        words ^= np.random.SeedSequence(seed >> 32).generate_state(624)
        generator.set_state(state)
    return generator


@contextmanager
def noise_per_row(
    pipeline: Any, generators: Sequence[torch.Generator], seeds: Sequence[int]
) -> Iterator[None]:
    """While it lasts, whatever the pipeline's schedulers draw comes from the generators of the rows.

    A scheduler's `step` that takes generators gets them where the pipeline gives none (flow-matching pipelines, whose
    scheduler draws with `stochastic_sampling`). One that builds a Brownian tree gets a seed per row for it, and a new tree.
    """
    schedulers = [part for part in pipeline.components.values() if callable(getattr(part, "step", None))]
    patched = []
    try:
        for scheduler in schedulers:
            if hasattr(scheduler, "noise_sampler"):
                scheduler.noise_sampler = None
                scheduler.noise_sampler_seed = list(seeds)
            if "generator" in inspect.signature(scheduler.step).parameters:
                scheduler.step = _with_generators(scheduler.step, list(generators))
                patched.append(scheduler)
        yield
    finally:
        for scheduler in patched:
            del scheduler.step  # the class's own is there again


def _with_generators(step: Callable[..., Any], generators: list[torch.Generator]) -> Callable[..., Any]:
    @functools.wraps(step)  # pipelines look at its signature
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None:
            kwargs["generator"] = generators
        return step(*args, **kwargs)

    return wrapped


class GlobalNoise:
    """Whether something drew from torch's global generators while a `with` lasted. Nobody else sees them move.

    Args:
        device: "cpu" or "cuda", whose generator is watched, too.
        seed: what the global generators start from.
    """

    def __init__(self, device: str, seed: int = 0) -> None:
        self.on_gpu = device.startswith("cuda")
        self.seed = seed % 2**63
        self.used = False

    def __enter__(self) -> GlobalNoise:
        devices = [torch.cuda.current_device()] if self.on_gpu else []
        self._fork = torch.random.fork_rng(devices=devices)
        self._fork.__enter__()
        torch.manual_seed(self.seed)
        self._before = self._states()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.used = any(not torch.equal(a, b) for a, b in zip(self._before, self._states(), strict=True))
        self._fork.__exit__(*failure)

    def _states(self) -> list[torch.Tensor]:
        cpu = torch.get_rng_state()
        return [cpu, torch.cuda.get_rng_state()] if self.on_gpu else [cpu]
