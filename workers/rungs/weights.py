"""Rungs that change how a denoiser's weights are kept and multiplied: layout, fused projections, fewer bits, sparsity."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from millijoule.workers.errors import InputError
from millijoule.workers.rungs.rungs import Quantization

#: Linear layers with fewer weights than this cost nothing, and time embeddings among them decide much.
LEAST_WEIGHTS = 64 * 64


def put_channels_last(module: nn.Module) -> None:
    """Keep the weights of two-dimensional convolutions with channels last; activations follow them."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fuse_projections(denoiser: Any) -> None:
    """Query, key and value by one product, as diffusers does it.

    Raises:
        InputError: this denoiser cannot.
    """
    name = type(denoiser).__name__
    if not hasattr(denoiser, "fuse_qkv_projections"):
        raise InputError(f"--fuse-qkv: diffusers cannot fuse the projections of {name}")
    try:
        denoiser.fuse_qkv_projections()
    except (ValueError, AttributeError) as error:
        raise InputError(f"--fuse-qkv: diffusers cannot fuse the projections of {name}: {error}") from error


def set_attention_backend(denoiser: Any, backend: str) -> None:
    """Compute attention by `backend`, by diffusers' name for it.

    Raises:
        InputError: it is not installed, or not for this device.
    """
    try:
        denoiser.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(f"--attention-backend {backend}: {error}") from error


def quantize(denoiser: nn.Module, quantization: Quantization) -> int:
    """Quantise the large linear layers of `denoiser` with torchao; how many that were.

    Activations get a scale per row: what one image is rounded to does not depend on another.

    Raises:
        InputError: torchao is not installed, or there is no such layer.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("torchao").setLevel(logging.ERROR)
            from torchao.quantization import (
                Float8DynamicActivationFloat8WeightConfig,
                Float8WeightOnlyConfig,
                Int4WeightOnlyConfig,
                Int8DynamicActivationInt8WeightConfig,
                Int8WeightOnlyConfig,
                PerRow,
                quantize_,
            )
    except ImportError as error:
        raise InputError(
            f"--quantize {quantization}: needs torchao: pip install torchao ({error})"
        ) from error
    makers: dict[Quantization, Any] = {
        "int8-weights": Int8WeightOnlyConfig,
        "int8": Int8DynamicActivationInt8WeightConfig,
        "int4-weights": Int4WeightOnlyConfig,
        "fp8-weights": Float8WeightOnlyConfig,
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    names = {id(m): name for name, m in denoiser.named_modules() if _is_large(m)}
    if not names:
        raise InputError(
            f"--quantize {quantization}: {type(denoiser).__name__} has no linear layer of {LEAST_WEIGHTS} weights"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(denoiser, makers[quantization](), filter_fn=lambda module, name: id(module) in names)
    return len(names)


def make_sparse(denoiser: nn.Module) -> int:
    """Two of four for all large linear layers that sparse tensor cores take; how many that were.

    Raises:
        InputError: there is no such layer, or the GPU has no sparse tensor cores.
    """
    from torch.sparse import to_sparse_semi_structured

    linear = [m for m in denoiser.modules() if isinstance(m, nn.Linear) and _is_large(m)]
    layers = [m for m in linear if m.in_features % 64 == 0 and m.out_features % 32 == 0]
    if not layers:
        raise InputError(f"--sparsity 2:4: {type(denoiser).__name__} has no linear layer of a size for it")
    try:
        for layer in layers:
            layer.weight = nn.Parameter(
                to_sparse_semi_structured(two_of_four(layer.weight.detach())), requires_grad=False
            )
    except RuntimeError as error:
        raise InputError(f"--sparsity 2:4: this device cannot: {error}") from error
    return len(layers)


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """`weight` `[out, in]` with the two smaller of every four neighbours in a row set to zero."""
    fours = weight.reshape(-1, 4)
    smallest = fours.abs().argsort(dim=1, stable=True)[:, :2]
    return fours.scatter(1, smallest, 0.0).reshape(weight.shape)


def _is_large(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.shape.numel() >= LEAST_WEIGHTS
