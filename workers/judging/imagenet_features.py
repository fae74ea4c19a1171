"""Features of images in a network that was trained by others, on photographs: EfficientNet-Lite0, of ImageNet.

A second opinion beside the verifier, which this project trained on its own renders: Frechet distance, precision and recall
are worth more where both agree. The network (Tan and Le 2019; Lite variants 2020) is Google's, Apache License 2.0, top-1
75 % on ImageNet; its classifier is left out. What comes in are 64x64 images, enlarged to the 224x224 it was trained at;
what goes out are the 1,280 channels of its last layer, averaged over the image, so place hardly counts here.
`infra/features` makes the file of weights. Nothing here scores anything; that is `quality`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.generators.model_files import read_own_header, refusing_damage
from millijoule.workers.scenes.scenes import IMAGE_SIZE

NETWORK = "efficientnet-lite0"
FORMAT = "millijoule-features"
FORMAT_VERSION = "1"
WEIGHTS = Path(__file__).parents[1] / "weights" / f"{NETWORK}.safetensors"

#: Side of the images the network was trained on, in pixels.
INPUT_SIZE = 224
FEATURES = 1280

_BATCH = 1  # images per pass: what one layer passes to the next stays in the cache of one core


class Stage(NamedTuple):
    """Blocks in a row; the first has the stride, the others keep size and channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM_CHANNELS = 32
#: Table 1 of the paper; the Lite form has neither squeeze-and-excitation nor swish.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class Convolution(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME", its normalisation folded into weights and bias.

    With stride 2 the sides of its input are even, and the odd pixel of padding comes after the image.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(channels, out, kernel, stride, padding, groups=groups)
        before = (kernel - stride) // 2
        after = kernel - stride - before
        self.edges = (before, after, before, after) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.edges) if self.edges else x)


class Block(nn.Module):
    """Expand by a 1x1 convolution, look around in each channel, project back; with a bypass where the shape is kept."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = Convolution(channels, inner, 1) if expansion > 1 else None
        self.depthwise = Convolution(inner, inner, kernel, stride, groups=inner)
        self.project = Convolution(inner, out, 1)
        self.bypass = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self.expand(x)) if self.expand else x
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.bypass else out


class EfficientNetLite0(nn.Module):
    """Images `[b, 3, 224, 224]` as `to_input` makes them to features `[b, 1280]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convolution(3, STEM_CHANNELS, 3, 2)
        self.blocks = nn.Sequential(*_list_blocks())
        self.head = Convolution(STAGES[-1].channels, FEATURES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.stem(images)))  # [b, 320, 7, 7]
        return F.relu6(self.head(x)).mean((2, 3))

    @property
    def convolutions(self) -> dict[str, Convolution]:
        """All layers that have weights, by name: "stem", "blocks.3.expand"."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Convolution)}


def _list_blocks() -> Iterator[Block]:
    channels = STEM_CHANNELS
    for stage in STAGES:
        for k in range(stage.blocks):
            stride = stage.stride if k == 0 else 1
            yield Block(channels, stage.channels, stage.kernel, stride, stage.expansion)
            channels = stage.channels


def to_input(images: np.ndarray) -> Tensor:
    """uint8 `[b, 64, 64, 3]` to float32 `[b, 3, 224, 224]`, enlarged bilinearly, scaled as in training: (x - 127) / 128."""
    pixels = torch.as_tensor(images).permute(0, 3, 1, 2).float()  # channels last in memory
    return F.interpolate(pixels, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear").sub_(127).div_(128)


class ImageNetFeatures:
    """Features of images, in float32 on the CPU; the same images give the same features."""

    name = NETWORK

    def __init__(self, net: EfficientNetLite0, sha256: str) -> None:
        self.net = net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sha256 = sha256

    @staticmethod
    def load(path: Path = WEIGHTS) -> ImageNetFeatures:
        """Load weights as `infra/features` makes them: float16, or int8 with a scale for each output channel.

        Raises:
            InputError: the file is not there, or not one of this network.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; the package brings it")
        read_own_header(path, "feature", FORMAT, FORMAT_VERSION)
        with refusing_damage(path):
            net = EfficientNetLite0()
            net.load_state_dict(_dequantised(load_file(path), list(net.convolutions)))
        return ImageNetFeatures(net, file_sha256(path))

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 `[b, 64, 64, 3]`, float32 `[b, 1280]`."""
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise InputError(f"{NETWORK} reads uint8 [b, 64, 64, 3], not {images.dtype} {images.shape}")
        parts = [np.zeros((0, FEATURES), np.float32)]
        for start in range(0, len(images), _BATCH):
            with torch.inference_mode():
                parts.append(self.net(to_input(images[start : start + _BATCH])).numpy())
        return np.concatenate(parts)


def _dequantised(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Weights and biases in float32, of the convolutions `names`."""
    found: dict[str, Tensor] = {}
    for name in names:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if weight.dtype == torch.int8:
            weight = weight * tensors[f"{name}.scale"][:, None, None, None]
        found |= {f"{name}.weight": weight.float(), f"{name}.bias": bias}
    return found
