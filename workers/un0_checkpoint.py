"""Published Un-0 checkpoints as data: what their tensors are, and their conversion from pickle to safetensors.

In goes a `.pt` file as Un-0's training and its releases write it, out comes a safetensors file that says which model it
is. Tensor names, values and the training config are kept as published. Nothing here runs the model, and no pickle is
ever opened with anything but torch's restricted unpickler, which can make tensors and plain values and nothing else.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import uuid
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from millijoule.workers.errors import InputError

FORMAT = "un0"
FORMAT_VERSION = "1"

Parameterization = Literal["standard", "mup"]

PARAMETERIZATIONS = get_args(Parameterization)
RELATIVIZATIONS = ("absolute", "mean_relative", "ref_oscillator")
ENCODINGS = ("raw", "sin", "sin_cos")
SOLVERS = ("euler", "rk4")

#: The decoder starts from this many pixels a side and doubles them in each block.
STEM = 4

#: No decoder block has fewer channels than this.
MIN_CHANNELS = 32

#: Sizes beyond these are not a model anyone has published, and would only exhaust memory.
MAX_OSCILLATORS, MAX_DRIVERS, MAX_CLASSES, MAX_STEPS = 65536, 4096, 1_000_000, 1000

#: The pickled part of a checkpoint holds names and settings; the numbers stand beside it.
MAX_PICKLE_BYTES = 64 * 2**20

#: What torch.compile puts into the names of a module's tensors; a checkpoint may have it or not.
COMPILED = "_orig_mod."

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Un0Architecture:
    """Everything about an Un-0 model that is not a weight.

    `horizon` is the time over which the phases run, whatever the number of `steps`.
    """

    oscillators: int
    drivers: int
    classes: int
    blocks: int  # of the decoder; each doubles the image
    parameterization: str
    relativization: str
    encoding: str
    solver: str
    steps: int
    horizon: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("oscillators", 2, MAX_OSCILLATORS),
            ("drivers", 1, MAX_DRIVERS),
            ("classes", 1, MAX_CLASSES),
            ("blocks", 1, 6),
            ("steps", 1, MAX_STEPS),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} {value!r} is not an integer from {low} to {high}")
        for name, known in (
            ("parameterization", PARAMETERIZATIONS),
            ("relativization", RELATIVIZATIONS),
            ("encoding", ENCODINGS),
            ("solver", SOLVERS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if type(self.horizon) is not float or not 0 < self.horizon < math.inf:
            raise ValueError(f"horizon {self.horizon!r} is not a positive number")
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

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Un0Architecture:
        """Parse what `to_json` wrote; raises ValueError or TypeError for anything else."""
        raw = json.loads(text)
        names = {f.name for f in fields(Un0Architecture)}
        if not isinstance(raw, dict) or set(raw) != names:
            raise ValueError(f"architecture is {text[:200]}, expected {sorted(names)}")
        return Un0Architecture(**raw)


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
    saved = _load_restricted(path)
    if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
        raise InputError(f'{path}: not an Un-0 checkpoint: it has no "model" with named tensors')
    config = _plain_config(path, saved.get("config"))
    tensors = saved["model"]
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f"{path}: model entry {name!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.dtype not in _FLOATS:
            raise InputError(f"{path}: {name} is {tensor.dtype}, {tensor.layout}: not plain floating point")
    _check_bytes(path, tensors)
    if parameterization is not None:
        config = {**config, "parameterization": parameterization}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        architecture = infer_architecture(config, shapes)
        check_shapes(architecture, shapes)
        check_finite(tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return Un0Checkpoint(architecture, {name: t.detach() for name, t in tensors.items()}, config)


def write_safetensors(
    checkpoint: Un0Checkpoint,
    path: Path,
    *,
    name: str,
    class_names: tuple[str, ...] = (),
    overwrite: bool = False,
) -> None:
    """Write `checkpoint` where `load_generator` can read it; all of the file appears at once or none.

    Raises:
        InputError: the file exists and `overwrite` is False, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists; give another name, or --force to replace it")
    metadata = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "name": name,
        "architecture": checkpoint.architecture.to_json(),
        "config": json.dumps(checkpoint.config),
    }
    if class_names:
        metadata["class_names"] = json.dumps(class_names)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file would leave it readable to its owner only
        save_file({k: t.contiguous() for k, t in checkpoint.tensors.items()}, temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists() and not overwrite:
            raise InputError(f"{path}: was created by someone else meanwhile; it is left as it is")
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
        raise ValueError(f"dynamics {config['dynamics']!r}: only the standard dynamics are supported")
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
    architecture = Un0Architecture(
        oscillators=shapes["dynamics.K"][0],
        drivers=drivers,
        classes=classes,
        blocks=blocks,
        parameterization=config.get("parameterization", "mup"),
        relativization=config.get("relativization", "ref_oscillator"),
        encoding=config.get("encoding", "sin_cos") if small else "sin_cos",
        solver=config.get("solver", "rk4") if small else "euler",
        steps=config.get("num_steps", 25 if small else 10),
    )
    for setting, found in (
        ("n_oscillators", architecture.oscillators),
        ("n_conditional_oscillators", architecture.drivers),
        ("decoder_in_channels", architecture.features // STEM**2),
    ):
        stated = config.get(setting)
        if stated is not None and stated != found:
            raise ValueError(f"its config says {setting} {stated!r}, its tensors say {found}")
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
        raise ValueError(f"has tensors that are not of this model: {', '.join(unknown[:5])}")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, where a value is not a finite number."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite numbers")


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
    except (OSError, ValueError) as error:
        raise InputError(f"--class-names {path}: {error}") from error
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"--class-names {path}: class {number} has no name: {name!r}")
    return tuple(name.strip() for name in names)


def _load_restricted(path: Path) -> Any:
    """Unpickle with torch's restricted unpickler, numbers left on disk where the format allows."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        in_zip = zipfile.is_zipfile(path)
        if in_zip:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=in_zip)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL (\S+)", str(error))
        raise InputError(
            f"{path}: holds {what[1] if what else 'something'} besides tensors and plain values, so it is not "
            "loaded: that could run any code. Save a file with only its model and config and convert that"
        ) from error
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise InputError(f"{path}: not a checkpoint torch can read: {_first_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives that would unpack to more than they are."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise InputError(f"{path}: {entry.filename} is compressed, which torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
                raise InputError(f"{path}: {entry.filename} is {entry.file_size} bytes: not a checkpoint")


def _check_bytes(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors can be views that repeat a few stored numbers without end; real weights are as large as their file."""
    claimed = sum(t.numel() * t.element_size() for t in tensors.values())
    if claimed > path.stat().st_size:
        raise InputError(f"{path}: its tensors claim {claimed} bytes, more than the file has")


def _plain_config(path: Path, config: Any) -> dict[str, Any]:
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise InputError(f"{path}: its config is a {type(config).__name__}, not a dictionary")
    for name, value in config.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise InputError(
                f"{path}: config entry {name!r} is a {type(value).__name__}; only numbers, words, and lists of them "
                "can be kept. Save the checkpoint without it and convert that"
            )
    return dict(config)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
