"""On an NVIDIA GPU: a converted Un-0 checkpoint draws what it draws on a CPU, with TF32 convolutions and without.

The checkpoint is random and small, with the names, shapes and settings of the published ones: the released weights are not
shipped. Rehearsed on a CPU with `make gpu-rehearsal` (`support/accelerator.py`).
"""

import math

import numpy as np
import pytest
import torch
from support.accelerator import DEVICE, MISSING

from millijoule.jobs import convert
from millijoule.workers.generators.registry import load_generator
from millijoule.workers.schemas import ImageRequest

pytestmark = pytest.mark.skipif(MISSING, reason="no CUDA device")

#: Levels of 255. A CPU and a GPU add in other orders: a value now and then falls to the next level.
MEAN_LEVELS = 0.02
#: TF32 has ten bits of mantissa where float32 has 23.
MEAN_LEVELS_TF32 = 0.5

CONFIG = {
    "n_oscillators": 256,
    "n_conditional_oscillators": 8,
    "class_dropout_prob": 0.1,
    "num_steps": 10,
    "parameterization": "standard",
    "relativization": "mean_relative",
    "encoding": "sin_cos",
    "solver": "euler",
}
CLASSES, BLOCKS = 10, 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A CIFAR-10 model as its training leaves it, converted by the command."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape, std):
        return torch.randn(shape, generator=random) * std

    n, m = CONFIG["n_oscillators"], CONFIG["n_conditional_oscillators"]
    model = {
        "dynamics.omega": normal(1, n, std=1.0),
        "dynamics.K": normal(n, n, std=1.5 * n**-0.5),
        "dynamics.omega_cond": normal(1, m, std=1.0),
        "dynamics.K_cond": normal(m, m, std=m**-0.5),
        "dynamics.K_drive": normal(CLASSES, n, m, std=m**-0.5),
    }
    channels = 2 * n // 16
    for block in range(BLOCKS):
        wide, channels = channels, max(channels // 2, 32)
        for place, taken in ((1, wide), (3, channels)):
            name = f"decoder.cascade.{block}.net.{place}"
            model[f"{name}.weight"] = normal(channels, taken, 3, 3, std=math.sqrt(2 / (9 * taken)))
            model[f"{name}.bias"] = normal(channels, std=0.1)
    model["decoder.to_output.weight"] = normal(3, channels, 3, 3, std=0.05)
    model["decoder.to_output.bias"] = normal(3, std=0.1)
    folder = tmp_path_factory.mktemp("un0")
    torch.save({"model": model, "config": CONFIG}, folder / "published.pt")
    options = ["--form", "float"]  # GPUs draw in floating point: so does the CPU they are compared with
    assert convert.main([str(folder / "published.pt"), str(folder / "model.safetensors"), *options]) == 0
    return str(folder / "model.safetensors")


@pytest.mark.parametrize("tf32", [False, True])
def test_images_are_those_of_a_cpu(checkpoint, tf32, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    wanted = [ImageRequest(str(i), 0, str(i % CLASSES), seed=i * 7919) for i in range(32)]
    ours, theirs = (
        load_generator(checkpoint, device=device).generate(wanted).images.astype(int)
        for device in (DEVICE, "cpu")
    )
    differences = np.abs(ours - theirs)
    print(
        f"tf32 {tf32}: mean {differences.mean():.4f} levels, most {differences.max()}, "
        f"{(differences > 0).mean():.2%} of values differ"
    )
    assert theirs.std() > 5  # there is something to compare
    assert differences.mean() < (MEAN_LEVELS_TF32 if tf32 else MEAN_LEVELS)
