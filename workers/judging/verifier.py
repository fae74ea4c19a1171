"""An independent judge of icon scenes: reads icons and background from the pixels of a 64x64 image.

A small convolutional net looks at a grid of 8x8 cells; each says whether an icon's centre lies there and which noun,
colour and size that icon has. It knows nothing of prompts, layout windows or the models it judges, and was trained on
true renders alone (`training.verifier`). Its pooled features carry content and place, for distances between sets of
images. Nothing here scores anything; that is `quality`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import read_own_header, read_settings, refusing_damage
from millijoule.workers.scenes.scenes import BACKGROUNDS, COLOURS, IMAGE_SIZE, MAX_COUNT, SIZES
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUNS, check_count

FORMAT = "millijoule-verifier"
FORMAT_VERSION = "1"

_WEIGHTS = Path(__file__).parents[1] / "weights"

#: The package's own verifier, of the first nouns of the vocabulary, and the one of all.
WEIGHTS = _WEIGHTS / "verifier.safetensors"
WEIGHTS_OF_ALL = _WEIGHTS / "verifier-1000.safetensors"

#: Pixels from one cell to the next; cell (i, j) is centred at pixel (8 i, 8 j), counted from the edge.
STRIDE = 8
GRID = IMAGE_SIZE // STRIDE
#: A cell holds an icon where its probability of a centre is at least this, ...
ICON_THRESHOLD = 0.5
#: ... is the largest of its neighbours, and no noun-less blob: the likeliest noun has at least this probability.
NOUN_THRESHOLD = 0.5

_BATCH = 64  # images per pass: fits the second-level cache of one core


def cell_parts(nouns: int) -> tuple[int, ...]:
    """What each cell says, as numbers of channels in order: centre, noun, colour, size, offset of the centre in cells (x, y)."""
    return (1, nouns, len(COLOURS), len(SIZES), 2)


def global_parts(nouns: int) -> tuple[int, ...]:
    """What the pooled features must tell in training: nouns and colours present, background, count, places of centres."""
    return (nouns, len(COLOURS), len(BACKGROUNDS), MAX_COUNT + 1, GRID * GRID)


@dataclass(frozen=True)
class VerifierShape:
    """Sizes of the net; the default has about 0.12 GFLOP per image."""

    stem: int = 32  # channels at 32x32
    middle: int = 64  # channels at 16x16
    trunk: int = 96  # channels at 8x8
    middle_blocks: int = 1
    trunk_blocks: int = 3
    feature_channels: int = 32  # of each image quarter; features are four times as many


@dataclass(frozen=True)
class IconReading:
    """One icon as read from pixels. `x` and `y` are its centre in pixels from the left and upper edge."""

    noun: str
    colour: str
    size: str
    x: float
    y: float
    probability: float  # of a centre here, times that of the noun


@dataclass(frozen=True)
class SceneReading:
    """What an image shows: icons from top to bottom and left to right, and the background."""

    icons: tuple[IconReading, ...]
    background: str


class _Outputs(NamedTuple):
    cells: Tensor  # [b, sum(cell_parts), 8, 8]
    overall: Tensor  # [b, sum(global_parts)]
    features: Tensor  # [b, 4 * feature_channels]


class _Block(nn.Module):
    """Two 3x3 convolutions and a bypass: `relu(x + b(relu(a(x))))`, each normalised over the batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = _convolution(channels, channels, 1)
        self.b = _convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class VerifierNet(nn.Module):
    """Images `[b, 3, 64, 64]` in [-1, 1] to `_Outputs`; knows the first `nouns` of the vocabulary."""

    def __init__(self, shape: VerifierShape, nouns: int = DEFAULT_NOUNS) -> None:
        super().__init__()
        self.shape = shape
        self.nouns = nouns
        self.stem = _convolution(3, shape.stem, 2)
        self.down = _convolution(shape.stem, shape.middle, 2)
        self.middle = nn.Sequential(*(_Block(shape.middle) for _ in range(shape.middle_blocks)))
        self.narrow = _convolution(shape.middle, shape.trunk, 2)
        self.trunk = nn.Sequential(*(_Block(shape.trunk) for _ in range(shape.trunk_blocks)))
        self.hidden = nn.Conv2d(shape.trunk, 2 * shape.trunk, 1)
        self.cells = nn.Conv2d(2 * shape.trunk, sum(cell_parts(nouns)), 1)
        self.pooled = nn.Conv2d(shape.trunk, shape.feature_channels, 1)
        self.overall = nn.Linear(4 * shape.feature_channels, sum(global_parts(nouns)))

    def forward(self, images: Tensor) -> _Outputs:
        x = F.relu(self.stem(images))  # [b, stem, 32, 32]
        x = self.middle(F.relu(self.down(x)))  # [b, middle, 16, 16]
        x = self.trunk(F.relu(self.narrow(x)))  # [b, trunk, 8, 8]
        cells = self.cells(F.relu(self.hidden(x)))
        features = F.avg_pool2d(F.relu(self.pooled(x)), GRID // 2).flatten(1)
        return _Outputs(cells, self.overall(features), features)


def _convolution(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out))


