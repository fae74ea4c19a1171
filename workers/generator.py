"""The protocol every image model is used through, and the one function that loads a model by name or path."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.file_hashes import file_sha256
from millijoule.workers.schemas import ImageRequest

DEFAULT_MODEL = "default"

#: Models that come with the package: the oscillator generator, and the conventional diffusion model to compare it with.
PACKAGED = {
    DEFAULT_MODEL: Path(__file__).parent / "weights" / "default.safetensors",
    "baseline": Path(__file__).parent / "weights" / "baseline",
}
FACTORY_PREFIX = "python:"

#: Larger headers than this are not a model of ours, and would be read into memory whole.
MAX_HEADER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class GeneratorInfo:
    """What a loaded model is and which requests it can serve."""

    name: str
    sha256: str  # of the weights file(s): part of the job's fingerprint
    width: int  # native size in pixels
    height: int
    num_inference_steps: int  # default
    batch_size: int  # the batch it runs best at on this device
    max_steps: int = 1000
    sizes: tuple[tuple[int, int], ...] = ()  # every (width, height) it can make; empty: any


@dataclass(frozen=True)
class GeneratedBatch:
    """`images` is uint8 `[batch, height, width, 3]`, sRGB. `warnings[i]` are words for the user about image i."""

    images: np.ndarray
    warnings: tuple[tuple[str, ...], ...] = field(default=())


class Generator(Protocol):
    """A prompt-to-image model on one device.

    `generate` must not depend on what else is in the batch: the same request gives the same image at any batch
    size. It may raise for a whole batch; the caller then bisects to find the request that is at fault.
    """

    info: GeneratorInfo

    def generate(self, requests: Sequence[ImageRequest]) -> GeneratedBatch:
        """Draw one image per request (all of one size and step count)."""
        ...


@runtime_checkable
class ReportsSteps(Protocol):
    """What a generator whose batches take minutes may have besides: the worker sets `on_step`, and the generator
    calls it whenever its batch got further, as often as it likes. Without it a batch has to end within --lease-seconds.
    """

    on_step: Callable[[], None]


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another without loading it: part of a job's fingerprint."""

    name: str
    sha256: str


def describe_model(model: str) -> ModelIdentity:
    """Identify `model` (see `load_generator`) by its files, without torch; their hashes are found once per host (`file_hashes`).

    Raises:
        InputError: a file is missing or is not safetensors, or the factory's name is malformed.
    """
    if model.startswith(FACTORY_PREFIX):
        _split_factory(model)
        return ModelIdentity(model, hashlib.sha256(model.encode()).hexdigest())
    path = model_path(model)
    if path.is_dir():
        from millijoule.workers.diffusers_model import describe_pipeline

        return describe_pipeline(path)
    header = read_safetensors_header(path)
    return ModelIdentity(header.get("__metadata__", {}).get("name", path.stem), file_sha256(path))


def load_generator(model: str, *, device: str = "cpu") -> Generator:
    """Load `model`.

    Args:
        model: "default" or "baseline" for weights in the package (`PACKAGED`), the path of a `.safetensors` file or of a diffusers
            directory, or "python:MODULE:FACTORY", a function of yours that takes the device and returns a `Generator`.
        device: "cpu" or "cuda".

    Raises:
        InputError: the file is missing, is not safetensors (pickled files are never opened), or is not a model
            this version knows; the factory cannot be imported.
    """
    if model.startswith(FACTORY_PREFIX):
        module_name, factory_name = _split_factory(model)
        try:
            factory = getattr(importlib.import_module(module_name), factory_name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"--model {model}: {error}") from error
        return factory(device)
    path = model_path(model)
    if path.is_dir():
        from millijoule.workers.diffusers_model import DiffusersGenerator

        return DiffusersGenerator.load(path, device=device)
    if read_safetensors_header(path).get("__metadata__", {}).get("format") == "un0":
        from millijoule.workers.un0 import Un0Generator

        return Un0Generator.load(path, device=device)
    from millijoule.workers.oscillator import OscillatorGenerator

    return OscillatorGenerator.load(path, device=device)


def model_path(model: str) -> Path:
    """The file or diffusers directory behind a model name; raises InputError where there is none."""
    path = PACKAGED.get(model) or Path(model)
    if not path.exists():
        raise InputError(f"--model {model}: no such file or directory")
    return path


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor names to dtype, shape and offsets, and `__metadata__`.

    Raises:
        InputError: the file does not start like safetensors does; a pickled checkpoint is named as such.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"):
            raise InputError(
                f"{path}: a pickled checkpoint; loading one can run any code, so it is not read. Save the weights "
                "with safetensors (`millijoule convert` does it for Un-0 checkpoints) and give that file"
            )
        if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"{path}: not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file")
    return header


def _split_factory(model: str) -> tuple[str, str]:
    parts = model.removeprefix(FACTORY_PREFIX).split(":")
    if len(parts) != 2 or not all(parts):
        raise InputError(f"--model {model}: write python:MODULE:FACTORY")
    return parts[0], parts[1]
