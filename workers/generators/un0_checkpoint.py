"""Published Un-0 checkpoints as data: what their tensors are, and their conversion from pickle to safetensors.

In goes a `.pt` file as Un-0's training and its releases write it, out comes a safetensors file that says which model it
is. Tensor names, values and the training config are kept as published. Nothing here runs the model, and no pickle is
ever loaded: `saved_checkpoint` reads it as data.
"""

from __future__ import annotations

import json
import math
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta
from torch import Tensor

from millijoule.workers.errors import InputError
from millijoule.workers.generators.model_files import write_model_file
from millijoule.workers.generators.saved_checkpoint import SavedCheckpoint, StoredTensor, Unread, read_saved
from millijoule.workers.records import convert

FORMAT = "un0"
FORMAT_VERSION = "1"

Parameterization = Literal["standard", "mup"]

#: The decoder starts from this many pixels a side and doubles them in each block.
STEM = 4

#: No decoder block has fewer channels than this.
MIN_CHANNELS = 32

MAX_STEPS = 1000

#: A training config has some dozens of settings. What is carried along must fit into the output's header.
MAX_CONFIG_CHARS, MAX_CONFIG_DEPTH = 4 * 2**20, 32

#: Bounds on what a model can compute must stay this far below what float32 holds: sums in parts may pass the whole sum.
LARGEST = torch.finfo(torch.float32).max / 2**20