def to_input(images: np.ndarray | Tensor) -> Tensor:
    """uint8 `[b, 64, 64, 3]` to float32 `[b, 3, 64, 64]` in [-1, 1], channels last in memory."""
    pixels = torch.as_tensor(images)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def packaged_weights(nouns: int) -> Path:
    """The package's verifier for scenes of the first `nouns` nouns."""
    return WEIGHTS if nouns <= DEFAULT_NOUNS else WEIGHTS_OF_ALL


class Verifier:
    """Reads images with trained weights, in float32 on the CPU; the same images give the same readings."""

    def __init__(self, net: VerifierNet) -> None:
        self.net = net.eval()

    @property
    def nouns(self) -> int:
        """How many of the vocabulary's first nouns it knows."""
        return self.net.nouns

    @staticmethod
    def load(path: Path = WEIGHTS) -> Verifier:
        """Load weights as `millijoule train` writes them.

        Raises:
            InputError: the file is not safetensors, or not a verifier this version knows.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; `millijoule train` makes a verifier's weights")
        metadata = read_own_header(path, "verifier", FORMAT, FORMAT_VERSION).metadata
        with refusing_damage(path):
            nouns = check_count(int(metadata.get("nouns", DEFAULT_NOUNS)))
            net = VerifierNet(read_settings(VerifierShape, metadata["shape"]), nouns)
            net.load_state_dict({name: t.float() for name, t in load_file(path).items()}, strict=False)
        return Verifier(net)

    def read(self, images: np.ndarray) -> list[SceneReading]:
        """Read uint8 `[b, 64, 64, 3]`."""
        return [reading for outputs in self._look(images) for reading in _readings(outputs, self.nouns)]

    def features(self, images: np.ndarray) -> np.ndarray:
        """Features of uint8 `[b, 64, 64, 3]`, float32 `[b, d]`: of each image quarter, so that place counts."""
        width = 4 * self.net.shape.feature_channels
        parts = [outputs.features.numpy() for outputs in self._look(images)]
        return np.concatenate([np.zeros((0, width), np.float32), *parts])

    def _look(self, images: np.ndarray) -> Iterator[_Outputs]:
        if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
            raise InputError(f"the verifier reads uint8 [b, 64, 64, 3], not {images.dtype} {images.shape}")
        for start in range(0, len(images), _BATCH):
            with torch.inference_mode():
                outputs = self.net(to_input(images[start : start + _BATCH]))
            yield outputs


def _readings(outputs: _Outputs, nouns: int) -> list[SceneReading]:
    """Pick the peaks of the grid and name what stands there."""
    centre, noun, colour, size, offset = outputs.cells.split(cell_parts(nouns), 1)
    centre = torch.sigmoid(centre[:, 0])  # [b, 8, 8]
    noun_probability, noun_index = noun.softmax(1).max(1)
    peak = (centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0]) & (centre >= ICON_THRESHOLD)
    peak &= noun_probability >= NOUN_THRESHOLD
    colour_index, size_index = colour.argmax(1), size.argmax(1)
    background = outputs.overall.split(global_parts(nouns), 1)[2].argmax(1)
    found: list[list[IconReading]] = [[] for _ in range(len(centre))]
    for b, i, j in peak.nonzero().tolist():
        x, y = STRIDE * (j + float(offset[b, 0, i, j])), STRIDE * (i + float(offset[b, 1, i, j]))
        words = NOUNS[noun_index[b, i, j]], COLOURS[colour_index[b, i, j]], SIZES[size_index[b, i, j]]
        found[b].append(IconReading(*words, x, y, float(centre[b, i, j] * noun_probability[b, i, j])))
    return [
        SceneReading(tuple(sorted(icons, key=lambda icon: (icon.y, icon.x))), BACKGROUNDS[k])
        for icons, k in zip(found, background, strict=True)
    ]
