"""The protocol every image model is used through, and the one function that loads a model by name or path."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np

from millijoule.workers.errors import InputError
from millijoule.workers.generators.file_hashes import file_sha256
from millijoule.workers.schemas import ImageRequest

DEFAULT_MODEL = "default"

#: Models that come with the package: the oscillator generator, and the conventional diffusion model to compare it with.
PACKAGED = {
    DEFAULT_MODEL: Path(__file__).parents[1] / "weights" / "default.safetensors",
    "baseline": Path(__file__).parents[1] / "weights" / "baseline",
}
FACTORY_PREFIX = "python:"

#: A diffusers directory of more bytes than this is not run on CPUs unless somebody says so. The packaged baseline has 19 MB;
#: those that are published for real use have a gigabyte and more, and would take minutes for an image.
CPU_WEIGHTS_BYTES = 256 * 2**20

#: Larger headers than this are not a model of ours, and would be read into memory whole.
MAX_HEADER_BYTES = 16 * 2**20

#: How a file begins that was cloned without Git LFS.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


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
        from millijoule.workers.generators.diffusers_model import describe_pipeline

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
        from millijoule.workers.generators.diffusers_model import DiffusersGenerator

        return DiffusersGenerator.load(path, device=device)
    if read_safetensors_header(path).get("__metadata__", {}).get("format") == "un0":
        from millijoule.workers.generators.un0 import Un0Generator

        return Un0Generator.load(path, device=device)
    from millijoule.workers.generators.oscillator import OscillatorGenerator

    return OscillatorGenerator.load(path, device=device)


def model_path(model: str) -> Path:
    """The file or diffusers directory behind a model name; raises InputError where there is none."""
    path = PACKAGED.get(model) or Path(model)
    if not path.exists():
        raise InputError(f"--model {model}: no such file or directory")
    return path


def needs_gpu(model: str) -> bool:
    """Whether `model` is a diffusers directory of more than `CPU_WEIGHTS_BYTES`. Raises InputError as `describe_model`."""
    if model.startswith(FACTORY_PREFIX):
        return False
    path = model_path(model)
    if not path.is_dir():
        return False
    from millijoule.workers.generators.diffusers_model import read_pipeline

    return sum(file.stat().st_size for file in read_pipeline(path).files) > CPU_WEIGHTS_BYTES


def read_safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor names to dtype, shape and offsets, and `__metadata__`.

    Raises:
        InputError: the file does not start like safetensors does; a pickled checkpoint is named as such.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        refuse_lfs_pointer(path, start)
        length = int.from_bytes(start[:8], "little")
        if start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"):
            raise InputError(
                f"{path}: a pickled checkpoint; loading one can run any code, so it is not read. Save the weights "
                "with safetensors (`millijoule convert` does it for Un-0 checkpoints) and give that file"
            )
        if len(start) < 8 or not 2 <= length <= size - 8 or start[8:9] != b"{":
            raise InputError(f"{path}: not a safetensors file")
        if length > MAX_HEADER_BYTES:
            raise InputError(
                f"{path}: its header has {length} bytes, at most {MAX_HEADER_BYTES} are read: not a model of ours"
            )
        file.seek(8)
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not a safetensors file: {error}") from error
    try:
        _check_header(header, size - 8 - length)
    except ValueError as error:
        raise InputError(f"{path}: damaged model file: {error}") from error
    return header


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise InputError if the file that begins with `start` is only Git LFS's note of where the real one is."""
    if start.startswith(LFS_POINTER):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or download the file"
        )


def _check_header(header: dict[str, Any], size: int) -> None:
    """Raise ValueError unless `header` gives every tensor bytes of its own among the `size` that follow it."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not words by name")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        short = repr(name[:100])
        if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
            raise ValueError(f"its header has no type for tensor {short}")
        shape, place = entry.get("shape"), entry.get("data_offsets")
        if not _are_counts(shape) or not _are_counts(place) or len(place) != 2:
            raise ValueError(f"its header has no shape or no place for tensor {short}")
        if not place[0] <= place[1] <= size:
            raise ValueError(
                f"tensor {short} is at bytes {place[0]} to {place[1]} of {size}; the file may have been cut off"
            )
        places.append((place[0], place[1], short))
    end, before = 0, ""
    for first, last, short in sorted(places):
        if first < end:
            raise ValueError(f"tensors {before} and {short} overlap at byte {first}")
        end, before = last, short


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _split_factory(model: str) -> tuple[str, str]:
    parts = model.removeprefix(FACTORY_PREFIX).split(":")
    if len(parts) != 2 or not all(parts):
        raise InputError(f"--model {model}: write python:MODULE:FACTORY")
    return parts[0], parts[1]