#: What torch.compile puts into the names of a module's tensors; a checkpoint may have it or not.
COMPILED = "_orig_mod."

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Un0Architecture:
    """Everything about an Un-0 model that is not a weight; sizes beyond these bounds nobody has published.

    `horizon` is the time over which the phases run, whatever the number of `steps`.
    """

    oscillators: Annotated[int, Meta(ge=2, le=65536)]
    drivers: Annotated[int, Meta(ge=1, le=4096)]
    classes: Annotated[int, Meta(ge=1, le=1_000_000)]
    blocks: Annotated[int, Meta(ge=1, le=6)]  # of the decoder; each doubles the image
    parameterization: Parameterization
    relativization: Literal["absolute", "mean_relative", "ref_oscillator"]
    encoding: Literal["raw", "sin", "sin_cos"]
    solver: Literal["euler", "rk4"]
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)]
    horizon: Annotated[float, Meta(gt=0, le=sys.float_info.max)] = 1.0

    def __post_init__(self) -> None:
        if self.features % STEM**2:
            raise ValueError(f"{self.features} readout features do not fill a {STEM}x{STEM} grid")

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return STEM * 2**self.blocks

    @property
    def features(self) -> int:
        """What the readout makes of one image's phases."""
        return self.oscillators * (2 if self.encoding == "sin_cos" else 1)

    @property
    def coupling_scale(self) -> float:
        """Factor between the stored and the effective coupling of the main oscillators."""
        return self.oscillators**-0.5 if self.parameterization == "mup" else 1.0

    @property
    def driver_scale(self) -> float:
        """The same for the drivers' coupling and for the drive."""
        return self.drivers**-0.5 if self.parameterization == "mup" else 1.0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name (without `_orig_mod.`)."""
        n, m = self.oscillators, self.drivers
        shapes: dict[str, tuple[int, ...]] = {
            "dynamics.omega": (1, n),
            "dynamics.K": (n, n),
            "dynamics.omega_cond": (1, m),
            "dynamics.K_cond": (m, m),
            "dynamics.K_drive": (self.classes, n, m),
        }
        channels = self.features // STEM**2
        for block in range(self.blocks):
            narrower = max(channels // 2, MIN_CHANNELS)
            for place, taken in ((1, channels), (3, narrower)):
                shapes[f"decoder.cascade.{block}.net.{place}.weight"] = (narrower, taken, 3, 3)
                shapes[f"decoder.cascade.{block}.net.{place}.bias"] = (narrower,)
            channels = narrower
        shapes["decoder.to_output.weight"] = (3, channels, 3, 3)
        shapes["decoder.to_output.bias"] = (3,)
        return shapes

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        return sum(math.prod(shape) for shape in self.shapes().values())


@dataclass(frozen=True)
class Un0Checkpoint:
    """A checked checkpoint: tensors under their published names, and the config it was trained with."""

    architecture: Un0Architecture
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_checkpoint(path: Path, *, parameterization: Parameterization | None = None) -> Un0Checkpoint:
    """Read and check a published checkpoint.

    Args:
        path: a file as `torch.save({"model": state_dict, "config": dict, ...})` writes it. What a training run keeps
            besides (optimizer, schedule) is not looked at, but must be tensors and plain values too.
        parameterization: overrules the config's.

    Raises:
        InputError: the file cannot be read, holds objects other than tensors and plain values, or is not a model
            this version knows; the message names the tensor or setting at fault.
    """
    saved = read_saved(path)
    content = saved.content
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f'{path}: not an Un-0 checkpoint: it has no "model" with named tensors')
    config = _plain_config(path, content.get("config"))
    stored = content["model"]
    for name, tensor in stored.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise InputError(
                f"{path}: model entry {short(name)} is a {_kind(tensor)}, not a tensor of numbers"
            )
    if parameterization is not None:
        config = {**config, "parameterization": parameterization}
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    try:
        architecture = infer_architecture(config, shapes)
        check_shapes(architecture, shapes)
        _check_places(saved, stored)
        tensors = {name: saved.tensor(tensor) for name, tensor in stored.items()}
        check_values(architecture, tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return Un0Checkpoint(architecture, tensors, config)


def write_safetensors(
    checkpoint: Un0Checkpoint,
    path: Path,
    *,
    name: str,
    class_names: tuple[str, ...] = (),
    integers: Mapping[str, Any] | None = None,
    check: Callable[[Path], None],
) -> None:
    """Write `checkpoint` where `load_generator` can read it; see `write_model_file`. `integers`: fields of an `Un0Integers`, None:
    it is drawn in floating point."""
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "architecture": json.dumps(asdict(checkpoint.architecture)),
        "config": json.dumps(checkpoint.config),
    }
    if class_names:
        metadata["class_names"] = json.dumps(class_names)
    if integers is not None:
        metadata["integers"] = json.dumps(integers)
    write_model_file(checkpoint.tensors, path, metadata, check)


def infer_architecture(
    config: Mapping[str, Any], published_shapes: Mapping[str, tuple[int, ...]]
) -> Un0Architecture:
    """What model a config and the shapes of its tensors describe.

    Sizes come from the tensors; where the config states them too, they must agree. A setting the config lacks has the
    default of Un-0's own loader for that family: three decoder blocks are the CIFAR-10 family, four the ImageNet-64
    family, which has one readout encoding and one solver whatever the config says.

    Raises:
        ValueError: tensors are missing, or the two disagree, or the model is of a kind this version does not run.
    """
    if config.get("dynamics", "standard") != "standard":
        raise ValueError(f"dynamics {short(config['dynamics'])}: only the standard dynamics are supported")
    shapes = canonical(published_shapes)
    for name, ndim in (("dynamics.K", 2), ("dynamics.K_drive", 3)):
        if name not in shapes:
            raise ValueError(f"has no tensor {name}")
        if len(shapes[name]) != ndim:
            raise ValueError(f"{name} has shape {list(shapes[name])}, expected {ndim} dimensions")
    classes, _, drivers = shapes["dynamics.K_drive"]
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("decoder.cascade.")})
    if blocks not in (3, 4):
        raise ValueError(
            f"decoder.cascade has {blocks} blocks; Un-0 models have 3 (32 pixels) or 4 (64 pixels)"
        )
    small = blocks == 3
    if small and "parameterization" not in config:
        raise ValueError(
            "its config has no parameterization, and Un-0's own programs disagree on what that means: convert with "
            "--parameterization standard or --parameterization mup"
        )
    settings = {
        "oscillators": shapes["dynamics.K"][0],
        "drivers": drivers,
        "classes": classes,
        "blocks": blocks,
        "parameterization": config.get("parameterization", "mup"),
        "relativization": config.get("relativization", "ref_oscillator"),
        "encoding": config.get("encoding", "sin_cos") if small else "sin_cos",
        "solver": config.get("solver", "rk4") if small else "euler",
        "steps": config.get("num_steps", 25 if small else 10),
    }
    try:
        architecture = convert(Un0Architecture, settings)
    except ValueError as error:
        for name, value in settings.items():
            if f"`$.{name}`" in str(error):
                reason = str(error).rpartition(" - at ")[0][:100]
                raise ValueError(f"{name} {short(value)}: {reason}") from error
        raise
    for setting, found in (
        ("n_oscillators", architecture.oscillators),
        ("n_conditional_oscillators", architecture.drivers),
        ("decoder_in_channels", architecture.features // STEM**2),
    ):
        stated = config.get(setting)
        if stated is not None and stated != found:
            raise ValueError(f"its config says {setting} {short(stated)}, its tensors say {found}")
    return architecture


def check_shapes(architecture: Un0Architecture, published_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the tensor, unless these are exactly the tensors of `architecture`."""
    found, expected = canonical(published_shapes), architecture.shapes()
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"has no tensor {name}")
        if found[name] != shape:
            raise ValueError(f"{name} has shape {list(found[name])}, expected {list(shape)}")
    if unknown := sorted(set(found) - set(expected)):
        raise ValueError(f"has tensors that are not of this model: {', '.join(map(short, unknown[:5]))}")


