"""What `bench kernels` measures: each fused kernel at sizes of models people run, and at small ones for a rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from millijoule.kernels import ada_layer_norm, gated_activation, group_norm_silu, rms_norm_rope


@dataclass(frozen=True)
class Case:
    """One computation at one size.

    Attributes:
        plain, fused: take `arguments` and return a tensor or several.
        bytes_moved: of inputs and outputs, each once: what no form can do without.
    """

    kernel: str
    name: str
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    arguments: tuple[Any, ...]
    bytes_moved: int


#: Name, images (twice as many with guidance), channels, side, groups, whether a timestep's embedding is added.
NORMS = (
    ("SDXL 1024, first level", 2, 320, 128, 32, torch.bfloat16, True),
    ("SDXL 1024, last level", 2, 1280, 32, 32, torch.bfloat16, True),
    ("Stable Diffusion 512, batch 16", 32, 320, 64, 32, torch.float16, True),
    ("decoder 1024, last block", 1, 128, 1024, 32, torch.bfloat16, False),
    ("packaged baseline, batch 256", 512, 64, 16, 16, torch.float16, True),
)
SMALL_NORM = (2, 16, 6, 4)

#: Name, and n, tokens, width.
TOKENS = (
    ("FLUX 1024", (1, 4608, 3072)),
    ("Stable Diffusion 3 1024", (2, 4096, 1536)),
    ("PixArt 1024", (2, 4096, 1152)),
)
SMALL_TOKENS = (2, 16, 64)

#: Name, and n, tokens, width of the projection.
PROJECTIONS = (("SDXL 1024, second level", (2, 4096, 5120)), ("SDXL 1024, last level", (2, 1024, 10240)))

#: n, tokens, heads, width.
QUERY, SMALL_QUERY = (1, 4096, 24, 128), (1, 16, 2, 16)


def make_cases(device: str) -> Iterator[Case]:
    """All cases, one after the other, with random values on `device`; small sizes unless that is a GPU."""
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    small = device != "cuda"
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    for name, n, channels, side, groups, dtype, embedded in NORMS:
        n, channels, side, groups = SMALL_NORM if small else (n, channels, side, groups)
        for layout in ("first", "last"):
            x = normal(n, channels, side, side, dtype=dtype)
            x = x.to(memory_format=torch.channels_last) if layout == "last" else x
            row = normal(channels, dtype=dtype)
            before = normal(n, channels, dtype=dtype) if embedded else None
            plain, fused = (
                partial(_group_norm_silu, form, groups)
                for form in (group_norm_silu.group_norm_silu_reference, group_norm_silu.group_norm_silu)
            )
            name_here = f"{name}, channels {layout}"
            yield Case("group_norm_silu", name_here, plain, fused, (x, row, before), 2 * x.nbytes)
    for name, real_shape in TOKENS:
        shape = SMALL_TOKENS if small else real_shape
        x, update = normal(*shape), normal(*shape)
        gate, scale, shift = normal(shape[0], 3 * shape[2]).chunk(3, 1)
        plain, fused = ada_layer_norm.ada_layer_norm_reference, ada_layer_norm.ada_layer_norm
        yield Case("ada_layer_norm", name, plain, fused, (x, scale, shift), 2 * x.nbytes)
        plain, fused = ada_layer_norm.gated_ada_layer_norm_reference, ada_layer_norm.gated_ada_layer_norm
        yield Case("gated_ada_layer_norm", name, plain, fused, (x, gate, update, scale, shift), 4 * x.nbytes)
    for name, real_shape in PROJECTIONS:
        x = normal(*(SMALL_TOKENS if small else real_shape))
        plain, fused = gated_activation.gated_activation_reference, gated_activation.gated_activation
        yield Case("gated_activation", name, plain, fused, (x,), 3 * x.nbytes // 2)
    query = normal(*(SMALL_QUERY if small else QUERY))
    _, tokens, _, width = query.shape
    angle = torch.rand(tokens, width // 2, generator=generator, device=device) * 6
    arguments = (query, normal(width), 1e-6, angle.cos(), angle.sin())
    plain, fused = rms_norm_rope.rms_norm_rope_reference, rms_norm_rope.rms_norm_rope
    yield Case("rms_norm_rope", "FLUX 1024, query", plain, fused, arguments, 2 * query.nbytes)


def _group_norm_silu(
    form: Callable[..., Tensor], groups: int, x: Tensor, row: Tensor, before: Tensor | None
) -> Tensor:
    return form(x, groups, row, row, 1e-5, before=before)
