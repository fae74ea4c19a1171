"""In which number formats a pipeline runs on a device: what is chosen when nobody says, and what `--precision` asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.rungs.rungs import Precision
from millijoule.workers.rungs.tensors import map_tensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class SettledPrecision:
    """How a pipeline is loaded and run.

    Attributes:
        dtype: of all weights when they are loaded.
        mixed: whether matrices and convolutions are multiplied in bfloat16 by autocast.
        denoiser: what the denoiser's weights are rounded to; None: as loaded. Latents stay as wide as `dtype`: the sums that a
            scheduler makes over all steps are not rounded.
    """

    dtype: torch.dtype
    mixed: bool = False
    denoiser: torch.dtype | None = None

    def context(self) -> torch.autocast:
        """The one in which the pipeline is called."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)


def settle_precision(asked: Precision | None, *, device: str, stored_in_float16: bool) -> SettledPrecision:
    """The formats for `device`.

    When nobody asks, a GPU computes in float16 if the denoiser is stored so, whose rounding is an eighth of bfloat16's; other
    weights may be out of float16's range, and run in bfloat16, or in float32 where the GPU only emulates bfloat16. A CPU
    computes in float32, and multiplies in bfloat16 what is stored in float16 where the processor does that (half the
    time). "half" is the same for all weights, and on CPUs without autocast's conversions in the denoiser.
    """
    if device.startswith("cuda"):
        if asked in _DTYPES:
            return SettledPrecision(_DTYPES[asked])
        wide = torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
        return SettledPrecision(torch.float16 if stored_in_float16 else wide)
    if asked is None:
        return SettledPrecision(torch.float32, mixed=stored_in_float16 and multiplies_bfloat16())
    if asked == "float32" or (asked == "half" and not multiplies_bfloat16()):
        return SettledPrecision(torch.float32)
    return SettledPrecision(torch.float32, mixed=True, denoiser=_DTYPES.get(asked, torch.bfloat16))


def round_weights(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of `module`, a denoiser of diffusers, to `dtype`; what comes in is rounded, too, except for time steps.

    What it gives is as wide as what came in.
    """
    for weight in (*module.parameters(), *module.buffers()):
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    forward: Callable[..., Any] = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())  # a retry widens them
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        wide = torch.float32 if sample is None else sample.dtype
        # U-Nets take the time step as their second argument; eight bits are too few for it
        args = tuple(x if i == 1 else _cast(x, dtype) for i, x in enumerate(args))
        kwargs = {name: x if name == "timestep" else _cast(x, dtype) for name, x in kwargs.items()}
        with torch.autocast("cpu", enabled=False):
            return _cast(forward(*args, **kwargs), wide)

    module.forward = run  # type: ignore[method-assign]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return map_tensors(value, lambda x: x.to(dtype) if x.is_floating_point() else x)