def check_values(architecture: Un0Architecture, published: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, unless the model's numbers stay finite in float32 for every class and seed.

    Bounds instead of a trial: a sum is at most the sum of its terms' magnitudes, sines and cosines are at most one.
    """
    tensors = canonical(published)
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: not plain floating point")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite numbers")
        if not bool(torch.isfinite(tensor.to(torch.float32)).all()):
            raise ValueError(
                f"{name} has values up to {tensor.abs().max():.3g}, which float32 cannot hold; models run in float32"
            )
    speed = {
        "dynamics.K": architecture.coupling_scale * _rows(tensors["dynamics.K"]),
        "dynamics.K_drive": architecture.driver_scale * _rows(tensors["dynamics.K_drive"]),
        "dynamics.K_cond": architecture.driver_scale * _rows(tensors["dynamics.K_cond"]),
        "dynamics.omega": float(tensors["dynamics.omega"].abs().max()),
        "dynamics.omega_cond": float(tensors["dynamics.omega_cond"].abs().max()),
    }
    # cos S - sin C has two sums; a Runge-Kutta step adds up eight velocities; a mean first adds up all phases
    phase = math.pi + 16 * max(architecture.horizon, 1.0) * sum(speed.values())
    if not phase * architecture.oscillators < LARGEST:
        worst = max(speed, key=lambda name: speed[name])
        raise ValueError(f"{worst} is too strong: phases of up to {phase:.3g} may not stay finite in float32")
    bound = 2 * phase if architecture.encoding == "raw" else 1.0
    for name in architecture.shapes():
        if name.startswith("decoder.") and name.endswith(".weight"):
            bias = tensors[name.replace(".weight", ".bias")]
            bound = bound * _rows(tensors[name].flatten(1)) + float(bias.abs().max())
            if not bound < LARGEST:
                raise ValueError(
                    f"{name} is too strong: values of up to {bound:.3g} may not stay finite in float32"
                )


def _rows(matrix: Tensor) -> float:
    """The largest sum of magnitudes along the last dimension."""
    return float(matrix.abs().sum(-1, dtype=torch.float64).max())


def canonical(named: Mapping[str, Any]) -> dict[str, Any]:
    """`named` without what torch.compile added to the names; raises ValueError where two then are one."""
    plain = {name.replace(COMPILED, ""): value for name, value in named.items()}
    if len(plain) != len(named):
        raise ValueError(f"has tensors twice, with and without {COMPILED} in their names")
    return plain


def read_class_names(path: Path) -> tuple[str, ...]:
    """Names of the classes, in order: a JSON list, or one name per line.

    Raises:
        InputError: the file cannot be read, or has an empty name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--class-names {path}: {error}") from error
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"--class-names {path}: class {number} has no name: {short(name)}")
    return tuple(name.strip() for name in names)


def short(value: Any) -> str:
    """`value` for a message: its representation, however large or strange it is."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def _check_places(saved: SavedCheckpoint, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError unless every tensor has numbers of its own in the file, as real weights do.

    A tensor can be a view that repeats a few numbers without end, and two can be views of the same ones.
    """
    save = "save copies, {name: tensor.clone() for name, tensor in state_dict.items()}, and convert that"
    places = []
    for name, tensor in tensors.items():
        try:
            place = saved.place(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; the file is damaged") from error
        if tensor.repeats:
            raise ValueError(
                f"{name}: its {math.prod(tensor.shape)} elements repeat {tensor.span} stored numbers; {save}"
            )
        places.append((place.start, place.stop, name))
    places.sort()
    for (_, end, name), (start, _, other) in pairwise(places):
        if start < end:
            raise ValueError(f"{name} and {other} are views of the same stored numbers; {save}")


def _plain_config(path: Path, config: Any) -> dict[str, Any]:
    """The config, with only plain values in it, none deep, all of it small enough to be carried along in the header."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise InputError(f"{path}: its config is a {_kind(config)}, not a dictionary")
    budget = MAX_CONFIG_CHARS
    for name, value in config.items():
        try:
            if not isinstance(name, str):
                raise ValueError("has a name that is no word")
            budget = _spend(value, budget - len(name), MAX_CONFIG_DEPTH)
        except ValueError as error:
            raise InputError(
                f"{path}: config entry {short(name)} {error}. Save the checkpoint without it and convert that"
            ) from error
    return dict(config)


def _spend(value: Any, budget: int, depth: int) -> int:
    """What is left of `budget` after `value`, a value that occurs many times counted each time.

    Raises:
        ValueError: nothing is left, or `value` is no plain value or deeper than `depth`; the message goes after "it".
    """
    if value is None or type(value) in (bool, int, float, str):
        budget -= 1 + (len(value) if isinstance(value, str) else 0)
    elif type(value) in (list, tuple, dict):
        if depth == 0:
            raise ValueError(f"has lists in lists {MAX_CONFIG_DEPTH} deep, or one that contains itself")
        budget -= 2
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise ValueError("has names that are no words")
            budget -= sum(map(len, value))
            value = value.values()
        for item in value:
            budget = _spend(item, budget, depth - 1)
    else:
        raise ValueError(f"is a {_kind(value)}; only numbers, words, and lists of them can be kept")
    if budget < 0:
        raise ValueError(f"is larger than the {MAX_CONFIG_CHARS} characters of config that can be kept")
    return budget


def _kind(value: Any) -> str:
    if isinstance(value, Unread):
        return value.kind
    return "tensor" if isinstance(value, StoredTensor) else type(value).__name__
