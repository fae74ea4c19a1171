"""Safetensors files of weights: looked at before anything in them is loaded, and written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from safetensors import SafetensorError, safe_open

from millijoule.workers.errors import InputError
from millijoule.workers.records import convert

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

#: Larger headers than this are not a model of ours, and would be read into memory whole.
MAX_HEADER_BYTES = 16 * 2**20

#: How a file begins that was cloned without Git LFS.
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class ModelHeader:
    """What a file says of its tensors, and its metadata. `dtypes` as safetensors names them: "F16"."""

    metadata: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtype_of: dict[str, str]

    @property
    def dtypes(self) -> frozenset[str]:
        """All types that occur."""
        return frozenset(self.dtype_of.values())


def read_header(path: Path) -> ModelHeader:
    """The header of a safetensors file, without torch; every tensor has bytes of its own in the file.

    Raises:
        InputError: the file is no safetensors file, or cut off; a pickled checkpoint is named as such.
    """
    with path.open("rb") as file:
        start = file.read(64)
    refuse_lfs_pointer(path, start)
    is_json = start[8:9] == b"{"  # a header's length may begin like a pickle, too
    if not is_json and start[:2] in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"):
        raise InputError(
            f"{path}: a pickled checkpoint; loading one can run any code, so it is not read. Save the weights "
            "with safetensors (`millijoule convert` does it for Un-0 checkpoints) and give that file"
        )
    length = int.from_bytes(start[:8], "little")
    if is_json and MAX_HEADER_BYTES < length < path.stat().st_size:
        raise InputError(
            f"{path}: its header has {length} bytes, at most {MAX_HEADER_BYTES} are read: not a model of ours"
        )
    try:
        with safe_open(path, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return ModelHeader(
                opened.metadata() or {},
                {name: tuple(part.get_shape()) for name, part in slices.items()},
                {name: part.get_dtype() for name, part in slices.items()},
            )
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a safetensors file, or damaged or cut off on its way here: {error}"
        ) from error


def read_own_header(path: Path, what: str, model_format: str, version: str) -> ModelHeader:
    """`read_header` of a file that a program of ours wrote; `what` is a word for such models.

    Raises:
        InputError: also where it is of another format or version.
    """
    header = read_header(path)
    found = header.metadata.get("format")
    if found != model_format:
        raise InputError(f"{path}: safetensors, but not an {what} model (its format is {found!r})")
    if (found := header.metadata.get("version")) != version:
        raise InputError(
            f"{path}: {what} format {found}, this program reads {version}: use it with the version that wrote it, or "
            "train it again"
        )
    return header


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Within, what the content of a model file makes fail is an InputError that names the file."""
    try:
        yield
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        *_, reason = str(error).splitlines() or [type(error).__name__]
        raise InputError(f"{path}: damaged model file: {reason.strip()}") from error


def read_settings(kind: type[T], text: str) -> T:
    """The dataclass `kind` that a file's metadata hold as JSON; raises ValueError unless it has just these fields."""
    raw = msgspec.json.decode(text)
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if not isinstance(raw, dict) or raw.keys() != names:
        raise ValueError(f"has {text[:200]}, expected {sorted(names)}")
    return convert(kind, raw)


def write_model_file(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: dict[str, str],
    check: Callable[[Path], Any] = lambda file: None,
) -> None:
    """Write a safetensors file; all of it appears at once or none.

    `check` is called with the complete file before it gets its name; what it raises is raised, and nothing is written.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file would leave it readable to its owner only
        save_file(dict(tensors), temporary, metadata)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        check(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, UnicodeError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def refuse_lfs_pointer(path: Path, start: bytes) -> None:
    """Raise InputError if the file that begins with `start` is only Git LFS's note of where the real one is."""
    if start.startswith(LFS_POINTER):
        raise InputError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or download the file"
        )
